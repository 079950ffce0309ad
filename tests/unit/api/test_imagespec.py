"""Docker's rules for entrypoint, command and the rest of what an image says."""

import pytest

from recess.api.imagespec import with_image
from recess.errors import BadInput

CONFIG = {
    "Entrypoint": ["/entry"], "Cmd": ["serve"], "Env": ["PATH=/bin", "A=1", "broken", "=x"], "WorkingDir": "/srv",
    "User": "app",
}  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "argv"),
    [
        ({}, ["/entry", "serve"]),
        ({"argv": []}, ["/entry", "serve"]),
        ({"argv": ["x", "y"]}, ["/entry", "x", "y"]),
        ({"entrypoint": "/own"}, ["/own"]),
        ({"entrypoint": ["/own", "-v"], "argv": ["x"]}, ["/own", "-v", "x"]),
        ({"entrypoint": "", "argv": ["x"]}, ["x"]),
        ({"entrypoint": ""}, []),
    ],
)
def test_entrypoint_and_command(spec, argv):
    out = with_image(spec, CONFIG)
    assert out["argv"] == argv
    assert "entrypoint" not in out


def test_what_the_user_says_wins():
    out = with_image({"env": {"A": "2"}, "cwd": "/x", "user": None}, CONFIG)
    assert out["env"] == {"PATH": "/bin", "A": "2"}
    assert (out["cwd"], out["user"]) == ("/x", "app")


def test_an_image_that_says_nothing():
    out = with_image({}, {}, ["/bin/sh"])
    assert (out["argv"], out["cwd"], out["user"]) == (["/bin/sh"], "/root", "root")
    assert with_image({}, {"Cmd": ["a"]}, ["/bin/sh"])["argv"] == ["a"]
    assert with_image({}, {"Env": []})["cwd"] == "/"
    assert with_image({"user": "nobody"}, {})["cwd"] == "/"  # who may not enter /root


def test_nonsense_is_refused():
    for spec in ({"argv": "x y", "entrypoint": 3}, {"entrypoint": [1]}):
        with pytest.raises(BadInput, match="entrypoint"):
            with_image(spec, CONFIG)
