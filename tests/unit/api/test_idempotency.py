"""The same key never makes two."""

import asyncio

import pytest

from recess.api.idempotency import KeyedResults
from recess.errors import KeyReused, Unavailable


async def test_concurrent_and_later_calls_share_one_result():
    keys, made = KeyedResults(), []

    async def work():
        await asyncio.sleep(0)
        made.append(1)
        return {"id": len(made)}

    results = await asyncio.gather(*(keys.run("k", {"a": 1}, work) for _ in range(5)))
    assert results == [{"id": 1}] * 5
    assert await keys.run("k", {"a": 1}, work) == {"id": 1}
    assert made == [1]


async def test_another_body_under_the_same_key_is_refused():
    keys = KeyedResults()

    async def work():
        return {}

    await keys.run("k", {"a": 1}, work)
    with pytest.raises(KeyReused):
        await keys.run("k", {"a": 2}, work)


async def test_a_failure_may_be_tried_again():
    keys, tries = KeyedResults(), []

    async def work():
        tries.append(1)
        if len(tries) == 1:
            raise Unavailable("not yet")
        return {"n": len(tries)}

    with pytest.raises(Unavailable):
        await keys.run("k", {}, work)
    assert await keys.run("k", {}, work) == {"n": 2}
