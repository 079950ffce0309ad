"""The same key never makes two."""

import asyncio

import pytest

from recess.api.idempotency import KeyedResults
from recess.errors import BadInput, KeyReused, Unavailable


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


async def test_a_failure_that_nobody_waited_for_is_not_kept():
    keys, tries, go = KeyedResults(), [], asyncio.Event()

    async def work():
        tries.append(1)
        if len(tries) == 1:
            await go.wait()
            raise Unavailable("not yet")
        return {"n": len(tries)}

    caller = asyncio.create_task(keys.run("k", {}, work))
    while not tries:
        await asyncio.sleep(0)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    other = asyncio.create_task(keys.run("k", {}, work))
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(Unavailable):
        await other
    assert await keys.run("k", {}, work) == {"n": 2}


async def test_a_key_is_bounded():
    with pytest.raises(BadInput, match="256"):
        await KeyedResults().run("k" * 257, {}, None)
