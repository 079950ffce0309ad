"""A writer that is killed without warning: what was acknowledged is there, whole; what was not is there whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from recess.contextlog import SCHEMA, DirectoryBodies, Draft, SqlLog
from recess.db import Database

WRITER = Path(__file__).parent / "log_writer.py"


@pytest.mark.parametrize("lines", [1, 40, 173])
async def test_sigkill_loses_nothing_acknowledged(tmp_path, lines):
    with subprocess.Popen([sys.executable, WRITER, tmp_path], stdout=subprocess.PIPE, text=True) as writer:
        said = [writer.stdout.readline().split() for _ in range(lines)]
        writer.kill()
        said += [line.split() for line in writer.stdout.read().splitlines() if len(line.split()) == 3]
    db = Database.open(tmp_path / "recess.db", [SCHEMA])
    log = SqlLog(db, DirectoryBodies(tmp_path / "bodies"))
    entries = await log.read("ses_1", limit=10_000)
    by_position = {e.position: e for e in entries}
    assert [e.position for e in entries] == list(range(1, len(entries) + 1))
    assert (await log.get("ses_1")).head == len(entries)
    for kind, number, what in said:
        if kind == "inbox":
            entry = by_position[int(number)]
            assert entry.key == what
            assert entry.body["text"].startswith(f"{what} ")
        elif kind == "pair":
            assert by_position[int(number)].body["part"] == int(what)
            assert by_position[int(number) + 1].body == {"pair": int(what)}
    replies = [e.body["part"] for e in entries if e.kind == "assistant"]
    assert replies == [e.body["pair"] for e in entries if e.kind == "note"]
    # A process that dies takes no relaxed write with it: the last acknowledged delta is there unless its reply landed.
    streamed = max((int(n) for kind, n, _ in said if kind == "delta"), default=-1)
    assert streamed in replies or streamed in {d.part for d in await log.deltas("ses_1")} or streamed == -1
    # The next owner goes on where the dead one stopped.
    row = await log.claim("ses_1", "n2", 5.0, now=0.0, force=True)
    assert (await log.append("ses_1", row.epoch, [Draft("note", {})]))[0].position == len(entries) + 1
    await db.close()
