"""Installing Firecracker's release: by checksum or not at all, only the programs, and with help where there is no network."""

from __future__ import annotations

import hashlib
import io
import socket
import socketserver
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from recess.errors import Corrupt, Unavailable
from recess.node import install_firecracker as installing
from recess.node.install_firecracker import SHA256, URL, VERSION, install_firecracker

TOP, SUFFIX = f"release-v{VERSION}-x86_64", f"-v{VERSION}-x86_64"


def archive(*names: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.type = kind
            content = f"I am {name}".encode() if kind == tarfile.REGTYPE else b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


GOOD = archive(f"{TOP}/firecracker{SUFFIX}", f"{TOP}/jailer{SUFFIX}", "../../etc/passwd", f"{TOP}/SHA256SUMS")


def served(folder: Path, data: bytes) -> dict[str, str]:
    path = folder / "release.tgz"
    path.write_bytes(data)
    return {"url": path.as_uri(), "sha256": hashlib.sha256(data).hexdigest()}


def test_the_programs_are_there_and_nothing_else(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for _ in range(2):
        path = install_firecracker(home, **served(tmp_path, GOOD))
        assert path == home / "bin" / "firecracker"
        assert path.read_text() == f"I am {TOP}/firecracker{SUFFIX}"
        assert path.stat().st_mode & 0o777 == 0o755
        assert sorted(p.name for p in home.rglob("*")) == ["bin", "firecracker", "jailer"]


def test_another_checksum_installs_nothing(tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="nothing was installed"):
        install_firecracker(tmp_path / "home", url=served(tmp_path, GOOD)["url"])
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an archive",
        GOOD[:100],
        archive(f"{TOP}/firecracker{SUFFIX}"),
        archive(f"{TOP}/firecracker{SUFFIX}", f"{TOP}/jailer{SUFFIX}", kind=tarfile.SYMTYPE),
        archive(f"{TOP}/firecracker{SUFFIX}", f"{TOP}/jailer{SUFFIX}", kind=tarfile.DIRTYPE),
    ],
    ids=["nothing", "no-archive", "cut-short", "one-alone", "links", "folders"],
)
def test_an_archive_without_them_installs_nothing(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(Corrupt):
        install_firecracker(tmp_path / "home", **served(tmp_path, data))
    assert not (tmp_path / "home").exists()


def test_one_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "_ARCHIVE_MAX", 10)
    with pytest.raises(Corrupt, match="is larger than"):
        install_firecracker(tmp_path / "home", **served(tmp_path, GOOD))
    monkeypatch.undo()
    monkeypatch.setattr(installing, "_PROGRAM_MAX", 3)
    with pytest.raises(Corrupt, match="sensible size"):
        install_firecracker(tmp_path / "home", **served(tmp_path, GOOD))


@contextmanager
def server(answers: dict[str, bytes]) -> Iterator[str]:
    """A server on the loopback that says these bytes to whoever asks for these paths; yields its URL."""

    class Answer(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            path = self.rfile.readline().split()[1].decode()
            while self.rfile.readline().strip():
                pass
            self.wfile.write(answers[path])

    with socketserver.TCPServer(("127.0.0.1", 0), Answer) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_address[1]}"
        finally:
            listening.shutdown()
            thread.join()


def ok(data: bytes, length: int | None = None) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(data) if length is None else length) + data


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def test_it_comes_over_http_and_by_a_redirect(tmp_path: Path) -> None:
    """As a release does: its address only names where it lies."""
    redirect = b"HTTP/1.1 302 Found\r\nLocation: /there\r\nContent-Length: 0\r\n\r\n"
    with server({"/here": redirect, "/there": ok(GOOD)}) as url:
        path = install_firecracker(tmp_path, url=f"{url}/here", sha256=hashlib.sha256(GOOD).hexdigest())
    assert path.read_text() == f"I am {TOP}/firecracker{SUFFIX}"


@pytest.mark.parametrize("answer", [ok(GOOD), ok(GOOD[:-1], len(GOOD)), ok(b"<html>sign in</html>"), ok(b"")])
def test_over_http_another_checksum_leaves_what_was_there(tmp_path: Path, answer: bytes) -> None:
    """The pinned one is what counts: another release, half of one, a portal's page."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "firecracker").write_text("mine")
    with server({"/x": answer}) as url, pytest.raises((Corrupt, Unavailable)) as caught:
        install_firecracker(tmp_path, url=f"{url}/x")
    assert SHA256 in caught.value.message + caught.value.hint
    assert [path.read_text() for path in (tmp_path / "bin").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\ncut",
        b"",
    ],
)
def test_a_server_that_does_not_have_it(tmp_path: Path, answer: bytes) -> None:
    with server({"/x": answer}) as url, pytest.raises(Unavailable, match="cannot be fetched") as caught:
        install_firecracker(tmp_path, url=f"{url}/x")
    assert str(tmp_path / "bin" / "firecracker") in caught.value.hint
    assert not (tmp_path / "bin").exists()


def test_without_the_network_it_says_what_to_put_where(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, not listening: refused, whatever else runs here
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(Unavailable) as caught:
            install_firecracker(tmp_path / "home", url=f"http://127.0.0.1:{taken.getsockname()[1]}/x")
    for part in (URL, SHA256, str(tmp_path / "home" / "bin" / "firecracker"), "RECESS_FIRECRACKER_BIN"):
        assert part in caught.value.hint
