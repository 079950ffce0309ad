"""The part of the log's suite about forks; see `contextlog_suite`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recess.contextlog import ContextLog, Delta, Draft
from recess.contextlog.contract import Born
from recess.errors import BadInput, NameInUse, NotFound
from recess.testing.contextlog_bounds import FAR_S, kinds, owned, user


class ForksSuite:
    """Tests of `ContextLogSuite`."""

    async def test_a_fork_shares_the_past_and_nothing_after(self, log: ContextLog) -> None:
        row = await owned(log, labels={"team": "x"}, meta={"machine": "mch_1"})
        await log.append(row.id, row.epoch, [Draft("note", {"i": i}, key=f"k{i}") for i in range(1, 6)])
        child = await log.fork(row.id, at=3, name="both-ways")
        assert (child.parent, child.fork_position, child.head, child.epoch) == (row.id, 3, 3, 0)
        assert (child.state, child.owner, child.agent, child.code_version) == ("cold", "", "coder", "v1")
        assert (child.labels, child.meta, child.attempts) == ({"team": "x"}, {}, 0)
        mine = await log.claim(child.id, "n1", FAR_S, now=0.0)
        await log.append(row.id, row.epoch, [Draft("note", {"i": 6})])
        done = await log.append(child.id, mine.epoch, [Draft("note", {"i": "c"}, key="k1")])
        assert (done[0].position, done[0].replayed) == (4, False)
        assert [(e.position, e.session == child.id, e.body["i"]) for e in await log.read(child.id)] == [
            (1, False, 1), (2, False, 2), (3, False, 3), (4, True, "c"),
        ]  # fmt: skip
        assert [e.body["i"] for e in await log.read(row.id)] == [1, 2, 3, 4, 5, 6]

    async def test_forks_of_forks_at_any_position(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append(row.id, row.epoch, [Draft("note", {"i": i}) for i in (1, 2, 3)])
        expected = [1, 2, 3]
        current = row.id
        for depth in range(4, 12):
            child = await log.fork(current)
            mine = await log.claim(child.id, "n", FAR_S, now=0.0)
            await log.append(child.id, mine.epoch, [Draft("note", {"i": depth})])
            expected.append(depth)
            current = child.id
        for at in range(len(expected) + 1):
            sub = await log.fork(current, at=at)
            assert [e.body["i"] for e in await log.read(sub.id)] == expected[:at]
            assert [e.body["i"] for e in await log.read(sub.id, after=at // 2, limit=3)] == expected[:at][at // 2 :][:3]
            claimed = await log.claim(sub.id, "n", FAR_S, now=0.0)
            assert (await log.append(sub.id, claimed.epoch, [Draft("note", {"i": 0})]))[0].position == at + 1

    async def test_a_fork_is_born_whole(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append_inbox(row.id, user("a", "k1"))
        await log.append(row.id, row.epoch, [Draft("turn.start", {"inbox": 1, "attempt": 1}, turn=7)])
        await log.append_inbox(row.id, user("b", "k2"))
        born = Born(Draft("fork", {"parent": row.id}, key="born"), "frozen", "v2", "snp_1", 2, {"job": "j"})
        child = await log.fork(row.id, born=born)
        assert child == await log.get(child.id)
        assert (child.state, child.code_version, child.snapshot, child.snapshot_position) == (
            "frozen",
            "v2",
            "snp_1",
            2,
        )
        assert (child.head, child.consumed, child.turn, child.epoch, child.owner) == (4, 3, 7, 1, "")
        assert child.meta == {"job": "j"}
        first = (await log.read(child.id))[-1]
        assert (first.position, first.kind, first.epoch, first.code_version) == (4, "fork", 1, "v2")
        mine = await log.claim(child.id, "n", FAR_S, now=0.0)
        assert (await log.append(child.id, mine.epoch, [born.first]))[0].replayed
        with pytest.raises(BadInput):
            await log.fork(row.id, name="none", born=replace(born, first=Draft("", {})))
        with pytest.raises(NotFound):
            await log.get("none")

    async def test_a_fork_outside_the_log_is_refused(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append(row.id, row.epoch, [Draft("note", {})])
        for at in (2, -1):
            with pytest.raises(BadInput):
                await log.fork(row.id, at=at)
        with pytest.raises(NotFound):
            await log.fork("ses_none")
        with pytest.raises(NameInUse):
            await log.fork(row.id, session_id=row.id)

    async def test_a_fork_knows_what_was_consumed_then(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append_inbox(row.id, user("a", "k1"))  # 1
        await log.append(row.id, row.epoch, [Draft("turn.start", {"inbox": 1, "attempt": 1}, turn=1)])  # 2
        await log.append_inbox(row.id, user("b", "k2"))  # 3
        await log.append(row.id, row.epoch, [Draft("turn.end", {"status": "done"}, turn=1)])  # 4
        await log.append(row.id, row.epoch, [Draft("turn.start", {"inbox": 3, "attempt": 1}, turn=2)])  # 5
        await log.update(row.id, row.epoch, consumed=3, turn=2)
        got = {}
        for at in range(6):
            child = await log.fork(row.id, at=at)
            got[at] = (child.turn, child.consumed)
        assert got == {0: (0, 0), 1: (0, 0), 2: (1, 1), 3: (1, 1), 4: (1, 1), 5: (2, 3)}

    async def test_a_fork_keeps_the_snapshot_only_if_it_is_not_newer(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append(row.id, row.epoch, [Draft("note", {})] * 4)
        await log.update(row.id, row.epoch, snapshot="snp_1", snapshot_position=2)
        assert [(await log.fork(row.id, at=at)).snapshot for at in (1, 2, 4)] == ["", "snp_1", "snp_1"]

    async def test_fork_inherits_the_inbox_but_no_deltas(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append_inbox(row.id, user("a", "k1"))
        await log.put_delta(row.id, row.epoch, Delta(1, 0, 0, "x"))
        child = await log.fork(row.id)
        assert await log.deltas(child.id) == []
        assert kinds(await log.inbox_after(child.id, 0)) == ["user"]
        assert (await log.append_inbox(child.id, user("other", "k1"))).position == 2
        mine = await log.claim(child.id, "n", FAR_S, now=0.0)
        assert not await log.freeze(child.id, mine.epoch, consumed=1, snapshot="s", position=-1)
