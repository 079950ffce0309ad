"""What a failed round on real machines tells of this process."""

import asyncio

from recess.testing.session_real import waiting_tasks


async def test_who_waits_is_told_and_where():
    never = asyncio.Event()

    async def stands_still() -> None:
        await never.wait()

    task = asyncio.create_task(stands_still(), name="session-x")
    await asyncio.sleep(0)
    (told,) = [one for one in waiting_tasks() if one.startswith("session-x: ")]
    assert "await never.wait()" in told
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
