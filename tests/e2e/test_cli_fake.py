"""The command line against a real local server on the fake driver: verbs, exit codes, envelopes, errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recess.config import load_config
from recess.errors import all_errors


@pytest.fixture
def recess(tmp_path):
    env = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "RECESS_HOME": str(tmp_path / "home"), "RECESS_DRIVER": "fake",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip

    def run(*args, stdin=b"", expect=0):
        done = subprocess.run(
            [sys.executable, "-m", "recess.cli.main", *args], input=stdin, capture_output=True, env=env, timeout=60
        )
        if expect is not None:
            assert done.returncode == expect, (args, done.returncode, done.stdout, done.stderr)
        return done

    run.env = env
    yield run
    run("down", "--all", expect=None)
    shutil.rmtree(load_config({}, home=env["RECESS_HOME"]).run_dir, ignore_errors=True)


def envelope(done):
    return json.loads(done.stdout)


def test_a_day_of_a_machine(recess):
    assert recess("run", "-d", "--name", "dev", "base").stdout.startswith(b"mch_")
    assert recess("exec", "dev", "echo", "hello").stdout == b"hello\n"
    recess("exec", "dev", "sh", "-c", "exit 3", expect=3)
    snapshot = recess("snapshot", "dev", "base:v1").stdout.strip().decode()
    assert snapshot.startswith("snp_")
    report = envelope(recess("restore", "base:v1", "--name", "dev2", "--json"))
    assert report["data"]["resume"]["rung"] == 2
    assert len(recess("fork", "dev", "-n", "3", "-q").stdout.split()) == 3
    rows = envelope(recess("ps", "--json"))["data"]
    assert len(rows) == 5
    assert {r["state"] for r in rows} == {"running"}
    recess("suspend", "dev")
    recess("exec", "dev", "true", expect=1)
    recess("resume", "dev")
    assert recess("exec", "dev", "echo", "back").stdout == b"back\n"
    recess("rm", "dev", expect=1)
    recess("rm", "-f", "dev", "dev2")
    recess("snapshots", "verify", "base:v1")


def test_run_passes_output_and_exit_code_through(recess):
    assert recess("run", "--rm", "base", "echo", "hi").stdout == b"hi\n"
    recess("run", "--rm", "base", "sh", "-c", "exit 7", expect=7)
    assert recess("ps", "-aq").stdout == b""
    recess("run", "--rm", "base", "no-such-program", expect=127)
    recess("run", "-d", "--name", "dev", "base")
    recess("exec", "dev", "no-such-program", expect=127)


@pytest.mark.parametrize(
    ("args", "code", "error"),
    [
        (("exec", "nobody", "true"), 1, "not_found"),
        (("inspect", "nobody"), 1, "not_found"),
        (("session", "send", "nobody", "hi"), 1, "not_found"),
        (("session", "start", "nobody"), 1, "not_found"),
        (("restore", "nothing"), 1, "not_found"),
        (("run", "-p", "nonsense", "base"), 2, "bad_input"),
        (("run", "-m", "lots", "base"), 2, "bad_input"),
        (("run", "--name", "../x", "base"), 2, "bad_input"),
        (("run", "--bogus", "base"), 2, "usage"),
        (("frobnicate",), 2, "usage"),
        (("cp", "/no/such/file", "dev:/x"), 2, "bad_input"),
        (("deploy", "/no/such/agent.py", "--name", "a"), 2, "bad_input"),
    ],
)
def test_bad_input_is_one_typed_line(recess, args, code, error):
    done = recess("--json", *args, expect=code)
    body = envelope(done)
    assert (body["ok"], body["exit_code"], body["error"]["code"]) == (False, code, error)
    text = recess(*args, expect=code).stderr.decode()
    assert "recess: " in text
    assert "Traceback" not in text


@pytest.mark.parametrize("args", [(), ("session",), ("snapshots",)])
def test_asked_for_nothing_it_shows_what_there_is(recess, args):
    done = recess(*args)
    assert b"Usage: recess" in done.stdout
    assert b"Commands:" in done.stdout
    assert done.stderr == b""


def test_a_hint_names_a_command_that_exists(recess):
    assert b"hint: recess --help" in recess("frobnicate", expect=2).stderr
    assert b"hint: recess session start --help" in recess("session", "start", expect=2).stderr


def test_published_ports_are_listed_while_they_are_open(recess):
    recess("run", "-d", "--name", "dev", "-p", "80", "base")
    ((address, port, guest),) = envelope(recess("ps", "--json"))["data"][0]["meta"]["ports"]
    assert f"{address}:{port}->{guest}" in recess("ps").stdout.decode()
    recess("suspend", "dev")
    assert f":{port}->" not in recess("ps", "-a").stdout.decode()


def test_guest_options_are_the_guests(recess):
    assert recess("run", "--rm", "base", "echo", "-n", "--json", "-q").stdout == b"--json -q"


def test_one_of_several_fails(recess):
    recess("run", "-d", "--name", "dev", "base")
    body = envelope(recess("--json", "kill", "nobody", "dev", expect=1))
    assert (body["ok"], body["exit_code"], body["error"]["code"]) == (False, 1, "not_found")
    assert [("error" in one, one["ref"]) for one in body["error"]["details"]["results"]] == [
        (True, "nobody"),
        (False, "dev"),
    ]
    assert recess("rm", "nobody", "dev", expect=1).stdout == b"dev\n"


def test_an_agent_is_called_as_its_function_is(recess, tmp_path):
    folder = tmp_path / "code"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "index").write_bytes(b"\xff\xfe")
    source = folder / "agent.py"
    source.write_text("from recess_agent import agent\n\n@agent(image='base')\nasync def helper(s):\n    pass\n")
    assert recess("deploy", str(source)).stdout.startswith(b"helper@")
    assert recess("deploy", str(source), "--name", "other").stdout.startswith(b"other@")
    assert recess("deploy", str(folder)).stdout.startswith(b"helper@")
    source.write_text("import os\n")
    body = envelope(recess("deploy", str(source), "--json", expect=2))
    assert body["error"]["message"] == "agent.py declares no agent"
    source.write_text("def (:\n")
    assert envelope(recess("deploy", str(source), "--json", expect=2))["error"]["code"] == "bad_input"


def test_a_name_in_use(recess):
    recess("run", "-d", "--name", "dev", "base")
    done = recess("--json", "run", "-d", "--name", "dev", "base", expect=125)
    assert envelope(done)["error"]["code"] == "name_in_use"


def test_two_servers_on_one_home_are_refused(recess):
    recess("ps")
    done = recess("--json", "up", expect=1)
    assert envelope(done)["error"]["code"] == "home_locked"
    recess("ps")


def test_machines_are_put_away_and_come_back_over_a_restart(recess):
    recess("run", "-d", "--name", "dev", "base")
    recess("down", "--all")
    assert envelope(recess("ps", "-a", "--json"))["data"][0]["state"] == "suspended"
    recess("resume", "dev")
    recess("exec", "dev", "true")


def test_down_returns_when_the_server_has_ended_and_nothing_runs(recess, tmp_path):
    recess("run", "-d", "--name", "dev", "base", "sleep", "1000")
    (pid,) = (tmp_path / "home" / "server.lock").read_text().split()
    recess("down", "--all")
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        state = "gone"
    assert state in ("gone", "Z")  # a zombie is its parent's business


def test_a_machine_is_created_started_waited_for_and_started_again(recess):
    created = recess("create", "--name", "job", "-e", "WHO=you", "base", "sh", "-c", "echo hi $WHO; exit 3")
    assert created.stdout.startswith(b"mch_")
    assert recess("ps", "-q").stdout == b""
    assert recess("ps", "-a", "--format", "{{.Names}} {{.Status}}").stdout == b"job Created\n"
    recess("start", "-a", "job", expect=3)
    assert recess("wait", "job").stdout == b"3\n"
    assert recess("logs", "job").stdout == b"hi you\n"
    again = recess("start", "-a", "job", expect=3)
    assert again.stdout == b"hi you\n"
    assert b"rung 4" in again.stderr
    assert recess("logs", "--tail", "1", "job").stdout == b"hi you\n"
    assert recess("logs", "job").stdout == b"hi you\n" * 2
    assert recess("logs", "--since", "1h", "-n", "1", "job").stdout == b"hi you\n"
    assert recess("logs", "--until", "2001-01-01T00:00:00Z", "job").stdout == b""
    stamps = [line.split(b" ", 1) for line in recess("logs", "-t", "job").stdout.splitlines()]
    assert [text for _, text in stamps] == [b"hi you"] * 2
    assert all(at.endswith(b"Z") and at > b"2026" for at, _ in stamps)
    recess("rename", "job", "task")
    assert recess("ps", "-a", "-f", "exited=3", "--format", "{{.Names}}").stdout == b"task\n"
    assert recess("prune", "-f", "--caches").stdout.startswith(b"mch_")
    assert envelope(recess("prune", "--json", expect=2))["error"]["code"] == "bad_input"
    assert recess("ps", "-aq").stdout == b""


def test_events_tell_what_happened(recess):
    recess("run", "--rm", "--name", "one", "base", "sh", "-c", "exit 2", expect=2)
    lines = recess("events", "--since", "1h", "--until", "0s", "--json").stdout.splitlines()
    assert lines == []
    lines = recess("events", "--since", "1h", "--until", "1s", "-f", "machine=one", "--json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["action"] for event in events][:3] == ["create", "start", "die"]
    assert events[2]["details"] == {"exit_code": 2}


def test_rewind_restore_with_other_settings_and_fork_counts(recess):
    recess("run", "-d", "--name", "dev", "-e", "A=1", "base")
    recess("snapshot", "dev", "first")
    recess("exec", "dev", "sh", "-c", "echo now > /root/state")
    recess("rewind", "dev", "first")
    recess("exec", "dev", "cat", "/root/state", expect=1)
    recess("restore", "first", "--name", "copy", "-e", "A=2", "-l", "team=x")
    assert recess("exec", "copy", "sh", "-c", "echo $A").stdout == b"2\n"
    assert recess("ps", "-f", "label=team=x", "--format", "{{.Names}}").stdout == b"copy\n"
    assert b"-3 is not in the range" in recess("fork", "-n", "-3", "dev", expect=2).stderr
    assert len(recess("fork", "dev").stdout.split()) == 1
    assert recess("fork", "--name", "kid1", "--name", "kid2", "dev").stdout.count(b"mch_") == 2


def test_what_takes_space_and_where_ports_are(recess):
    recess("run", "-d", "--name", "dev", "-p", "80", "base")
    kinds = {row["kind"]: row for row in envelope(recess("df", "--json"))["data"]["kinds"]}
    assert kinds["machines"]["count"] == 1
    where = recess("port", "dev", "80").stdout.decode().strip()
    assert recess("port", "dev").stdout.decode() == f"80/tcp -> {where}\n"
    recess("port", "dev", "81", expect=1)
    assert recess("stats", "--no-stream", "--format", "{{.name}}").stdout == b"dev\n"
    for shell in ("bash", "zsh", "fish"):
        assert b"_RECESS_COMPLETE" in recess("completion", shell).stdout
    assert envelope(recess("--json", "ps", "--format", "json", expect=2))["error"]["code"] == "bad_input"


def test_a_shell_completes_names_of_what_is_there(recess, tmp_path):
    recess("run", "-d", "--name", "web", "base")
    (tmp_path / "complete").write_bytes(recess("completion", "bash").stdout)
    command = Path(sys.executable).with_name("recess")
    for words, offered in (("exec we", "web"), ("volume cre", "create"), ("logs w", "web")):
        script = f"""source {tmp_path}/complete
COMP_WORDS=(recess {words}); COMP_CWORD=2; _recess_completion {command}; echo "${{COMPREPLY[@]}}"
"""
        done = subprocess.run(["bash", "-c", script], env=recess.env, capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.stderr) == (f"{offered}\n", "")


def test_a_suspended_machine_is_followed_until_it_is_back(recess):
    recess("run", "-d", "--name", "dev", "base", "sh", "-c", "echo one; sleep 1000")
    command = [sys.executable, "-m", "recess.cli.main", "attach", "dev"]
    with subprocess.Popen(command, env=recess.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as attached:
        assert attached.stdout.readline() == b"one\n"
        recess("suspend", "dev")
        assert b"is suspended" in attached.stderr.readline()
        recess("resume", "dev")
        recess("stop", "dev")
        rest = attached.stdout.read()
        assert attached.wait(timeout=30) == 143
    assert rest == b""  # nothing is shown twice


def test_files_and_folders_are_copied_by_dockers_rules(recess, tmp_path):
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "f").write_text("one")
    (tree / "l").symlink_to("deep/f")
    recess("run", "-d", "--name", "dev", "base")
    recess("cp", str(tree), "dev:/srv/new")  # made: /srv is not there
    assert recess("exec", "dev", "cat", "/srv/new/deep/f").stdout == b"one"
    recess("cp", str(tree), "dev:/srv/new")  # there: below it
    assert recess("exec", "dev", "cat", "/srv/new/tree/l").stdout == b"one"
    recess("cp", f"{tree}/.", "dev:/root")
    recess("cp", str(tree / "deep" / "f"), "dev:/root/deep/g")
    assert recess("exec", "dev", "cat", "/root/deep/g").stdout == b"one"
    out = tmp_path / "out"
    recess("cp", "dev:/srv/new", str(out))
    assert (out / "tree" / "deep" / "f").read_text() == "one"
    assert (out / "l").is_symlink()
    recess("cp", "dev:/root/deep/.", str(out))
    assert (out / "g").read_text() == "one"
    recess("cp", "dev:/root/deep/g", str(tmp_path / "g2"))
    assert (tmp_path / "g2").read_text() == "one"
    tar = recess("cp", "dev:/root/deep", "-").stdout
    recess("cp", "-", "dev:/data", stdin=tar, expect=1)  # a tar goes into a folder that is there
    recess("exec", "dev", "mkdir", "/data")
    recess("cp", "-", "dev:/data", stdin=tar)
    assert recess("exec", "dev", "cat", "/data/deep/g").stdout == b"one"
    recess("cp", "dev:/none", str(tmp_path), expect=1)
    recess("cp", "dev:/root/deep/g", str(tmp_path / "no" / "g"), expect=2)
    assert b"srv/new/tree/deep/f" in recess("export", "dev").stdout


def test_every_error_is_listed_without_a_server(recess, tmp_path):
    listed = recess("errors", "-q").stdout.decode().split()
    assert listed == [cls.code for cls in all_errors()]
    assert not (tmp_path / "home" / "server.lock").exists()


def test_volumes(recess, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "in").write_text("hello")
    script = "cat /w/in; echo made > /w/out; echo kept > /c/x"
    args = ("--rm", "-v", f"{folder}:/w", "--mount", "type=volume,src=cache,dst=/c", "base", "sh", "-c", script)
    assert recess("run", *args).stdout == b"hello"
    assert (folder / "out").read_text() == "made\n"
    recess("run", "-d", "--name", "dev", "-v", "cache:/c", "base")
    assert recess("exec", "dev", "cat", "/c/x").stdout == b"kept\n"
    assert envelope(recess("volume", "inspect", "cache", "--json"))["data"]["machines"] == ["dev"]
    recess("volume", "rm", "cache", expect=1)
    recess("exec", "dev", "sh", "-c", "echo more > /c/y")
    (done,) = envelope(recess("sync", "dev", "--json"))["data"]
    assert done["result"]["volumes"][0]["copied_out"] == 1
    recess("rm", "-f", "dev")
    assert recess("volume", "ls", "-q").stdout == b"cache\n"
    recess("volume", "prune", "-f")
    assert recess("volume", "ls", "-q").stdout == b""
    for bad in ("/only", "a:b:c:d", f"{folder}:/w:what"):
        assert envelope(recess("run", "--json", "-v", bad, "base", expect=2))["error"]["code"] == "bad_input"
    missing = envelope(recess("run", "--json", "-v", f"{folder}/none:/w", "base", "true", expect=125))
    assert missing["error"]["hint"].startswith("mkdir")


def test_a_key_makes_one_machine_over_restarts_too(recess):
    recess("run", "-d", "--key", "job-1", "--name", "dev", "base")
    recess("snapshot", "dev", "frozen")
    first = recess("run", "-d", "--key", "job-1", "--name", "dev", "base").stdout
    recess("down")
    assert recess("run", "-d", "--key", "job-1", "--name", "dev", "base").stdout == first
    other = envelope(recess("run", "--json", "-d", "--key", "job-1", "--name", "other", "base", expect=125))
    assert other["error"]["code"] == "key_reused"
    copy = recess("restore", "frozen", "--key", "r1").stdout
    recess("down")
    assert recess("restore", "frozen", "--key", "r1").stdout == copy
    assert len(recess("ps", "-aq").stdout.split()) == 2


def test_contexts(recess, tmp_path):
    recess("run", "-d", "--name", "here", "base")
    recess("context", "create", "lab", "--home", str(tmp_path / "lab"))
    try:
        assert recess("--context", "lab", "ps", "-q").stdout == b""
        recess("--context", "lab", "run", "-d", "--name", "there", "base")
        assert envelope(recess("--context=lab", "ps", "--json"))["data"][0]["name"] == "there"
        assert envelope(recess("ps", "--json"))["data"][0]["name"] == "here"
        rows = envelope(recess("context", "ls", "--json"))["data"]
        assert [(one["name"], one["current"]) for one in rows] == [("default", True), ("lab", False)]
    finally:
        recess("--context", "lab", "down", "--all", expect=None)
        shutil.rmtree(load_config({}, home=str(tmp_path / "lab")).run_dir, ignore_errors=True)
    recess("context", "create", "far", "--url", "http://127.0.0.1:1", "--token-file", "-", stdin=b"secret\n")
    shown = recess("context", "show", "far")
    assert b"secret" not in shown.stdout
    assert envelope(recess("--context", "far", "ps", "--json", expect=1))["error"]["code"] == "server_unavailable"
    recess("context", "rm", "far")
    assert envelope(recess("--context", "far", "ps", "--json", expect=1))["error"]["code"] == "not_found"
