"""What opening a session and appending to it read, counted in rows: the same for one of 20 turns and one of 2,000."""

import pytest

from recess.contextlog import SCHEMA, Draft, MemoryBodies, SqlLog
from recess.db import Database
from recess.db.sqlite import SqliteTx


async def lived(log, turns):
    """A session of so many turns, compacted behind all but its last five."""
    row = await log.claim((await log.create(agent="a", code_version="v")).id, "n", 1e9, now=0.0)
    drafts = [Draft("system", {"text": "be kind"})]
    for turn in range(1, turns + 1):
        drafts.append(Draft("turn.start", {"inbox": 1, "attempt": 1}, turn=turn))
        drafts.append(Draft("assistant", {"text": f"t{turn}", "part": 0}, turn=turn, key=f"t{turn}/p0"))
        drafts.append(Draft("turn.end", {"status": "done"}, turn=turn, key=f"t{turn}/end"))
    for first in range(0, len(drafts), 600):
        await log.append(row.id, row.epoch, drafts[first : first + 600])
    await log.append(row.id, row.epoch, [Draft("compact", {"summary": "so far", "to": len(drafts) - 15})])
    return row


async def rows_of(monkeypatch, work):
    """Return how many rows were read while this was done."""
    counted = []

    def counting(plain):
        def run(self, sql, params=()):
            found = plain(self, sql, params)
            counted.append(len(found) if isinstance(found, list) else found is not None)
            return found

        return run

    with monkeypatch.context() as patch:
        for name in ("execute", "one"):
            patch.setattr(SqliteTx, name, counting(getattr(SqliteTx, name)))
        await work
    return sum(counted)


@pytest.mark.parametrize("what", ["open", "append"])
async def test_a_long_past_is_not_read(tmp_path, monkeypatch, what):
    db = Database.open(tmp_path / "log.db", [SCHEMA])
    log = SqlLog(db, MemoryBodies())
    found = []
    for turns in (20, 2000):
        row = await lived(log, turns)
        assert (await log.get(row.id)).head == 3 * turns + 2
        note = [Draft("note", {"text": "x"}, key="k")]
        found.append(
            await rows_of(monkeypatch, log.tail(row.id) if what == "open" else log.append(row.id, row.epoch, note))
        )
    await db.close()
    assert found[0] > 0
    assert found[0] == found[1]
