import stat

import pytest

from recess.errors import BadInput, MissingTool, Unavailable
from recess.images import debian
from recess.images.tree import Node, with_parents


def file(path: str, **fields) -> Node:
    return Node(path, stat.S_IFREG | 0o644, **fields)


def test_the_hosts_mirrors_are_used_for_our_suite_only():
    text = (
        "http://mirror.example/debian/ bookworm main Debian\n"
        "http://mirror.example/debian/ bookworm contrib Debian\n"
        "http://mirror.example/sec/ bookworm-security main Debian\n"
        "http://mirror.example/debian/ trixie main Debian\n"
        "https://other.example/ bookworm main Other\n"
        "https://flat.example/ main\n"
    )
    assert debian.parse_targets(text) == [
        "deb http://mirror.example/debian/ bookworm contrib",
        "deb http://mirror.example/debian/ bookworm main",
        "deb http://mirror.example/sec/ bookworm-security main",
    ]


def test_a_host_of_another_suite_has_no_mirrors_for_us():
    assert debian.parse_targets("http://m/ubuntu noble main Ubuntu\n") == []
    assert debian.parse_targets("http://m/sec bookworm-security main Debian\n") == []
    assert debian.parse_targets("") == []


@pytest.mark.parametrize(
    ("log", "kind", "says"),
    [
        ("E: Unable to locate package nosuch", BadInput, "'nosuch'"),
        ("E: Package 'gone' has no installation candidate", BadInput, "'gone'"),
        ("E: unable to pick chroot mode automatically (use --mode for manual selection)", MissingTool, "namespaces"),
        ("E: newuidmap 12 0 1000 1 failed: Operation not permitted", MissingTool, "namespaces"),
        ("Err:1 http://x Could not resolve 'deb.debian.org'", Unavailable, "mirror cannot be reached"),
        ("E: something else", Unavailable, "mmdebstrap failed"),
    ],
)
def test_what_went_wrong_is_told(log, kind, says):
    error = debian.explain(Unavailable("mmdebstrap failed", log=log))
    assert type(error) is kind
    assert says in error.message
    assert error.details["log"] == log


def test_the_tree_is_cleaned_and_neutral(tmp_path):
    archive = tmp_path / "t"
    archive.write_bytes(b"root:*:20415:0:99999:7:::\nme:$y$x:20415:0\n")
    nodes = with_parents(
        {
            "etc/hostname": file("etc/hostname", size=9),
            "etc/passwd-": file("etc/passwd-"),
            "etc/shadow": Node("etc/shadow", stat.S_IFREG | 0o640, gid=42, size=42, offset=0),
            "usr/share/doc/x/copyright": file("usr/share/doc/x/copyright"),
            "usr/share/doc/x/README": file("usr/share/doc/x/README"),
            "usr/share/locale/de/m.mo": file("usr/share/locale/de/m.mo"),
            "usr/lib/python3/a.py": file("usr/lib/python3/a.py", mtime_s=100),
            "usr/lib/python3/a.pyc": file("usr/lib/python3/a.pyc", mtime_s=5000),
            "var/lib/apt/lists/x": file("var/lib/apt/lists/x"),
            "dev/null": Node("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)),
            "tmp/x": file("tmp/x"),
        }
    )
    out = debian.clean(nodes, archive, 4000)
    gone = {
        "etc/passwd-",
        "usr/share/doc/x/README",
        "usr/share/locale/de",
        "usr/share/locale/de/m.mo",
        "var/lib/apt/lists/x",
        "dev/null",
        "tmp/x",
    }
    assert set(nodes) - set(out) == gone
    assert {"dev", "tmp", "var/lib/apt/lists", "usr/share/doc/x/copyright", "etc/machine-id"} <= set(out)
    assert out["etc/hostname"].data == b"recess\n"
    assert out["etc/resolv.conf"].data == b""
    assert out["etc/shadow"].data == b"root:*:19000:0:99999:7:::\nme:$y$x:19000:0\n"
    assert (out["etc/shadow"].gid, stat.S_IMODE(out["etc/shadow"].mode)) == (42, 0o640)
    assert out["usr/lib/python3/a.py"].mtime_s == 100
    assert out["usr/lib/python3/a.pyc"].mtime_s == 100
