"""The part of the log's suite about bounds of reading and about owners that are gone; see `contextlog_suite`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from recess.contextlog import ContextLog, Draft, Entry, SessionRow
from recess.errors import Fenced

FAR_S = 1e12  # a lease that does not end


async def owned(log: ContextLog, owner: str = "n1", **create: Any) -> SessionRow:
    """Make a session and claim it."""
    row = await log.create(agent="coder", code_version="v1", **create)
    return await log.claim(row.id, owner, FAR_S, now=0.0)


def user(text: str, key: str) -> Draft:
    """Return an inbox message."""
    return Draft("user", {"text": text}, key=key)


def kinds(entries: list[Entry]) -> list[str]:
    """Return the kinds in order."""
    return [e.kind for e in entries]


class BoundsSuite:
    """Tests of `ContextLogSuite`."""

    async def test_a_read_is_bounded_by_bytes_and_goes_on_where_it_ended(self, log: ContextLog) -> None:
        row = await owned(log)
        sizes = [10, 3000, 20_000, 10, 10, 40_000, 500]
        for i, size in enumerate(sizes):
            await log.append(row.id, row.epoch, [Draft("note", {"text": "x" * size, "i": i})])
        assert [e.body["i"] for e in await log.read(row.id, max_bytes=1)] == [0]  # never nothing
        assert [e.body["i"] for e in await log.read(row.id, max_bytes=4000)] == [0, 1]
        assert [e.body["i"] for e in await log.read(row.id, after=2, max_bytes=100)] == [
            2
        ]  # one that is over the bound
        found: list[int] = []
        while page := await log.read(row.id, after=len(found), max_bytes=21_000):
            assert len(page) == 1 or sum(sizes[e.body["i"]] for e in page) <= 21_000
            found += [e.body["i"] for e in page]
        assert found == list(range(7))
        assert len(await log.read(row.id, max_bytes=1 << 30)) == 7

    async def test_leases_that_ended_are_taken_once(self, log: ContextLog) -> None:
        rows = [await log.create(agent="a", code_version="v") for _ in range(5)]
        for n, row in enumerate(rows[:4]):
            await log.claim(row.id, "n1", float(10 + n), now=0.0)
        await log.claim(rows[3].id, "n1", FAR_S, now=0.0)
        await log.close(rows[2].id)
        assert await log.claim_abandoned("n2", 5.0, now=10.0) == []
        first, second = await asyncio.gather(
            log.claim_abandoned("n2", 5.0, now=50.0, limit=1), log.claim_abandoned("n3", 5.0, now=50.0, limit=1)
        )
        taken = {row.id: row for row in (*first, *second)}
        assert set(taken) == {rows[0].id, rows[1].id}
        for row in taken.values():
            assert (row.epoch, row.lease_until) == (2, 55.0)
            assert await log.get(row.id) == row
            with pytest.raises(Fenced):
                await log.append(row.id, 1, [Draft("note", {})])
        assert await log.claim_abandoned("n2", 5.0, now=50.0) == []
        again = await log.claim_abandoned("n2", 5.0, now=56.0)  # who took them is gone, too
        assert {row.id: row.epoch for row in again} == {rows[0].id: 3, rows[1].id: 3}
