"""Snapshots by an agent's policy, beside those of idle times: of each turn, of each tool call, every so many seconds."""

import asyncio

import pytest

from recess.contextlog.contract import Entry
from recess.errors import BadInput, NotFound, OutOfSpace
from recess.sessions.agent_config import check_config
from recess.sessions.decisions import snapshot_in
from recess.sessions.ledger import as_of, kept
from recess.testing.session_world import appears, deploy_coder, kinds, machine_of, notes, world


@pytest.mark.parametrize(
    ("policy", "work", "outcome", "turn_open", "wanted"),
    [
        ("off", 9, 9, False, None), ("turn", 9, 0, False, 0.0), ("turn", 9, 9, True, None), ("turn", 5, 5, False, None),
        ("tool", 9, 9, True, 0.0), ("tool", 9, 5, True, None), ("tool", 9, 0, False, 0.0),
        ("seconds", 9, 0, True, 20.0), ("seconds", 5, 0, True, None),
    ],
)  # fmt: skip
def test_when_a_policy_wants_one(policy, work, outcome, turn_open, wanted):
    assert wanted == snapshot_in(
        policy, 60.0, last_snapshot=5, last_work=work, last_outcome=outcome, turn_open=turn_open, since_s=40.0
    )


def test_the_setting():
    assert [check_config({"snapshot": one}).snapshot for one in ("off", "turn", "tool", "90s", 90)] == [
        "off", "turn", "tool", "seconds", "seconds",
    ]  # fmt: skip
    assert check_config({"snapshot": "2m"}).snapshot_s == 120.0
    for wrong in ("always", "0.1s", True, -3):
        with pytest.raises(BadInput, match="snapshot"):
            check_config({"snapshot": wrong})


async def session_of(w, shared, **config):
    await deploy_coder(w, shared, "1", idle="60s", **config)
    return (await w.sessions.start("coder")).id


async def test_each_turn_has_its_snapshot_and_a_fork_of_it_has_its_files(tmp_path):
    async with world() as w:
        s = await session_of(w, tmp_path, snapshot="turn")
        (tmp_path / "go-a").touch()
        for turn in (1, 2, 3):
            await w.say(s, f"turn {turn}", turn=turn)
            await w.until(s, "machine.snapshot", count=turn)
            machine = await w.machines.link(await machine_of(w, s))
            await machine.write_file("/root/after", f"turn {turn}".encode())
        both = notes(await w.entries(s))
        assert both[0]["pid"] == both[2]["pid"], "the machine goes on"
        found = await w.sessions.snapshots(s)
        assert [(one.turn, one.whole, one.why, one.here) for one in found] == [
            (turn, True, "policy turn", True) for turn in (1, 2, 3)
        ]
        child = await w.sessions.fork(s, at=as_of(found, 2).position)
        await w.say(child.id, "and you?", turn=3)
        restore = (await w.entries(child.id, "machine.restore"))[-1]
        assert restore.body["stale"] is False
        files = await w.machines.link(await machine_of(w, child.id))
        assert await files.read_file("/root/after") == b"turn 1", "as it was when turn 2 ended"


async def test_a_crash_in_a_turn_loses_no_tool_call_that_had_its_snapshot(tmp_path):
    async with world() as w:
        s = await session_of(w, tmp_path, snapshot="tool")
        (tmp_path / "go-a").touch()
        await w.sessions.send(s, "work a", key="1")
        snapshot = await w.until(s, "machine.snapshot")
        log = await w.entries(s)
        assert kinds(log[: snapshot.position]).count("tool.result") == 1
        assert "turn.end" not in kinds(log[: snapshot.position])
        assert snapshot.body["at"] == "work"
        assert snapshot.body["why"] == "policy tool"
        await w.until(s, "turn.end")


async def test_every_so_many_seconds_while_there_is_work(tmp_path):
    async with world() as w:
        s = await session_of(w, tmp_path, snapshot="30s")
        await w.sessions.send(s, "work a", key="1")
        await appears(tmp_path / "work-a")
        assert await w.entries(s, "machine.snapshot") == []
        w.clock.jump(31)
        await w.until(s, "machine.snapshot")
        w.clock.jump(31)
        for _ in range(3):
            await w.sessions.resume(s)  # it looks, and nothing has happened since
        assert len(await w.entries(s, "machine.snapshot")) == 1
        (tmp_path / "go-a").touch()
        await w.until(s, "machine.snapshot", count=2)
        await w.until(s, "turn.end")


async def test_a_full_store_is_told_and_not_asked_again_at_once(tmp_path):
    async with world(freeze_retry_s=0.3) as w:
        s = await session_of(w, tmp_path, snapshot="turn")
        w.machines.fail_next["snapshot"] = OutOfSpace("the blob store is full")
        await w.say(s, "hi", turn=1)
        async with asyncio.timeout(10):
            while "failure" not in (await w.log.get(s)).meta:
                await w.log.wait(s, (await w.log.get(s)).head, 0.05)
        assert (await w.log.get(s)).meta["failure"] == "the blob store is full"
        await w.until(s, "machine.snapshot")


def entry(at, kind, turn=0, /, **body):
    return Entry("s", at, kind, body, turn, "", "", 1, "v", float(at), 1)


def test_the_ledger_tells_the_turn_and_the_cost_and_survives_nonsense():
    log = [
        entry(1, "machine.snapshot", snapshot="a", position=1, figures={"new_bytes": 10, "standstill_s": 0.5}),
        entry(2, "turn.start", 1), entry(3, "machine.snapshot", snapshot="b", position=3, figures="nonsense"),
        entry(4, "turn.end", 1), entry(5, "machine.snapshot", snapshot="c", position=5, figures={"new_bytes": "many"}),
        entry(6, "turn.start", 2), entry(7, "machine.snapshot", snapshot="d", position=7), entry(8, "rewind", to=6),
        entry(9, "turn.end", 2), entry(10, "machine.snapshot", snapshot="e", position=10),
    ]  # fmt: skip
    found = kept(log, {"a", "b", "c"})
    assert [(k.snapshot, k.turn, k.whole, k.here) for k in found] == [
        ("a", 0, True, True), ("b", 1, False, True), ("c", 1, True, True), ("e", 2, True, False),
    ]  # fmt: skip
    assert [(k.new_bytes, k.standstill_s) for k in found[:3]] == [(10, 0.5), (0, 0), (0, 0)]
    assert [as_of(found, turn).snapshot for turn in (0, 1, 2)] == ["a", "c", "c"]
    with pytest.raises(NotFound, match="turn 0"):
        as_of(kept(log, set()), 0)
