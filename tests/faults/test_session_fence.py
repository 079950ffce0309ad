"""Two owners of one session: the loser is fenced at the log and at the gate, and ends its VM by itself."""

import asyncio

from recess.errors import Unavailable
from recess.testing.session_world import appears, coder_world, machine_of


async def test_a_newer_epoch_ends_the_older_owner(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "work a", key="1")
        await appears(tmp_path / "work-a")
        machine, gate = await machine_of(w, s), w.sessions.gate
        assert gate.may_act(machine, 1)
        assert not gate.may_act(machine, 2)
        assert not gate.may_act("mch_other", 1)
        lost = asyncio.create_task(gate.wait_lost(machine, 1))
        await w.log.claim(s, "server-2", 60.0, now=w.clock.wall_s(), force=True)
        (tmp_path / "go-a").touch()  # its next append finds out
        await asyncio.wait_for(lost, 10)
        await w.sessions.settled(s)
        assert not gate.may_act(machine, 1)
        assert (await w.machines.get(machine)).state == "dead"
        assert "tool.result" not in [e.kind for e in await w.entries(s)]


async def test_a_machine_that_outlives_several_servers_may_still_call_outside(tmp_path):
    """The broker knows a VM by the epoch that it was let run under, and no server that re-attaches lets it run anew."""
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "work a", key="1")
        await appears(tmp_path / "work-a")
        machine = await machine_of(w, s)
        for count in range(2, 5):
            await w.crash_server()
            await w.sessions.recover()
            await w.until(s, "machine.restore", count=count)
            async with asyncio.timeout(10):
                while not w.sessions.gate.may_act(machine, 1):
                    await w.log.wait(s, (await w.log.get(s)).head, 0.05)
        (tmp_path / "go-a").touch()
        await w.until(s, "turn.end")


async def test_the_gate_closes_at_the_leases_end_without_the_database(tmp_path):
    async with coder_world(tmp_path, lease_s=0.9, margin_s=0.3, embedded=False) as (w, s):
        await w.sessions.send(s, "work a", key="1")
        await appears(tmp_path / "work-a")
        machine, gate = await machine_of(w, s), w.sessions.gate

        async def down(*args, **kwargs):
            raise Unavailable("the log store is down")

        w.log.renew = down
        await asyncio.wait_for(gate.wait_lost(machine, 1), 10)
        await asyncio.wait_for(w.sessions.settled(s), 10)
        assert (await w.machines.get(machine)).state == "dead"


async def test_a_renewed_lease_outlives_its_first_term(tmp_path):
    async with coder_world(tmp_path, lease_s=0.6, margin_s=0.1, embedded=False) as (w, s):
        await w.sessions.send(s, "work a", key="1")
        await appears(tmp_path / "work-a")
        machine = await machine_of(w, s)
        first = (await w.log.get(s)).lease_until
        async with asyncio.timeout(10):
            while (await w.log.get(s)).lease_until <= first + 0.6:
                await asyncio.sleep(0.05)
        assert w.sessions.gate.may_act(machine, 1)
        assert 0 < w.machines.deadlines[machine] <= 0.5
        (tmp_path / "go-a").touch()
        await w.until(s, "turn.end")
