"""The shape of E2B's SDK over a machine of the fake driver, and the runner of `run_code` by itself."""

import io
import json
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import pytest

from recess.adapters import code_runner
from recess.adapters.e2b import (
    CommandExitException,
    FileNotFoundException,
    InvalidArgumentException,
    NotFoundException,
    Sandbox,
    SandboxException,
    SandboxNotFoundException,
    TimeoutException,
)
from recess.adapters.e2b_types import FilesystemEventType, FileType
from recess.embedded import embedded


@pytest.fixture(scope="module")
def client():
    with (
        tempfile.TemporaryDirectory(prefix="rce") as folder,
        embedded(f"{folder}/home", driver="fake", run_dir=f"{folder}/run") as one,
    ):
        yield one


@pytest.fixture
def sandbox(client):
    with Sandbox.create(envs={"A": "b"}, metadata={"team": "x"}, ports=[80], client=client) as one:
        yield one


def test_commands(sandbox):
    heard = []
    done = sandbox.commands.run("echo $A $B", envs={"B": "c"}, on_stdout=heard.append)
    assert (done.stdout, done.stderr, done.exit_code, done.error, heard) == ("b c\n", "", 0, None, ["b c\n"])
    with pytest.raises(CommandExitException) as failed:
        sandbox.commands.run("echo out; ls /none")
    assert (failed.value.exit_code, failed.value.stdout) == (1, "out\n")
    assert "/none" in failed.value.stderr
    assert "/none" in str(failed.value)
    with pytest.raises(TimeoutException):
        sandbox.commands.run("sleep 1000", timeout=0.01)
    assert sandbox.commands.list() == []


def test_commands_in_the_background(sandbox):
    handle = sandbox.commands.run("cat", background=True, stdin=True, timeout=30)
    (listed,) = sandbox.commands.list()
    assert (listed.pid, listed.cmd, listed.args) == (handle.pid, "sh", ["-c", "cat"])
    handle.send_stdin("a")
    assert next(iter(handle)) == ("a", None, None)
    handle.disconnect()
    sandbox.commands.send_stdin(handle.pid, b"b")
    again = sandbox.commands.connect(handle.pid, timeout=30)
    sandbox.commands.close_stdin(handle.pid)
    assert again.wait().stdout == "ab"
    assert again.exit_code == 0
    assert again.kill() is False
    with pytest.raises(NotFoundException):
        sandbox.commands.connect(handle.pid)
    endless = sandbox.commands.run("sleep 1000", background=True, timeout=0)
    assert sandbox.commands.kill(endless.pid) is True
    with pytest.raises(CommandExitException) as killed:
        endless.wait()
    assert killed.value.exit_code == 137
    assert sandbox.commands.kill(endless.pid) is False


def test_files(sandbox):
    written = sandbox.files.write("a/b.txt", "text")
    assert (written.name, written.path, written.type) == ("b.txt", "/root/a/b.txt", FileType.FILE)
    sandbox.files.write_files([{"path": "/root/a/c", "data": b"\xff"}, {"path": "/root/a/d", "data": io.BytesIO(b"d")}])
    assert sandbox.files.read("/root/a/b.txt") == "text"
    assert sandbox.files.read("a/c", format="bytes") == bytearray(b"\xff")
    assert b"".join(sandbox.files.read("a/d", format="stream")) == b"d"
    assert [one.name for one in sandbox.files.list("/root/a")] == ["b.txt", "c", "d"]
    found = sandbox.files.get_info("a/b.txt")
    assert (found.size, found.permissions) == (4, "rw-r--r--")
    assert isinstance(found.modified_time, datetime)
    assert sandbox.files.make_dir("a/new") is True
    assert sandbox.files.make_dir("a/new") is False
    assert sandbox.files.exists("a/new")
    sandbox.files.remove("a")
    for gone in (
        lambda: sandbox.files.read("a/b.txt"),
        lambda: sandbox.files.remove("a"),
        lambda: sandbox.files.list("a"),
    ):
        with pytest.raises(FileNotFoundException):
            gone()
    with pytest.raises(InvalidArgumentException):
        sandbox.files.read("/root", format="pictures")


def test_a_watched_folder(sandbox):
    sandbox.files.write("w/old", "1")
    watch = sandbox.files.watch_dir("w", recursive=True)
    sandbox.files.write("w/old", "22")
    sandbox.files.write("w/sub/new", "1")
    events = {(one.name, one.type) for one in watch.get_new_events()}
    assert events == {
        ("old", FilesystemEventType.WRITE), ("sub", FilesystemEventType.CREATE), ("sub/new", FilesystemEventType.CREATE)
    }  # fmt: skip
    watch.stop()
    assert watch.get_new_events() == []


def test_pause_and_connect(sandbox, client):
    ident = sandbox.sandbox_id
    sandbox.files.write("kept", "1")
    assert sandbox.is_running()
    assert sandbox.pause() is True
    assert sandbox.pause() is False
    assert not sandbox.is_running()
    again = Sandbox.connect(ident, client=client)
    assert again.files.read("kept") == "1"
    assert again.commands.run("echo $A").stdout == "b\n"  # what `create` was given holds for who connects
    assert sandbox.connect() is sandbox
    assert sandbox.resume() is sandbox
    sandbox.set_timeout(60)
    assert sandbox.get_host(80).startswith("127.0.0.1:")
    with pytest.raises(NotFoundException):
        sandbox.get_host(81)


def test_snapshots_are_templates_and_forks_are_copies(sandbox, client):
    sandbox.files.write("kept", "1")
    made = sandbox.create_snapshot("mine:v1")
    for template in (made.snapshot_id, "mine:v1"):
        with Sandbox.create(template, client=client) as copy:
            assert copy.files.read("kept") == "1"
    for child in sandbox.fork(count=2):
        with child:
            assert child.files.read("kept") == "1"
    with pytest.raises(SandboxNotFoundException, match="snp_nothing"):
        Sandbox.create("snp_nothing", client=client)


def test_listing_and_ending(sandbox, client):
    assert sandbox.get_info().metadata == {"team": "x"}
    assert Sandbox.get_info(sandbox.sandbox_id, client=client).template_id == "base"
    with Sandbox.create(client=client) as other:
        pages = Sandbox.list(limit=1, client=client)
        found = []
        while pages.has_next:
            found += pages.next_items()
        assert {one.sandbox_id for one in found} >= {sandbox.sandbox_id, other.sandbox_id}
        mine = Sandbox.list({"metadata": {"team": "x"}, "state": ["running"]}, client=client).next_items()
        assert [one.sandbox_id for one in mine] == [sandbox.sandbox_id]
        assert Sandbox.kill(other.sandbox_id, client=client) is True
        assert other.kill() is False
    with pytest.raises(SandboxNotFoundException):
        Sandbox.connect("mch_nothing", client=client)
    with pytest.raises(SandboxException):
        Sandbox.create("base", envs={"A": "b"}, ports=[70000], client=client)


class Runner:
    """The runner as it runs in a machine, here as a child process."""

    def __init__(self):
        script = Path(code_runner.__file__)
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code, **more):
        self.process.stdin.write(json.dumps({"id": "1", "code": code, **more}) + "\n")
        self.process.stdin.flush()
        answers = []
        while not answers or answers[-1]["t"] != "end":
            answers.append(json.loads(self.process.stdout.readline()))
        return [(one.pop("t"), one.pop("id") and one) for one in answers[:-1]]


@pytest.fixture
def runner():
    one = Runner()
    yield one
    with one.process:
        one.process.kill()


def test_the_runner_keeps_names_and_tells_values(runner):
    assert runner.run("x = 20\nx + 1") == [("result", {"text": "21"})]
    assert runner.run("import sys\nprint('a', x)\nsys.stderr.write('b')\nNone") == [
        ("stdout", {"text": "a 20\n"}), ("stderr", {"text": "b"})
    ]  # fmt: skip
    assert runner.run("") == []
    assert runner.run("import os; os.environ['A']", envs={"A": "b"}) == [("result", {"text": "'b'"})]


def test_the_runner_survives_what_the_code_does(runner):
    ((kind, error),) = runner.run("1 / 0")
    assert (kind, error["name"], error["value"]) == ("error", "ZeroDivisionError", "division by zero")
    assert "<cell>" in error["traceback"]
    assert runner.run("def")[0][1]["name"] == "SyntaxError"
    assert runner.run("raise SystemExit(3)")[0][1]["name"] == "SystemExit"
    assert runner.run('import os; os.write(1, b\'{"id": "1", "t": "end"}\\n\'); \'still here\'') == [
        ("result", {"text": "'still here'"})
    ]


def test_the_runner_shows_a_value_in_its_forms(runner):
    ((_, shown),) = runner.run(
        "class P:\n  def _repr_html_(self): return '<b>'\n  def _repr_png_(self): return b'x'\nP()"
    )
    assert (shown["html"], shown["png"]) == ("<b>", "eA==")
