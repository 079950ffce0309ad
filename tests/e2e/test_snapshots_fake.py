"""The life of snapshots on the command line, against a real local server on the fake driver."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture
def recess(tmp_path):
    env = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "RECESS_HOME": str(tmp_path / "home"), "RECESS_DRIVER": "fake",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip

    def run(*args, expect=0):
        done = subprocess.run(
            [sys.executable, "-m", "recess.cli.main", *args], capture_output=True, env=env, timeout=60, text=True
        )
        assert expect is None or done.returncode == expect, (args, done.returncode, done.stdout, done.stderr)
        return done

    yield run
    run("down", "--all", expect=None)


def data(done):
    return json.loads(done.stdout)["data"]


def test_names_tree_diff_and_what_goes(recess):
    recess("run", "-d", "--name", "dev", "base", "sleep", "1000")
    one = recess("snapshot", "dev", "base:v1").stdout.strip()
    recess("exec", "dev", "sh", "-c", "echo x > /root/new")
    two = recess("snapshot", "dev", "base:v2", "--ttl", "2h").stdout.strip()
    listed = recess("snapshots", "ls").stdout
    assert "base:v2, base" in listed
    assert listed.count("yes") == 2
    assert data(recess("snapshots", "inspect", "base", "--json"))["id"] == two
    tree = recess("snapshots", "tree").stdout.splitlines()
    assert tree[0].endswith(")")
    assert "template of base" in tree[0]
    assert "└─" in tree[1]
    assert "<- machine dev" in tree[2]
    assert "+ file /root/new" in recess("snapshots", "diff", "base:v1", "base:v2").stdout.splitlines()
    assert recess("snapshots", "verify", "--restore", "base").stdout.count("\n") == 2

    done = recess("snapshots", "tag", one, "base")
    assert two[:16] in done.stderr
    assert data(recess("snapshots", "inspect", "base", "--json"))["id"] == one
    recess("snapshots", "untag", "base:v1")
    assert "no such name" in recess("snapshots", "untag", "base:v1", expect=1).stderr

    recess("suspend", "dev")
    held = recess("snapshots", "rm", "--force", data(recess("inspect", "dev", "--json"))["snapshot"], expect=1)
    assert "needed by machine dev" in held.stderr
    recess("resume", "dev")
    for _ in range(3):
        recess("snapshot", "dev", "--keep-last", "2")
    rows = data(recess("snapshots", "ls", "--json"))
    assert len([row for row in rows if not row["names"]]) == 2
    assert {one, two} <= {row["id"] for row in rows}
    would = recess("snapshots", "prune", "--all", "--older-than", "0s", "--keep-last", "1", "--dry-run")
    gone = data(recess("snapshots", "prune", "--all", "--older-than", "0s", "--keep-last", "1", "--json"))
    assert [line.split()[0] for line in would.stdout.splitlines()] == [row["id"][:16] for row in gone["removed"]]
    assert len(gone["removed"]) == 1
    assert gone["bytes"] > 0
    assert recess("snapshots", "rm", "--force", "base:v2", "nothing", expect=1).stdout == "base:v2\n"
    assert recess("snapshots", "prune", "--ttl", "x", expect=2).stdout == ""
