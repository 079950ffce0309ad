"""Two servers with homes of their own on one Postgres and one bucket, as a user sees them; the fake driver's machines."""

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from recess.testing.blob_server import s3_server

pytestmark = pytest.mark.timeout(600)  # two servers and some twenty commands, each a process

AGENT = """
from recess_agent import agent, Session

@agent(image="base", idle="1s")
async def coder(s: Session):
    async for turn in s:
        pass
"""


@pytest.fixture(scope="module")
def bucket_server():
    with s3_server() as running:
        yield running


@pytest.fixture
def homes(tmp_path, bucket_server, postgres):
    """Two homes of one cluster: each is what runs a command there."""
    runs = tempfile.mkdtemp(prefix="rc-")  # short: a unix socket's path is; and gone with the test
    shared = {
        "RECESS_DATABASE_URL": postgres.database(), "RECESS_STORE": bucket_server.make_bucket(f"c-{secrets.token_hex(6)}"),
        "AWS_ENDPOINT_URL": bucket_server.endpoint, "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret", "RECESS_DRIVER": "fake", "PATH": os.environ["PATH"], "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path), "RECESS_LEASE_S": "6",
    }  # fmt: skip

    def home(name):
        env = {**shared, "RECESS_HOME": str(tmp_path / name), "RECESS_RUN_DIR": f"{runs}/{name}"}

        def run(*args, stdin=b"", expect=0):
            command = [sys.executable, "-m", "recess.cli.main", *args]
            done = subprocess.run(command, input=stdin, capture_output=True, env=env, cwd=tmp_path, timeout=300)
            if expect is not None:
                assert done.returncode == expect, (args, done.returncode, done.stdout, done.stderr)
            return done

        run.home = tmp_path / name
        return run

    made = [home("a"), home("b")]
    yield made
    for run in made:
        run("down", "--all", expect=None)
    shutil.rmtree(runs)


def data(done):
    return json.loads(done.stdout)["data"]


def kill_server(run):
    """End a home's server without a word, and wait until it is gone."""
    pid = int((run.home / "server.lock").read_text())
    gone = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([gone], [], [], 60)[0]
    os.close(gone)


def test_snapshots_and_names_are_the_clusters_and_machines_each_nodes_own(homes):
    a, b = homes
    a("images", "create", "base", expect=None)
    a("run", "-d", "--name", "dev", "base", "sh", "-c", "echo kept > /note; sleep 600")
    a("snapshot", "dev", "base:v1")
    assert [row["name"] for row in data(b("--json", "ps"))] == []
    b("restore", "base:v1", "--name", "dev2")
    assert b("exec", "dev2", "cat", "/note").stdout == b"kept\n"
    assert [row["name"] for row in data(b("--json", "ps"))] == ["dev2"]
    assert [row["name"] for row in data(a("--json", "ps"))] == ["dev"]
    assert b"in use" in b("run", "-d", "--name", "dev", "base", expect=125).stderr


def test_a_session_is_driven_by_the_node_that_took_its_message_and_survives_its_death(homes, tmp_path):
    """The fake guest has no Python, so each turn ends as failed: what matters is who wrote that, and that all can read it."""
    a, b = homes
    (tmp_path / "agent.py").write_text(AGENT)
    a("deploy", "agent.py", "--name", "coder")
    session = a("session", "start", "coder").stdout.decode().split()[0]
    until_frozen(a, session)  # until then it is a's, whoever takes its messages
    b("session", "send", session, "one", expect=1)  # it waits for the turn's end, and says that it failed
    assert (seen := log(b, session)) == log(a, session)
    assert sum(e["kind"] == "turn.end" for e in seen) == 1
    kill_server(b)
    a("session", "send", session, "two", expect=1)  # after the end of the lease that nobody gave back
    seen = log(a, session)
    assert sum(e["kind"] == "turn.end" for e in seen) == 2
    assert [e["body"]["text"] for e in seen if e["kind"] == "user"] == ["one", "two"]
    assert [e["position"] for e in seen] == list(range(1, len(seen) + 1))
    epochs = [e["epoch"] for e in seen if e["epoch"]]
    assert epochs == sorted(epochs)
    assert len(set(epochs)) >= 2


def until_frozen(run, session):
    ends = time.monotonic() + 60.0
    while (state := data(run("--json", "session", "inspect", session))["state"]) != "frozen":
        assert time.monotonic() < ends, state
        time.sleep(0.2)


def log(run, session):
    """Return the entries up to the newest turn's end: when a node puts a machine away after it is its own affair."""
    entries = data(run("--json", "session", "log", session))
    last = max((n for n, entry in enumerate(entries) if entry["kind"] == "turn.end"), default=-1)
    return entries[: last + 1]
