"""Snapshots that travel, as a user does it: two homes, one bucket behind a real S3 server, files between them."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile

import pytest

from recess.testing.blob_server import s3_server


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


@pytest.fixture
def bucket(server):
    return server.make_bucket(f"e-{secrets.token_hex(6)}")


@pytest.fixture
def home(tmp_path, server):
    """A maker of homes: `home("a", RECESS_STORE=...)` returns what runs a command there."""
    made = []
    runs = tempfile.mkdtemp(prefix="rt-")  # short: a unix socket's path is; and gone with the test

    def make(name, **more):
        env = {
            "PATH": os.environ["PATH"], "HOME": str(tmp_path), "RECESS_HOME": str(tmp_path / name),
            "RECESS_DRIVER": "fake", "RECESS_RUN_DIR": f"{runs}/{name}", "PYTHONPATH": os.pathsep.join(sys.path), "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", **more,
        }  # fmt: skip

        def run(*args, stdin=b"", expect=0):
            done = subprocess.run(
                [sys.executable, "-m", "recess.cli.main", *args], input=stdin, capture_output=True, env=env, cwd=tmp_path,
                timeout=60,
            )  # fmt: skip
            if expect is not None:
                assert done.returncode == expect, (args, done.returncode, done.stdout, done.stderr)
            return done

        made.append(run)
        return run

    yield make
    for run in made:
        run("down", "--all", expect=None)
    shutil.rmtree(runs)


def data(done):
    return json.loads(done.stdout)["data"]


def machine_with_a_file(run, name="base:v1"):
    run("run", "-d", "--name", "dev", "base")
    run("exec", "dev", "sh", "-c", "echo hello > /root/f")
    return run("snapshot", "dev", name).stdout.decode().strip()


def test_a_file_carries_a_snapshot_to_another_home(home, tmp_path):
    a, b = home("a"), home("b")
    snapshot = machine_with_a_file(a)
    assert a("snapshots", "export", "base:v1", "out.tar").stdout == b"out.tar\n"
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert tar.getnames()[-1] == f"manifests/{snapshot}.json"
    assert b("snapshots", "import", "out.tar", "-q").stdout.decode().strip() == snapshot
    b("restore", "base:v1", "--name", "dev2")
    assert b("exec", "dev2", "cat", "/root/f").stdout == b"hello\n"
    assert a("snapshots", "export", snapshot, "-").stdout == (tmp_path / "out.tar").read_bytes()
    answer = data(b("snapshots", "import", "-", "--json", stdin=(tmp_path / "out.tar").read_bytes()))
    assert answer["blobs_sent"] == 0


def test_an_export_that_broke_off_goes_on(home, tmp_path):
    a = home("a")
    machine_with_a_file(a)
    a("snapshots", "export", "base:v1", "whole.tar")
    whole = (tmp_path / "whole.tar").read_bytes()
    tag = data(a("snapshots", "export", "base:v1", "other.tar", "--json"))["tag"]
    (tmp_path / f".part.tar.{tag[:16]}.part").write_bytes(whole[:3000])
    done = a("snapshots", "export", "base:v1", "part.tar")
    assert b"going on after" in done.stderr
    assert (tmp_path / "part.tar").read_bytes() == whole
    assert [p.name for p in tmp_path.glob(".*part")] == []


def test_a_damaged_file_is_refused_and_says_so(home, tmp_path):
    a, b = home("a"), home("b")
    machine_with_a_file(a)
    a("snapshots", "export", "base:v1", "out.tar")
    bad = bytearray((tmp_path / "out.tar").read_bytes())
    bad[bad.index(b"\x28\xb5\x2f\xfd") + 20] ^= 1
    (tmp_path / "bad.tar").write_bytes(bad)
    done = b("snapshots", "import", "bad.tar", "--json", expect=1)
    assert json.loads(done.stdout)["error"]["code"] == "corrupt"
    (tmp_path / "cut.tar").write_bytes(bad[:4000])
    b("snapshots", "import", "cut.tar", expect=1)
    b("snapshots", "import", "no-such-file", expect=2)
    b("snapshots", "import", str(tmp_path), expect=2)
    assert data(b("snapshots", "ls", "--json")) == []
    b("snapshots", "import", "out.tar")


def test_push_and_pull_by_a_bucket(home, bucket):
    a, b = home("a", RECESS_REMOTE=f"{bucket}/shelf"), home("b")
    snapshot = machine_with_a_file(a)
    first = data(a("snapshots", "push", "base:v1", "--check", "--json"))
    assert first["checked_bytes"] == first["bytes_sent"] > 0
    a("exec", "dev", "sh", "-c", "echo more > /root/g")
    a("snapshot", "dev", "base:v2")
    second = data(a("snapshots", "push", "base:v2", "--json"))
    assert 0 < second["blobs_sent"] <= 4  # layer, page map, device state, manifest: the rest is there
    b("snapshots", "pull", "base:v1", expect=2)  # from where?
    assert b("snapshots", "pull", "base:v1", "--remote", f"{bucket}/shelf", "-q").stdout.decode().strip() == snapshot
    b("restore", "base:v1", "--name", "dev2")
    assert b("exec", "dev2", "cat", "/root/f").stdout == b"hello\n"
    b("snapshots", "pull", "base:v3", "--remote", f"{bucket}/shelf", expect=1)
    b("snapshots", "pull", "base:v1", "--remote", "s3://there-is-no-such-bucket/x", expect=1)


def test_two_homes_share_a_store(home, bucket):
    a, b = home("a", RECESS_STORE=f"{bucket}/store"), home("b", RECESS_STORE=f"{bucket}/store")
    snapshot = machine_with_a_file(a)
    a("suspend", "dev")
    report = data(b("restore", "base:v1", "--name", "dev2", "--json"))["resume"]
    assert (report["rung"], report["snapshot"]) == (3, snapshot)
    assert b("exec", "dev2", "cat", "/root/f").stdout == b"hello\n"
    again = data(b("restore", snapshot[:20], "--name", "dev3", "--json"))["resume"]
    assert again["rung"] == 2  # its copies are here now
    a("rm", "-f", "dev")
    a("snapshots", "rm", "-f", "base:v1")
    b("restore", "base:v1", "--name", "dev4")  # what one home removes stays for the other
    b("snapshots", "verify", "base:v1")
