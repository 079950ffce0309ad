"""What sessions need of stored snapshots, what they leave behind, and how they go on without what the retention took."""

from recess.contextlog.contract import Draft
from recess.contextlog.memory import MemoryLog
from recess.sessions.holding import PAGE, snapshot_holds
from recess.testing.session_world import coder_world


def snapshot_entry(number):
    return Draft("machine.snapshot", {"snapshot": f"snp_{number}", "position": number})


async def owned(log, name="some"):
    row = await log.create(agent="a", code_version="1", name=name)
    row = await log.claim(row.id, "me", 60.0, now=0.0)
    return row.id, row.epoch


async def test_rows_and_logs_tell_what_is_needed():
    log = MemoryLog()
    one, epoch = await owned(log, "one")
    await log.append(one, epoch, [snapshot_entry(1), Draft("note", {}), snapshot_entry(2)])
    await log.update(one, epoch, snapshot="snp_2", snapshot_position=3)
    ended, _ = await owned(log, "ended")
    await log.close(ended)
    holds = await snapshot_holds(log, 0.0)
    assert holds.current == {"snp_2": "session one"}
    assert holds.logged == {
        "snp_1": "session one at position 1 of its log", "snp_2": "session one at position 3 of its log",
    }  # fmt: skip
    assert holds.closed == {ended}
    newest = (await log.read(one))[-1].ts
    assert (await snapshot_holds(log, newest + 1.0)).logged == {}
    assert (await snapshot_holds(log, newest + 1.0)).current == {"snp_2": "session one"}


async def test_a_long_log_is_read_as_far_back_as_the_time_says_and_no_further():
    log = MemoryLog()
    one, epoch = await owned(log)
    for number in range(3):
        await log.append(one, epoch, [snapshot_entry(number), *[Draft("note", {"n": n}) for n in range(PAGE)]])
    assert sorted((await snapshot_holds(log, 0.0)).logged) == ["snp_0", "snp_1", "snp_2"]
    reads = []
    real = log.read

    async def counted(*args, **kwargs):
        reads.append(kwargs)
        return await real(*args, **kwargs)

    log.read = counted
    await snapshot_holds(log, (await real(one))[-1].ts + 1.0)
    assert len(reads) == 1


async def test_a_fork_and_what_it_inherits():
    log = MemoryLog()
    one, epoch = await owned(log, "parent")
    await log.append(one, epoch, [snapshot_entry(1)])
    await log.update(one, epoch, snapshot="snp_1", snapshot_position=1)
    await log.fork(one, name="child")
    await log.close(one)
    holds = await snapshot_holds(log, 0.0)
    assert holds.current == {"snp_1": "session child"}
    assert "child" in holds.logged["snp_1"]


async def test_a_cancelled_freeze_leaves_no_snapshot(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        original, taken = w.machines.snapshot, []

        async def snapshot(ref, **kwargs):
            row = await original(ref, **kwargs)
            taken.append(row.id)
            if len(taken) == 1:
                await w.sessions.send(s, "are you there", key="window")
            return row

        w.machines.snapshot = snapshot
        await w.say(s, "hi", turn=1)
        await w.until(s, "turn.end", count=2)
        await w.until_state(s, "frozen")
        assert ("discard_snapshot", taken[0]) in w.machines.calls
        named = [e.body["snapshot"] for e in await w.entries(s, "machine.snapshot")]
        assert list(w.machines.snapshots) == named == taken[1:]


async def test_a_fork_takes_an_older_snapshot_when_the_fitting_one_is_gone(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        firsts = []
        for turn in (1, 2):
            await w.say(s, f"turn {turn}", turn=turn)
            await w.until_state(s, "frozen")
            firsts.append(await w.log.get(s))
        await w.say(s, "turn 3", turn=3)
        await w.until_state(s, "frozen")
        at = firsts[1].head
        w.machines.snapshots.pop(firsts[1].snapshot)
        child = await w.sessions.fork(s, at=at)
        assert (child.snapshot, child.snapshot_position) == (firsts[0].snapshot, firsts[0].snapshot_position)
        w.machines.snapshots.pop(firsts[0].snapshot)
        child = await w.sessions.fork(s, at=at)
        assert (child.state, child.snapshot) == ("cold", "")
