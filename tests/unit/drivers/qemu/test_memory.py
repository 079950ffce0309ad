"""How a VM's changes are known, and what a capture asks for: decisions, and what a host that cannot makes of them."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from recess.drivers.qemu.journal import Journal
from recess.drivers.qemu.memory import UNTRACKED, MemoryCapture, Plan, Tracking, begin_tracking, plan_capture
from recess.errors import DriverFailed, OutOfSpace
from recess.machines.contract import BootFiles, VmSpec

FILES = BootFiles(Path("k"), "", Path("i"), "", Path("r"), "")
JOURNAL = Journal("v", "/d", VmSpec(1 << 30, 1, 4096, FILES), "running", "/ram", "template", "/base", "tcg", False)
EXACT = Tracking("kernel", "", "snp_a")


class Keeper:
    """Answers as it is told to; keeps what it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []
        self.death = asyncio.Future()
        self.gone = asyncio.Future()

    async def track(self, base, *, user_only, known=None):
        self.asked.append((base, user_only, known))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def prepare(self, which=""):
        self.asked.append(which)

    async def release(self):
        self.asked.append("release")


@pytest.mark.parametrize(
    ("tracking", "journal", "parent", "plan"),
    [
        (EXACT, JOURNAL, "snp_a", Plan(True, "delta", "snp_a")),
        (EXACT, JOURNAL, "snp_b", Plan(True, "all")),
        (EXACT, JOURNAL, "", Plan(True, "all")),
        (replace(EXACT, base=""), JOURNAL, "", Plan(True, "all")),
        (UNTRACKED, JOURNAL, "snp_a", Plan(False, "private")),
        (UNTRACKED, replace(JOURNAL, shared=True), "snp_a", Plan(False, "file-all")),
        (UNTRACKED, replace(JOURNAL, shared=True, base="boot"), "", Plan(False, "file")),
        (EXACT, replace(JOURNAL, shared=True, base="boot"), "snp_a", Plan(True, "delta", "snp_a")),
    ],
)
def test_what_a_capture_asks_for(tracking, journal, parent, plan):
    assert plan_capture(tracking, journal, parent) == plan


async def test_a_host_that_can():
    keeper = Keeper("user")
    tracking = await begin_tracking(keeper, "snp_a", mode="user", known=7)
    assert (tracking.way, tracking.base, tracking.exact) == ("user", "snp_a", True)
    assert keeper.asked == [("snp_a", True, 7)]


async def test_a_host_that_cannot_says_why():
    keeper = Keeper(DriverFailed("the kernel cannot scan page tables (Linux 6.7 or newer can)"))
    tracking = await begin_tracking(keeper, "", mode="auto")
    assert not tracking.exact
    assert "6.7" in tracking.why


async def test_switched_off_is_not_even_asked():
    keeper = Keeper("kernel")
    assert not (await begin_tracking(keeper, "", mode="private")).exact
    assert keeper.asked == []


@pytest.mark.parametrize("error", [OutOfSpace("full"), DriverFailed("gone")])
async def test_a_vm_that_is_gone_or_a_full_host_is_an_error(error):
    keeper = Keeper(error)
    keeper.gone.set_result(None)
    with pytest.raises(type(error)):
        await begin_tracking(keeper, "", mode="auto")


async def test_a_whole_capture_waits_until_it_is_told_that_every_page_is_there():
    """Told between the question and the waiting, told late, told for one pager of two."""
    keeper = Keeper("kernel")
    keeper.filled = asyncio.Event()
    absent = [True, True, True, False]

    async def tracking():
        keeper.asked.append("tracking")
        here = absent.pop(0)
        if len(absent) == 2:  # told before the answer is looked at
            keeper.filled.set()
        elif here:
            asyncio.get_running_loop().call_soon(keeper.filled.set)
        return "kernel", "", here

    keeper.tracking = tracking
    await MemoryCapture(keeper, Plan(True, "all")).prepare()
    assert keeper.asked == ["tracking"] * 4 + ["all"]


async def test_a_vm_that_goes_meanwhile_is_not_waited_for():
    keeper = Keeper("kernel")
    keeper.filled = asyncio.Event()

    async def tracking():
        if keeper.gone.done():
            raise DriverFailed("the VM is gone")
        asyncio.get_running_loop().call_soon(keeper.gone.set_result, None)
        return "kernel", "", True

    keeper.tracking = tracking
    with pytest.raises(DriverFailed):
        await MemoryCapture(keeper, Plan(True, "all")).prepare()


async def test_what_was_prepared_is_given_up():
    keeper = Keeper("kernel")
    capture = MemoryCapture(keeper, Plan(True, "delta", "snp_a"))
    await capture.prepare()
    await capture.drop()
    await capture.drop()
    assert keeper.asked == ["delta", "release", "release"]
