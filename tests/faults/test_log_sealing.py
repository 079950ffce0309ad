"""Sealing: a crash at any point, a damaged or missing segment, two at once; the sweep takes what nobody names and no more."""

import asyncio
import subprocess

import pytest

from recess.blobs import LocalBlobs
from recess.contextlog import SCHEMA, DirectoryBodies, Draft, LogKeeper, Sealing, SqlLog
from recess.contextlog.sealing import Swept
from recess.contextlog.transcript import messages
from recess.crashpoints import Crashed
from recess.db import Database
from recess.errors import Corrupt
from recess.testing.crash import arm

SMALL = Sealing(entries=10, keep=5, closed_min=3)
BIG = "y" * 20_000


class Opened:
    """A log, its keeper and their stores."""

    def __init__(self, where, folder):
        self.folder = folder
        self.db = Database.open(where, [SCHEMA])
        self.blobs = LocalBlobs(folder / "blobs")
        self.log = SqlLog(self.db, DirectoryBodies(folder / "bodies"), blobs=self.blobs)
        self.keeper = LogKeeper(self.log, sealing=SMALL)

    async def close(self):
        self.keeper.close()
        await self.db.close()

    def segments(self):
        return sorted(info.key for info in self.blobs.list_blobs("log/"))

    async def rows(self):
        return await self.db.read(lambda tx: tx.one("SELECT count(*) AS n FROM log_entry")["n"])

    async def session(self, count, **create):
        row = await self.log.create(agent="a", code_version="v", **create)
        row = await self.log.claim(row.id, "n", 1e12, now=0.0)
        await self.log.append(row.id, row.epoch, [entry(i) for i in range(1, count + 1)])
        return row


def entry(i):
    return Draft("note", {"i": i, "text": BIG if i % 9 == 0 else "x"}, key=f"k{i}")


@pytest.fixture(params=["sqlite", "postgres"])
def where(request, tmp_path):
    return tmp_path / "recess.db" if request.param == "sqlite" else request.getfixturevalue("postgres").database()


@pytest.fixture
async def opened(where, tmp_path):
    one = Opened(where, tmp_path)
    yield one
    await one.close()


async def numbers(log, session, **how):
    return [e.body["i"] for e in await log.read(session, **how)]


async def test_old_entries_leave_the_table_and_are_read_as_before(opened):
    row = await opened.session(48)
    before = await opened.log.read(row.id)
    assert await opened.keeper.seal(row.id) == 4
    assert await opened.rows() == 8
    assert len(opened.segments()) == 4
    assert await opened.keeper.seal(row.id) == 0
    assert await opened.log.read(row.id) == before
    for after, limit in ((0, 1), (9, 3), (10, 30), (38, 5), (40, 100), (47, 1), (48, 5)):
        assert await opened.log.read(row.id, after=after, limit=limit) == before[after : after + limit]
    assert await numbers(opened.log, row.id, after=7, max_bytes=21_000) == [8, 9, 10, 11, 12, 13, 14, 15, 16, 17]
    known = await opened.log.append(row.id, row.epoch, [entry(3), entry(49)])  # keys outlive their rows
    assert [(a.position, a.replayed) for a in known] == [(3, True), (49, False)]
    child = await opened.log.fork(row.id, at=25)
    assert await numbers(opened.log, child.id) == list(range(1, 26))


async def test_a_segment_is_a_file_that_zstd_prints(opened):
    row = await opened.session(16)
    assert await opened.keeper.seal(row.id) == 1
    (key,) = opened.segments()
    printed = subprocess.run(["zstd", "-dc", opened.folder / "blobs" / key], capture_output=True, check=True).stdout
    lines = printed.decode().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith('[1,"note",0,"","k1",1,"v",')
    assert lines[0].endswith(',"",{"i":1,"text":"x"}]')
    assert lines[8].endswith(",null]")  # its body is in the body store


async def test_a_child_reads_through_its_parents_segments_and_is_sealed_itself(opened):
    row = await opened.session(30)
    child = await opened.log.fork(row.id, at=22)
    await opened.keeper.seal(row.id)
    child = await opened.log.claim(child.id, "n", 1e12, now=0.0)
    await opened.log.append(child.id, child.epoch, [entry(i) for i in range(100, 120)])
    assert await opened.keeper.seal(child.id) == 1
    expected = [*range(1, 23), *range(100, 120)]
    assert await numbers(opened.log, child.id) == expected
    grandchild = await opened.log.fork(child.id, at=27)
    assert await numbers(opened.log, grandchild.id) == expected[:27]
    assert await numbers(opened.log, grandchild.id, after=15, limit=9) == expected[15:24]


async def test_a_message_that_is_sealed_unread_still_cancels_a_freeze(opened):
    """A fork may inherit messages that its parent's segments hold and that it has not begun."""
    log = opened.log
    row = await log.create(agent="a", code_version="v")
    row = await log.claim(row.id, "n", 1e12, now=0.0)
    await log.append_inbox(row.id, Draft("user", {"text": "one"}, key="1"))
    await log.append(row.id, row.epoch, [Draft("turn.start", {"inbox": 1, "attempt": 1}, turn=1)])
    await log.append_inbox(row.id, Draft("user", {"text": "two"}, key="2"))
    await log.append(row.id, row.epoch, [entry(i) for i in range(30)])
    assert await opened.keeper.seal(row.id) == 2
    child = await log.fork(row.id, at=20)
    assert (child.turn, child.consumed) == (1, 1)
    assert [(e.position, e.body["text"]) for e in await log.inbox_after(child.id, child.consumed)] == [(3, "two")]
    child = await log.claim(child.id, "n", 1e12, now=0.0)
    assert await log.freeze(child.id, child.epoch, consumed=1, snapshot="s", position=20) is False
    assert await log.freeze(child.id, child.epoch, consumed=3, snapshot="s", position=20) is True


async def test_a_tail_is_found_behind_sealed_marks(opened):
    log = opened.log
    row = await log.create(agent="a", code_version="v")
    row = await log.claim(row.id, "n", 1e12, now=0.0)
    await log.append(row.id, row.epoch, [Draft("system", {"text": "be kind"}), *[entry(i) for i in range(12)]])
    await log.append(row.id, row.epoch, [Draft("compact", {"summary": "much", "to": 10})])
    await log.append(row.id, row.epoch, [entry(i) for i in range(100, 120)])
    before = await log.tail(row.id)
    assert await opened.keeper.seal(row.id) == 2
    after = await log.tail(row.id)
    assert after == before
    assert [e.position for e in after] == [1, *range(11, 35)]
    assert messages(after) == messages(await log.read(row.id))


@pytest.mark.parametrize("point", ["log.before_segment_row", "log.after_segment_row", "blobs.before_link"])
async def test_a_crash_while_sealing_loses_nothing_and_leaves_only_what_is_swept(where, tmp_path, point):
    one = Opened(where, tmp_path)
    row = await one.session(48)
    before = await one.log.read(row.id)
    arm(point, skip=1)
    with pytest.raises(Crashed):
        await one.keeper.seal(row.id)
    await one.close()

    two = Opened(where, tmp_path)
    assert await two.log.read(row.id) == before
    await two.keeper.seal(row.id)
    assert await two.log.read(row.id) == before
    assert await two.rows() == 8
    assert (await two.keeper.sweep(grace_s=-60.0)).bodies == 0
    assert len(two.segments()) == 4  # what the crash left is gone
    assert await two.log.read(row.id) == before
    await two.close()


async def test_two_keepers_at_once_seal_once(opened, where, tmp_path):
    row = await opened.session(205)
    before = await opened.log.read(row.id)
    other = Opened(where, tmp_path)
    made = await asyncio.gather(*(keeper.seal(row.id) for keeper in (opened.keeper, other.keeper) * 2))
    assert sum(made) == 20
    assert await opened.rows() == 5
    assert await other.log.read(row.id) == before
    await opened.keeper.sweep(grace_s=-60.0)
    assert len(opened.segments()) == 20
    await other.close()


async def test_appends_while_sealing_have_no_gap(opened):
    row = await opened.session(100)

    async def append():
        for i in range(101, 161):
            await opened.log.append(row.id, row.epoch, [entry(i)])

    async def seal():
        while (await opened.log.get(row.id)).head < 160:
            await opened.keeper.seal(row.id)
            assert await numbers(opened.log, row.id, limit=100) == list(range(1, 101))

    await asyncio.gather(append(), seal())
    await opened.keeper.seal(row.id)
    assert await numbers(opened.log, row.id) == list(range(1, 161))
    assert await opened.rows() < 15


async def test_the_keeper_seals_by_itself_what_has_grown(opened):
    row = await opened.session(48)
    late = await opened.session(3)
    task = asyncio.create_task(opened.keeper.run())
    while await opened.rows() > 8 + 3:  # found at the start
        await opened.log.get(row.id)
    await opened.log.append(late.id, late.epoch, [entry(i) for i in range(20)])
    while await opened.rows() > 8 + 13:  # told of by its appends
        await opened.log.get(row.id)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_closed_session_is_sealed_to_its_end(opened):
    row = await opened.session(13)
    few = await opened.session(2)
    await opened.log.close(row.id)
    await opened.log.close(few.id)
    assert await opened.keeper.due() == [row.id]
    assert await opened.keeper.seal(row.id) == 2
    assert await opened.keeper.seal(few.id) == 0
    assert await opened.rows() == 2
    assert await numbers(opened.log, row.id) == list(range(1, 14))


async def test_the_sweep_takes_only_what_nobody_names(opened):
    row = await opened.session(48)
    await opened.keeper.seal(row.id)
    identity = await opened.keeper.identity()
    opened.blobs.put(f"log/{identity}/ses_gone/1-2.{'0' * 64}.00000000", b"left by a crash")
    opened.blobs.put(f"log/log_other/ses_1/1-2.{'0' * 64}", b"another log's, in the same store")
    opened.log.bodies.put(b"left by a crash, too")
    assert await opened.keeper.sweep(grace_s=3600.0) == Swept()  # too young
    assert len(opened.segments()) == 6
    swept = await opened.keeper.sweep(grace_s=-60.0)
    assert (swept.segments, swept.bodies) == (1, 1)
    assert swept.freed_bytes > 15
    assert len(opened.segments()) == 5
    assert await numbers(opened.log, row.id) == list(range(1, 49))
    assert await opened.keeper.sweep(grace_s=-60.0) == Swept()


@pytest.mark.parametrize("damage", ["flipped", "short", "gone", "another"])
async def test_a_damaged_segment_is_named_and_the_rest_can_be_read(opened, damage):
    row = await opened.session(48)
    await opened.keeper.seal(row.id)
    keys = {int(key.rpartition("/")[2].partition("-")[0]): key for key in opened.segments()}
    path = opened.folder / "blobs" / keys[11]
    data = path.read_bytes()
    path.unlink()
    if damage == "flipped":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "short":
        path.write_bytes(data[:-20])
    elif damage == "another":
        path.write_bytes((opened.folder / "blobs" / keys[21]).read_bytes())
    with pytest.raises(Corrupt, match=f"entries 11 to 20 of session {row.id}"):
        await opened.log.read(row.id)
    assert await numbers(opened.log, row.id, limit=10) == list(range(1, 11))
    assert await numbers(opened.log, row.id, after=20) == list(range(21, 49))
    child = await opened.log.fork(row.id, at=10)
    assert await numbers(opened.log, child.id) == list(range(1, 11))
