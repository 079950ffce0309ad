"""A machine whose driver is not on the node any more goes on under another: from its disk where one boots it, a session else
from its log in a fresh machine. What is lost by that is said, to the user and to the agent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recess.config import Config, load_config
from recess.drivers.gvisor.runsc import find_runsc
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from recess.testing.firecracker_rig import why_no_firecracker
from recess.testing.gvisor_rig import has_runsc
from recess.units import GIB, MIB
from tests.machines.test_sessions import Story, story

GONE = "/nonexistent/program"


@pytest.fixture
def nodes(real_config: Config) -> dict[str, Config]:
    """The same home on a node that has only this driver."""
    if not has_runsc():
        pytest.skip("runsc is not installed")
    runsc = str(find_runsc(load_config()))
    return {
        "qemu": replace(real_config, driver="qemu", runsc_bin=GONE, firecracker_bin=GONE),
        "gvisor": replace(real_config, driver="gvisor", qemu_bin=GONE, firecracker_bin=GONE, runsc_bin=runsc),
        "firecracker": replace(real_config, driver="firecracker", qemu_bin=GONE, runsc_bin=GONE),
    }


async def move(t: Story, config: Config) -> None:
    """Put the session away, and its home onto another node."""
    await t.frozen()
    await t.node.close(detach=True)
    t.node = await LocalNode.open(config)


@pytest.mark.parametrize(
    ("before", "after"),
    [("qemu", "gvisor"), ("gvisor", "qemu"), ("gvisor", "firecracker"), ("firecracker", "gvisor")],
)
async def test_a_session_goes_on_under_the_other_driver(nodes: dict[str, Config], before: str, after: str) -> None:
    if "firecracker" in (before, after) and (why := why_no_firecracker()):
        pytest.skip(why)
    async with story(nodes[before]) as t:
        await t.say("sh echo here > /root/made; cat /root/made", turn=1)
        first = await t.machine()
        assert (await t.node.machines.get(first)).driver == before
        await move(t, nodes[after])
        log = await t.say("sh cat /root/made", turn=2)
        assert (await t.node.machines.get(await t.machine())).driver == after
        restore = [e.body for e in log if e.kind == "machine.restore"][-1]
        assert (restore["rung"], restore["agent_kept"]) == (5, False)
        assert f"it was taken under the driver {before}" in restore["why"]
        told = [e.body["output"] for e in log if e.kind == "tool.result"]
        assert told[0] == "here"
        assert "No such file" in told[1]
        assert [e.body["text"] for e in log if e.kind == "user"] == [
            "sh echo here > /root/made; cat /root/made", "sh cat /root/made",
        ]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [("qemu", "firecracker"), ("firecracker", "qemu")])
async def test_a_disk_boots_under_the_other_driver(real_config: Config, before: str, after: str) -> None:
    if why := why_no_firecracker():
        pytest.skip(why)
    spec = MachineSpec(memory_bytes=256 * MIB, disk_bytes=GIB)
    without = {
        "qemu": replace(real_config, driver=after, qemu_bin=GONE),
        "firecracker": replace(real_config, driver=after, firecracker_bin=GONE),
    }
    node = await LocalNode.open(replace(real_config, driver=before))
    try:
        row = await node.machines.create(spec)
        await node.machines.suspend(row.id)
        await node.close(detach=True)
        node = await LocalNode.open(without[before])
        report = await node.machines.bring_back(row.id)
        assert report.rung == 4
        assert "memory and processes are gone" in report.why
        assert f"under the driver {after}, since {before} is not on this node" in report.why
        await node.machines.remove(row.id, force=True)
    finally:
        await node.close(detach=False)
