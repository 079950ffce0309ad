"""Docker's flag values, parsed."""

import socket

import pytest

from recess.cli.common import parse_env, parse_pairs, parse_port
from recess.cli.volume_flags import parse_mount, parse_socket, parse_volume, split_sockets
from recess.errors import BadInput


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80", ("127.0.0.1", 0, 80)),
        ("8080:80", ("127.0.0.1", 8080, 80)),
        ("0.0.0.0:8080:80/tcp", ("0.0.0.0", 8080, 80)),
        ("127.0.0.1::80", ("127.0.0.1", 0, 80)),
        ("/run/app.sock:80", ("/run/app.sock", 0, 80)),
        ("/run/app.sock:/run/inner.sock", ("/run/app.sock", 0, "/run/inner.sock")),
        ("8080:/run/inner.sock", ("127.0.0.1", 8080, "/run/inner.sock")),
        ("0.0.0.0:8080:/run/inner.sock", ("0.0.0.0", 8080, "/run/inner.sock")),
        ("/run/inner.sock", ("127.0.0.1", 0, "/run/inner.sock")),
    ],
)
def test_port_forms(text, expected):
    assert parse_port(text) == expected


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4", "80:0", "70000:80", "8080:http"])
def test_bad_ports_are_refused(text):
    with pytest.raises(BadInput):
        parse_port(text)


def test_env_takes_the_callers_value_and_later_ones_win(tmp_path):
    file = tmp_path / "env"
    file.write_text("# comment\nA=1\n\nB=2\n")
    assert parse_env(("B=3", "HOME", "ABSENT"), (str(file),), {"HOME": "/h"}) == {"A": "1", "B": "3", "HOME": "/h"}


def test_a_missing_env_file_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="env-file"):
        parse_env((), (str(tmp_path / "none"),), {})


def test_pairs():
    assert parse_pairs(("a=b=c",), "-l") == {"a": "b=c"}
    with pytest.raises(BadInput):
        parse_pairs(("novalue",), "-l")


def test_volumes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert parse_volume("./src:/work:ro") == {"source": str(tmp_path / "src"), "target": "/work", "readonly": True}
    assert parse_volume("data:/data")["source"] == "data"
    assert parse_volume(".:/w")["source"] == str(tmp_path)
    assert parse_mount("type=bind,src=.,dst=/w,readonly,size=2G") == {
        "source": str(tmp_path), "target": "/w", "readonly": True, "size_bytes": "2G",
    }  # fmt: skip
    assert parse_mount("source=data,target=/d")["readonly"] is False
    for bad in ("x", "a:", ":/b", "a:/b:exec"):
        with pytest.raises(BadInput):
            parse_volume(bad)
    for bad in ("source=a", "type=tmpfs,target=/x,source=y", "source=a/b,target=/x", "colour=red"):
        with pytest.raises(BadInput):
            parse_mount(bad)


def test_a_volume_that_is_a_socket_is_shared_as_one(tmp_path):
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(tmp_path / "a.sock"))
        volumes = [
            parse_volume(f"{tmp_path}/a.sock:/run/a.sock"),
            parse_volume(f"{tmp_path}:/work"),
            parse_volume("name:/data"),
        ]
        folders, sockets = split_sockets(volumes)
    assert [one["target"] for one in folders] == ["/work", "/data"]
    assert sockets == [[f"{tmp_path}/a.sock", "/run/a.sock"]]
    assert parse_socket("/h.sock:/g.sock") == ["/h.sock", "/g.sock"]
    for bad in ("/h.sock", ":/g", "/h:relative", "/h:/g:ro"):
        with pytest.raises(BadInput):
            parse_socket(bad)
