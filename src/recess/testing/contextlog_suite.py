"""What every `ContextLog` does, as tests: subclass `ContextLogSuite` and give it a `make_log` fixture.

    class TestMine(ContextLogSuite):
        @pytest.fixture
        async def log(self): ...

The log must use a clock that stands still at any moment (`FakeClock`) or the system's: the suite does not rely on time.
"""

from __future__ import annotations

import asyncio

import pytest

from recess.contextlog import ContextLog, Delta, Draft, MemoryLog, SessionRow, SqlLog
from recess.contextlog.contract import INBOX_BYTES_MAX
from recess.errors import BadInput, Fenced, IllegalState, KeyReused, NameInUse, NotFound
from recess.testing.contextlog_blobs import BlobsSuite
from recess.testing.contextlog_bounds import FAR_S, BoundsSuite, kinds, owned, user
from recess.testing.contextlog_forks import ForksSuite

IMPLEMENTATIONS: tuple[type[ContextLog], ...] = (MemoryLog, SqlLog)  # the type checker holds them to the contract


class ContextLogSuite(BoundsSuite, ForksSuite, BlobsSuite):
    """One suite for every implementation of the log."""

    # --- sessions

    async def test_a_new_session_is_cold_and_empty(self, log: ContextLog) -> None:
        row = await log.create(agent="coder", code_version="v1", name="fix-it", labels={"a": "b"}, meta={"m": [1]})
        assert (row.state, row.head, row.epoch, row.owner, row.consumed) == ("cold", 0, 0, "", 0)
        assert (row.labels, row.meta) == ({"a": "b"}, {"m": [1]})
        assert await log.get(row.id) == row
        assert await log.get("fix-it") == row
        assert await log.get(row.id[4:-1]) == row
        assert await log.read(row.id) == []
        assert await log.tail(row.id) == []

    async def test_unknown_and_ambiguous_refs(self, log: ContextLog) -> None:
        await log.create(agent="a", code_version="v", session_id="ses_aa1")
        await log.create(agent="a", code_version="v", session_id="ses_aa2")
        for ref in ("nope", "", "ses_b", "\u00e9", "x" * 10_000):
            with pytest.raises(NotFound):
                await log.get(ref)
        with pytest.raises(BadInput, match="ambiguous"):
            await log.get("aa")
        assert (await log.get("ses_aa2")).id == "ses_aa2"
        for call in (log.read("ses_none"), log.tail("ses_none"), log.deltas("ses_none"), log.close("ses_none")):
            with pytest.raises(NotFound):
                await call

    async def test_names_are_unique_among_live_sessions(self, log: ContextLog) -> None:
        first = await log.create(agent="a", code_version="v", name="dev")
        with pytest.raises(NameInUse):
            await log.create(agent="a", code_version="v", name="dev")
        other = await owned(log)
        with pytest.raises(NameInUse):
            await log.update(other.id, other.epoch, name="dev")
        with pytest.raises(NameInUse):
            await log.fork(other.id, name="dev")
        await log.close(first.id)
        second = await log.create(agent="a", code_version="v", name="dev")
        assert (await log.get("dev")).id == second.id
        await log.close(second.id)
        assert (await log.get("dev")).id == second.id

    @pytest.mark.parametrize("name", ["a b", "-x", "x", "ses_abc", "x" * 200, "a/b", "\n"])
    async def test_illegal_names_are_refused(self, log: ContextLog, name: str) -> None:
        with pytest.raises(BadInput):
            await log.create(agent="a", code_version="v", name=name)

    async def test_list_is_newest_first_and_by_state(self, log: ContextLog) -> None:
        rows = [await log.create(agent="a", code_version="v") for _ in range(4)]
        await log.close(rows[1].id)
        assert [r.id for r in await log.list_sessions()] == [r.id for r in reversed(rows)]
        assert [r.id for r in await log.list_sessions(states=["closed"])] == [rows[1].id]
        assert [r.id for r in await log.list_sessions(states=["cold"], limit=2)] == [rows[3].id, rows[2].id]

    async def test_update_changes_only_what_it_may(self, log: ContextLog) -> None:
        row = await owned(log)
        new = await log.update(
            row.id, row.epoch, state="running", turn=3, attempts=1, meta={"machine": "mch_1"}, labels={"x": "y"},
            snapshot="snp_1", snapshot_position=0, code_version="v2", consumed=0, name="renamed",
        )  # fmt: skip
        assert new == await log.get(row.id)
        assert (new.state, new.turn, new.meta, new.name) == ("running", 3, {"machine": "mch_1"}, "renamed")
        for changes in ({"head": 7}, {"owner": "me"}, {"turn": "3"}, {"turn": -1}, {"state": "closed"}, {"meta": [1]},
                        {"turn": True}, {"nonsense": 1}, {"state": ""}):  # fmt: skip
            with pytest.raises(BadInput):
                await log.update(row.id, row.epoch, **changes)
        assert await log.get(row.id) == new

    # --- owner appends and fencing

    async def test_appends_take_positions_without_gaps(self, log: ContextLog) -> None:
        row = await owned(log)
        first = await log.append(row.id, row.epoch, [Draft("system", {"text": "be kind"}), Draft("x.mine", {"n": 1})])
        second = await log.append(row.id, row.epoch, [Draft("note", {}, turn=1, ref="r", schema=2)])
        assert [a.position for a in first + second] == [1, 2, 3]
        assert not any(a.replayed for a in first + second)
        entries = await log.read(row.id)
        assert [(e.position, e.kind, e.body) for e in entries] == [
            (1, "system", {"text": "be kind"}),
            (2, "x.mine", {"n": 1}),
            (3, "note", {}),
        ]
        last = entries[2]
        assert (last.turn, last.ref, last.schema, last.epoch, last.code_version) == (1, "r", 2, 1, "v1")
        assert (await log.get(row.id)).head == 3

    async def test_code_version_is_stamped(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append(row.id, row.epoch, [Draft("note", {})])
        await log.update(row.id, row.epoch, code_version="v2")
        await log.append(row.id, row.epoch, [Draft("code", {"old": "v1", "new": "v2"})])
        assert [e.code_version for e in await log.read(row.id)] == ["v1", "v2"]

    async def test_a_newer_claim_fences_the_older(self, log: ContextLog) -> None:
        old = await owned(log, "n1")
        new = await log.claim(old.id, "n2", FAR_S, now=0.0, force=True)
        assert new.epoch == old.epoch + 1
        note = [Draft("note", {})]
        for call in (
            lambda: log.append(old.id, old.epoch, note),
            lambda: log.renew(old.id, old.epoch, 5.0, now=0.0),
            lambda: log.update(old.id, old.epoch, turn=1),
            lambda: log.release(old.id, old.epoch, state="cold"),
            lambda: log.freeze(old.id, old.epoch, consumed=0, snapshot="s", position=-1),
            lambda: log.put_delta(old.id, old.epoch, Delta(1, 0, 0, "x")),
            lambda: log.close(old.id, old.epoch),
            lambda: log.append(old.id, new.epoch + 1, note),
        ):
            with pytest.raises(Fenced):
                await call()
        assert (await log.append(old.id, new.epoch, note))[0].position == 1
        assert await log.deltas(old.id) == []

    async def test_nobody_owns_an_unclaimed_or_released_session(self, log: ContextLog) -> None:
        row = await log.create(agent="a", code_version="v")
        with pytest.raises(Fenced):
            await log.append(row.id, 0, [Draft("note", {})])
        mine = await log.claim(row.id, "n1", FAR_S, now=0.0)
        await log.release(row.id, mine.epoch, state="parked")
        with pytest.raises(Fenced):
            await log.append(row.id, mine.epoch, [Draft("note", {})])
        after = await log.get(row.id)
        assert (after.state, after.owner, after.lease_until) == ("parked", "", 0.0)

    async def test_a_lease_is_taken_when_free_expired_ours_or_by_force(self, log: ContextLog) -> None:
        row = await log.create(agent="a", code_version="v")
        one = await log.claim(row.id, "n1", 10.0, now=100.0)
        assert (one.epoch, one.owner, one.lease_until) == (1, "n1", 110.0)
        with pytest.raises(IllegalState, match="n1"):
            await log.claim(row.id, "n2", 10.0, now=109.9)
        await log.renew(row.id, 1, 10.0, now=105.0)
        with pytest.raises(IllegalState):
            await log.claim(row.id, "n2", 10.0, now=114.9)
        two = await log.claim(row.id, "n2", 10.0, now=115.0)
        again = await log.claim(row.id, "n2", 10.0, now=116.0)
        assert [two.epoch, again.epoch] == [2, 3]
        assert (await log.claim(row.id, "n3", 10.0, now=116.0, force=True)).epoch == 4
        await log.release(row.id, 4, state="cold")
        assert (await log.claim(row.id, "n1", 10.0, now=116.0)).epoch == 5

    async def test_an_expired_lease_alone_does_not_fence(self, log: ContextLog) -> None:
        row = await log.create(agent="a", code_version="v")
        mine = await log.claim(row.id, "n1", 1.0, now=-1e9)
        assert (await log.append(row.id, mine.epoch, [Draft("note", {})]))[0].position == 1

    async def test_racing_claims_have_one_winner_an_epoch(self, log: ContextLog) -> None:
        row = await log.create(agent="a", code_version="v")
        results = await asyncio.gather(
            *(log.claim(row.id, f"n{i}", 10.0, now=0.0) for i in range(20)), return_exceptions=True
        )
        winners = [r for r in results if isinstance(r, SessionRow)]
        assert len(winners) == 1
        assert all(isinstance(r, IllegalState) for r in results if r is not winners[0])

    async def test_racing_writers_leave_no_gap_and_no_stale_entry(self, log: ContextLog) -> None:
        row = await log.create(agent="a", code_version="v")
        accepted: list[tuple[int, int]] = []
        fenced = 0

        async def node(name: str) -> None:
            nonlocal fenced
            for _ in range(8):
                mine = await log.claim(row.id, name, 10.0, now=0.0, force=True)
                for _ in range(4):
                    try:
                        done = await log.append(row.id, mine.epoch, [Draft("note", {"by": name})])
                    except Fenced:
                        fenced += 1
                        break
                    accepted.append((done[0].position, mine.epoch))
                    await asyncio.sleep(0)

        await asyncio.gather(*(node(f"n{i}") for i in range(4)))
        assert fenced > 0
        entries = await log.read(row.id)
        assert sorted(accepted) == [(e.position, e.epoch) for e in entries]
        assert [e.position for e in entries] == list(range(1, len(entries) + 1))
        assert [e.epoch for e in entries] == sorted(e.epoch for e in entries)

    @pytest.mark.parametrize(
        "draft",
        [
            Draft("user", {"text": "x"}, key="k"),
            Draft("", {}),
            Draft("Bad Kind", {}),
            Draft("x" * 65, {}),
            Draft("note", {"f": object}),
            Draft("note", {}, turn=-1),
            Draft("note", {}, key="k" * 257),
            Draft("note", {}, ref="\ud800"),
            Draft("note", {"t": "\ud800"}),
            Draft("rewind", {"to": 5}),
            Draft("rewind", {}),
            Draft("compact", {"summary": "s", "to": "1"}),
            Draft("note", {}, schema=0),
        ],
        ids=lambda draft: f"{draft.kind[:8]}-{'-'.join(draft.body)}",  # equal in every process: no addresses
    )
    async def test_malformed_drafts_are_refused_whole(self, log: ContextLog, draft: Draft) -> None:
        row = await owned(log)
        with pytest.raises(BadInput):
            await log.append(row.id, row.epoch, [Draft("note", {}), draft])
        assert (await log.get(row.id)).head == 0
        assert await log.read(row.id) == []

    async def test_kinds_of_a_newer_version_are_kept(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append(row.id, row.epoch, [Draft("tool.future", {"a": {"b": [1, None, 2.5]}}, schema=9)])
        entry = (await log.read(row.id))[0]
        assert (entry.kind, entry.schema, entry.body) == ("tool.future", 9, {"a": {"b": [1, None, 2.5]}})

    # --- keys

    async def test_same_key_same_content_gives_the_old_position(self, log: ContextLog) -> None:
        row = await owned(log)
        draft = Draft("tool.start", {"name": "sh", "arguments": {"b": 1, "a": 2}}, turn=1, ref="c1", key="t1/c1/start")
        same = Draft("tool.start", {"arguments": {"a": 2, "b": 1}, "name": "sh"}, turn=1, ref="c1", key="t1/c1/start")
        await log.append(row.id, row.epoch, [draft])
        await log.append(row.id, row.epoch, [Draft("note", {})])
        newer = await log.claim(row.id, "n2", FAR_S, now=0.0, force=True)
        mixed = await log.append(row.id, newer.epoch, [Draft("note", {}), same, Draft("note", {"z": 1})])
        assert [(a.position, a.replayed) for a in mixed] == [(3, False), (1, True), (4, False)]
        assert (await log.get(row.id)).head == 4

    async def test_same_key_other_content_is_refused_whole(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append(row.id, row.epoch, [Draft("note", {"v": 1}, key="k")])
        for other in (
            Draft("note", {"v": 2}, key="k"),
            Draft("note", {"v": 1}, key="k", turn=1),
            Draft("note", {"v": 1}, key="k", ref="r"),
            Draft("code", {"v": 1}, key="k"),
        ):
            with pytest.raises(KeyReused):
                await log.append(row.id, row.epoch, [Draft("note", {}), other])
        with pytest.raises(KeyReused):
            await log.append(row.id, row.epoch, [Draft("note", {"v": 1}, key="n"), Draft("note", {"v": 2}, key="n")])
        assert (await log.get(row.id)).head == 1

    async def test_a_key_twice_in_one_append_is_one_entry(self, log: ContextLog) -> None:
        row = await owned(log)
        done = await log.append(row.id, row.epoch, [Draft("note", {}, key="k")] * 3)
        assert [(a.position, a.replayed) for a in done] == [(1, False), (1, True), (1, True)]

    # --- inbox

    async def test_inbox_needs_a_key_and_no_epoch(self, log: ContextLog) -> None:
        row = await log.create(agent="a", code_version="v")
        with pytest.raises(BadInput):
            await log.append_inbox(row.id, user("hi", ""))
        with pytest.raises(BadInput):
            await log.append_inbox(row.id, Draft("assistant", {"text": "fake"}, key="k"))
        assert (await log.append_inbox(row.id, user("hi", "k1"))).position == 1
        again = await log.append_inbox(row.id, user("hi", "k1"))
        assert (again.position, again.replayed) == (1, True)
        with pytest.raises(KeyReused):
            await log.append_inbox(row.id, user("other", "k1"))
        assert (await log.append_inbox(row.id, Draft("cancel", {}, key="k2"))).position == 2

    async def test_inbox_after_counts_only_inbox_entries(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append_inbox(row.id, user("one", "k1"))
        await log.append(row.id, row.epoch, [Draft("note", {})])
        await log.append_inbox(row.id, Draft("answer", {"text": "yes"}, ref="a1", key="k2"))
        assert [(e.position, e.kind) for e in await log.inbox_after(row.id, 0)] == [(1, "user"), (3, "answer")]
        assert kinds(await log.inbox_after(row.id, 1)) == ["answer"]
        assert await log.inbox_after(row.id, 3) == []

    async def test_many_clients_at_once_lose_nothing(self, log: ContextLog) -> None:
        row = await log.create(agent="a", code_version="v")
        texts = [f"m{i}" for i in range(50)]
        done = await asyncio.gather(*(log.append_inbox(row.id, user(t, t)) for t in texts for _ in range(2)))
        assert sorted({a.position for a in done}) == list(range(1, 51))
        assert sorted(e.body["text"] for e in await log.read(row.id)) == sorted(texts)

    # --- freeze

    async def test_freeze_goes_through_when_the_inbox_is_consumed(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append_inbox(row.id, user("hi", "k"))
        drafts = [Draft("machine.snapshot", {"snapshot": "snp_1"}, key="snap/1")]
        assert await log.freeze(row.id, row.epoch, consumed=1, snapshot="snp_1", position=-1, drafts=drafts)
        after = await log.get(row.id)
        assert (after.state, after.snapshot, after.snapshot_position, after.consumed) == ("frozen", "snp_1", 2, 1)
        assert (after.owner, after.lease_until, after.epoch) == ("", 0.0, row.epoch)
        assert kinds(await log.read(row.id)) == ["user", "machine.snapshot"]
        assert (await log.claim(row.id, "n2", 5.0, now=0.0)).epoch == row.epoch + 1

    async def test_freeze_with_a_position_keeps_it(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append(row.id, row.epoch, [Draft("note", {}), Draft("note", {})])
        assert await log.freeze(row.id, row.epoch, consumed=0, snapshot="s", position=1)
        assert (await log.get(row.id)).snapshot_position == 1

    async def test_a_message_in_the_window_cancels_the_freeze(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append_inbox(row.id, user("one", "k1"))
        await log.append_inbox(row.id, user("two", "k2"))
        before = await log.get(row.id)
        drafts = [Draft("machine.snapshot", {}, key="snap")]
        assert not await log.freeze(row.id, row.epoch, consumed=1, snapshot="s", position=-1, drafts=drafts)
        assert await log.get(row.id) == before
        assert kinds(await log.read(row.id)) == ["user", "user"]

    async def test_freeze_against_senders_never_loses_a_wake_up(self, log: ContextLog) -> None:
        for i in range(20):
            row = await owned(log)
            frozen, sent = await asyncio.gather(
                log.freeze(row.id, row.epoch, consumed=0, snapshot="s", position=-1),
                log.append_inbox(row.id, user("wake", f"k{i}")),
            )
            state = (await log.get(row.id)).state
            # Either the freeze saw the message, or the message came after and its sender sees a frozen session.
            assert (state == "frozen") == frozen
            assert kinds(await log.inbox_after(row.id, 0)) == ["user"]
            assert sent.position == 1

    # --- deltas

    async def test_deltas_live_until_the_final_entry(self, log: ContextLog) -> None:
        row = await owned(log)
        pieces = [Delta(1, 0, 0, "Hel"), Delta(1, 0, 1, "lo"), Delta(1, 1, 0, "next"), Delta(2, 0, 0, "turn")]
        for delta in reversed(pieces):
            await log.put_delta(row.id, row.epoch, delta)
        await log.put_delta(row.id, row.epoch, Delta(1, 0, 1, "lo"))
        assert [d for d in await log.deltas(row.id) if d.n == 1] == [Delta(1, 0, 1, "lo")]
        await log.append(row.id, row.epoch, [Draft("assistant", {"text": "Hello", "part": 0}, turn=1)])
        assert await log.deltas(row.id) == [Delta(1, 1, 0, "next"), Delta(2, 0, 0, "turn")]
        await log.append(row.id, row.epoch, [Draft("turn.end", {"status": "done"}, turn=1)])
        assert await log.deltas(row.id) == [Delta(2, 0, 0, "turn")]

    async def test_a_failed_append_leaves_the_deltas(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.put_delta(row.id, row.epoch, Delta(1, 0, 0, "x"))
        await log.append(row.id, row.epoch, [Draft("note", {}, key="k")])
        final = Draft("assistant", {"text": "x", "part": 0}, turn=1)
        with pytest.raises(KeyReused):
            await log.append(row.id, row.epoch, [final, Draft("code", {}, key="k")])
        assert await log.deltas(row.id) == [Delta(1, 0, 0, "x")]

    async def test_n_zero_starts_a_reply_afresh(self, log: ContextLog) -> None:
        row = await owned(log)
        for n in range(3):
            await log.put_delta(row.id, row.epoch, Delta(1, 0, n, f"old{n}"))
        await log.put_delta(row.id, row.epoch, Delta(1, 0, 0, "new"))
        assert await log.deltas(row.id) == [Delta(1, 0, 0, "new")]
        with pytest.raises(BadInput):
            await log.put_delta(row.id, row.epoch, Delta(1, -1, 0, "x"))

    # --- large bodies

    async def test_bodies_of_any_size_come_back(self, log: ContextLog) -> None:
        row = await owned(log)
        texts = ["", "small", "é" * 8_000, "x" * 16_384, "y" * 200_000, "\x00\u2028" * 20_000]
        drafts = [Draft("tool.result", {"output": t}, ref=str(i), key=f"k{i}") for i, t in enumerate(texts)]
        await log.append(row.id, row.epoch, drafts)
        assert [e.body["output"] for e in await log.read(row.id)] == texts
        assert all(a.replayed for a in await log.append(row.id, row.epoch, drafts))
        await log.append_inbox(row.id, user("z" * 100_000, "big"))
        assert len((await log.inbox_after(row.id, 0))[0].body["text"]) == 100_000
        child = await log.fork(row.id)
        assert [e.body for e in await log.tail(child.id)] == [e.body for e in await log.read(row.id)]

    async def test_what_anybody_may_append_is_bounded(self, log: ContextLog) -> None:
        row = await owned(log)
        most = INBOX_BYTES_MAX - len('{"text":""}')
        for text in ("x" * (most + 1), "\u0001" * (most // 6 + 1)):
            with pytest.raises(BadInput, match="more than"):
                await log.append_inbox(row.id, user(text, "k"))
        assert await log.inbox_after(row.id, 0) == []
        await log.append_inbox(row.id, user("x" * most, "k"))
        assert len((await log.inbox_after(row.id, 0))[0].body["text"]) == most

    # --- reading

    async def test_read_windows(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append(row.id, row.epoch, [Draft("note", {"i": i}) for i in range(1, 11)])
        for after, to, limit, expected in (
            (0, None, 1000, range(1, 11)),
            (3, None, 1000, range(4, 11)),
            (3, 7, 1000, range(4, 8)),
            (3, 7, 2, range(4, 6)),
            (10, None, 5, range(0)),
            (-5, 99, 3, range(1, 4)),
            (7, 3, 5, range(0)),
            (0, None, 0, range(0)),
        ):
            got = await log.read(row.id, after=after, to=to, limit=limit)
            assert [e.body["i"] for e in got] == list(expected)

    async def test_tail_skips_what_a_compaction_stands_for(self, log: ContextLog) -> None:
        row = await owned(log)
        notes = [Draft("note", {"i": i}) for i in range(10)]
        await log.append(row.id, row.epoch, [Draft("system", {"text": "old"}), Draft("system", {"text": "s"}), *notes])
        await log.append(row.id, row.epoch, [Draft("compact", {"summary": "sum", "to": 9}), Draft("note", {"i": 99})])
        tail = await log.tail(row.id)
        begun = await log.tail(row.id, limit=2)
        assert begun == tail[: len(begun)]
        assert 2 <= len(begun) <= 3, "the system entry comes on top"
        assert begun + await log.read(row.id, after=begun[-1].position) == tail
        assert [e.position for e in tail] == [2, 10, 11, 12, 13, 14]
        assert tail[0].body == {"text": "s"}
        await log.append(row.id, row.epoch, [Draft("rewind", {"to": 12})])  # before the compaction: it counts no more
        assert [e.position for e in await log.tail(row.id)] == list(range(1, 16))

    # --- closing

    async def test_a_closed_session_can_only_be_read_and_forked(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append_inbox(row.id, user("hi", "k1"))
        await log.put_delta(row.id, row.epoch, Delta(1, 0, 0, "x"))
        await log.close(row.id)
        await log.close(row.id)
        assert (await log.get(row.id)).state == "closed"
        with pytest.raises(Fenced):
            await log.append(row.id, row.epoch, [Draft("note", {})])
        with pytest.raises(IllegalState):
            await log.append_inbox(row.id, user("late", "k2"))
        with pytest.raises(IllegalState):
            await log.claim(row.id, "n1", 5.0, now=0.0, force=True)
        assert (await log.append_inbox(row.id, user("hi", "k1"))).replayed
        assert kinds(await log.read(row.id)) == ["user"]
        assert await log.deltas(row.id) == []
        assert (await log.fork(row.id)).state == "cold"

    # --- waiting

    async def test_wait_returns_at_once_if_there_is_something(self, log: ContextLog) -> None:
        row = await owned(log)
        await log.append(row.id, row.epoch, [Draft("note", {})])
        assert await log.wait(row.id, 0, 0.0)
        assert not await log.wait(row.id, 1, 0.0)
        with pytest.raises(NotFound):
            await log.wait("ses_none", 0, 0.0)

    async def test_any_change_wakes_every_waiter(self, log: ContextLog) -> None:
        row = await owned(log)
        changes = (
            lambda: log.append(row.id, row.epoch, [Draft("note", {})]),
            lambda: log.append_inbox(row.id, user("x", "k")),
            lambda: log.put_delta(row.id, row.epoch, Delta(1, 0, 0, "x")),
            lambda: log.update(row.id, row.epoch, state="running"),
            lambda: log.release(row.id, row.epoch, state="cold"),
            lambda: log.close(row.id),
        )
        for change in changes:
            head = (await log.get(row.id)).head
            ticket = log.ticket(row.id)
            waits = [asyncio.ensure_future(log.wait(row.id, head, 30.0, ticket=ticket)) for _ in range(3)]
            await change()
            assert await asyncio.gather(*waits) == [True, True, True]

    async def test_a_ticket_covers_changes_before_the_wait(self, log: ContextLog) -> None:
        row = await owned(log)
        ticket = log.ticket(row.id)
        assert not await log.wait(row.id, 0, 0.0, ticket=ticket)
        await log.put_delta(row.id, row.epoch, Delta(1, 0, 0, "x"))
        assert await log.wait(row.id, 0, 0.0, ticket=ticket)
        assert not await log.wait(row.id, 0, 0.0)

    async def test_another_session_does_not_wake(self, log: ContextLog) -> None:
        row, other = await owned(log), await owned(log)
        waiting = asyncio.ensure_future(log.wait(row.id, 0, 30.0))
        await log.append(other.id, other.epoch, [Draft("note", {})])
        assert not waiting.done()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not await log.wait(row.id, 0, 0.01)
