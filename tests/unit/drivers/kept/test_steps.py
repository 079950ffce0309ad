"""Work that a VM's end cuts short: which reason is told, and what is over by then."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from recess.drivers.kept import keeper as keepers
from recess.drivers.kept import steps
from recess.drivers.kept.keeper import Keeper, Obituary
from recess.drivers.kept.steps import RefusedAlive, last_word, unless_dead
from recess.errors import DriverFailed, RecessError, Timeout

END = Obituary("signal:9", "killed", "last words")


class Work:
    """Waits until it is told how to end; its own end takes a few turns, as that of a command does."""

    def __init__(self) -> None:
        self.begun, self.told, self.over = asyncio.Event(), asyncio.Event(), False
        self.error: RecessError | None = None

    async def run(self) -> str:
        try:
            self.begun.set()
            await self.told.wait()
            if self.error is not None:
                raise self.error
            return "done"
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            self.over = True


@pytest.fixture
async def keeper() -> Keeper:
    return cast(Keeper, SimpleNamespace(death=asyncio.get_running_loop().create_future()))


async def test_work_that_is_done_is_the_result(keeper: Keeper) -> None:
    work = Work()
    work.told.set()
    assert await unless_dead(keeper, "a try", work.run()) == "done"


async def test_the_vms_end_is_the_reason_and_the_work_is_over_by_then(keeper: Keeper) -> None:
    work = Work()
    waiting = asyncio.ensure_future(unless_dead(keeper, "a try", work.run()))
    await work.begun.wait()
    keeper.death.set_result(END)
    with pytest.raises(DriverFailed, match="ended during a try") as caught:
        await waiting
    assert work.over
    assert caught.value.details["log"] == "last words"


@pytest.mark.parametrize("error", [DriverFailed("cut", log=""), Timeout("slow")])
async def test_an_error_of_a_vm_that_is_dying_is_told_as_its_end(keeper: Keeper, error: RecessError) -> None:
    work = Work()
    work.error = error
    work.told.set()
    asyncio.get_running_loop().call_soon(keeper.death.set_result, END)
    with pytest.raises(DriverFailed, match="ended during a try"):
        await unless_dead(keeper, "a try", work.run())


async def test_an_error_of_a_vm_that_lives_is_told_as_it_is(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepers, "_LAST_WORDS_S", 0.0)
    work = Work()
    work.error = DriverFailed("cut", log="")
    work.told.set()
    with pytest.raises(DriverFailed, match=r"^cut"):
        await unless_dead(keeper, "a try", work.run())


async def test_a_refusal_is_the_reason_itself(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the end of a VM that has just answered."""
    monkeypatch.delattr(steps, "last_words")
    work = Work()
    work.error = RefusedAlive("it will not", log="")
    work.told.set()
    with pytest.raises(RefusedAlive, match="it will not"):
        await unless_dead(keeper, "a try", work.run())


async def test_a_caller_that_goes_away_waits_for_its_end(keeper: Keeper) -> None:
    work = Work()
    waiting = asyncio.ensure_future(unless_dead(keeper, "a try", work.run()))
    await work.begun.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert work.over


@pytest.mark.parametrize(
    ("console", "word"),
    [
        (b"", ""),
        (b"[ 1.0] all well\n", ""),
        (b"x\r\nguestd: fatal: no eth0 appeared\r\n[ 2.0] reboot: Restarting system\r\n", "no eth0 appeared"),
        (
            b"[ 1.1] Kernel panic - not syncing: VFS: no root\n[ 1.2] ---[ end ]---",
            "Kernel panic - not syncing: VFS: no root",
        ),
        (b"guestd: fatal: \x1b[31m" + b"x" * 999, "?[31m" + "x" * 195),
        (b"guestd: fatal: long ago\n" + b"." * 5000, ""),
    ],
)
def test_what_a_guest_said_at_its_end(console: bytes, word: str) -> None:
    assert last_word(console) == word


async def test_the_reason_of_a_boot_that_failed_is_the_guests_own(keeper: Keeper) -> None:
    keeper.death.set_result(END)
    with pytest.raises(DriverFailed, match=r"no root here; killed \(signal 9\)"):
        await unless_dead(keeper, "start", Work().run(), console=lambda: b"guestd: fatal: no root here\n")
