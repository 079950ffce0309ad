"""What a user sees and does when a memory is gone, a row is damaged: the command line against a real server."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from tests.e2e.test_cli_fake import envelope, recess

__all__ = ["recess"]


def test_a_killed_machine_comes_back_with_its_files(recess):
    machine = recess("run", "-d", "--name", "dev", "base").stdout.decode().strip()
    recess("exec", "dev", "sh", "-c", "echo kept > /root/f; echo gone > /dev/shm/f")
    recess("snapshot", "dev", "old:v1")
    recess("exec", "dev", "sh", "-c", "echo newer > /root/f")
    recess("kill", "dev")
    said = recess("resume", "--disk", machine).stderr.decode()
    assert "rung 4" in said
    assert "memory and processes are gone" in said
    assert recess("exec", "dev", "cat", "/root/f").stdout == b"newer\n"
    recess("exec", "dev", "cat", "/dev/shm/f", expect=1)
    recess("kill", "dev")
    assert "rung 2" in recess("resume", machine).stderr.decode()
    assert recess("exec", "dev", "cat", "/root/f", "/dev/shm/f").stdout == b"kept\ngone\n"
    recess("resume", "dev", expect=1)


def test_a_damaged_row_is_shown_and_given_up(recess):
    bad = recess("run", "-d", "--name", "bad", "base").stdout.decode().strip()
    good = recess("run", "-d", "--name", "good", "base").stdout.decode().strip()
    recess("suspend", "bad", "good")
    recess("down")
    database = Path(recess.env["RECESS_HOME"]) / "recess.db"
    with sqlite3.connect(database) as db:
        db.execute("UPDATE catalog_machine SET spec = '{not json' WHERE id = ?", (bad,))
    db.close()
    shown = recess("ps")
    assert b"damaged" in shown.stdout
    assert f"rm --force {bad}" in shown.stderr.decode()
    rows = {row["id"]: row for row in envelope(recess("ps", "-a", "--json"))["data"]}
    assert (rows[bad]["state"], rows[good]["state"]) == ("damaged", "suspended")
    assert bad in rows[bad]["meta"]["hint"]
    recess("inspect", "bad", expect=1)
    recess("resume", "good")
    said = recess("rm", "--force", bad).stderr.decode()
    folder = Path(said.strip().rsplit(" ", 1)[1])
    assert json.loads((folder / "row.json").read_text())["spec"] == "{not json"
    assert list({row["id"] for row in envelope(recess("ps", "-a", "--json"))["data"]}) == [good]
