"""Two servers, one session, pauses past the lease and clocks that jump: one writer, and the loser acts on nothing."""

import asyncio
import random

import pytest

from recess.contextlog.transcript import check_transcript, messages
from recess.testing.payment_server import PaymentServer
from recess.testing.session_nodes import two_nodes
from recess.testing.session_world import appears, deploy_coder, machine_of


async def at_work(node, shared, name):
    """Start a session on a node and bring it into a tool; returns the session and its machine there."""
    await deploy_coder(node, shared, "1", idle="60s")
    session = (await node.sessions.start("coder")).id
    await node.sessions.send(session, f"work {name}", key="1")
    await appears(shared / f"work-{name}")
    return session, await machine_of(node, session)


def one_writer_at_a_time(log):
    """No entry of an older owner stands behind one of a newer owner."""
    epochs = [e.epoch for e in log if e.epoch]
    return epochs == sorted(epochs)


async def taken_over(node, session, epoch):
    """Wait until this epoch's owner has written."""
    async with asyncio.timeout(30):
        while (row := await node.log.get(session)).epoch < epoch:
            await node.log.wait(session, row.head, 0.1)


async def test_a_host_that_stood_still_past_its_lease_wakes_up_fenced(tmp_path):
    async with two_nodes() as (a, b), PaymentServer("k") as outside:
        s, machine = await at_work(a, tmp_path, "a")
        assert await a.outside_call(machine, 1, outside.port) == 401  # it got through: the provider wants its key
        gate_lost = asyncio.create_task(a.sessions.gate.wait_lost(machine, 1))
        a.stand_still(whole_host=True)
        b.clock.jump(5)
        (tmp_path / "go-a").touch()
        await b.sessions.send(s, "hi", key="2")
        await b.until(s, "turn.end", count=2)
        before = await b.entries(s)
        a.clock.jump(5)  # it wakes up; not one word of the log has reached it yet
        assert not a.sessions.gate.may_act(machine, 1)
        await asyncio.wait_for(gate_lost, 5)
        assert await a.outside_call(machine, 1, outside.port) >= 500
        a.go_on()
        await asyncio.wait_for(a.sessions.settled(s), 10)
        assert (await a.machines.get(machine)).state == "dead"
        assert await a.outside_call(machine, 1, outside.port) >= 500
        log = await b.entries(s)
        assert one_writer_at_a_time(log)
        assert [e for e in log[: len(before)] if e.kind == "tool.result" and e.epoch == 1] == [], (
            "a's result came too late"
        )
        assert check_transcript(messages(log)) == []
        assert b.sessions.gate.may_act(await machine_of(b, s), 2)


async def test_a_server_that_hangs_is_outlived_by_its_keeper(tmp_path):
    async with two_nodes() as (a, b):
        s, machine = await at_work(a, tmp_path, "a")
        order = []
        a.stand_still(whole_host=False)
        dead = asyncio.create_task(a.machines.wait_dead(machine))
        dead.add_done_callback(lambda _: order.append("dead"))
        claims = b.log.claim

        async def claim(*args, **kwargs):
            row = await claims(*args, **kwargs)
            order.append("claimed")
            return row

        b.log.claim = claim
        (tmp_path / "go-a").touch()
        await b.sessions.send(s, "hi", key="2")  # refused the lease until it has ended, and tried again
        await b.until(s, "turn.end", count=2, timeout_s=30)
        assert order == ["dead", "claimed"], "the machine was ended before anybody else could own its session"
        assert await asyncio.wait_for(dead, 1) == "its keeper's deadline has passed"
        a.go_on()
        await asyncio.wait_for(a.sessions.settled(s), 10)
        assert one_writer_at_a_time(await b.entries(s))


async def test_a_node_whose_clock_runs_ahead_steals_the_session_and_there_is_still_one_writer(tmp_path):
    async with two_nodes(lease_s=3.0, margin_s=0.5) as (a, b):
        s, machine = await at_work(a, tmp_path, "a")
        b.clock.jump(3600)  # b believes that a's lease ended long ago; a is well
        await b.sessions.send(s, "hi", key="2")
        await taken_over(b, s, 2)
        await asyncio.wait_for(a.sessions.settled(s), 10)  # its next renewal says so
        assert (await a.machines.get(machine)).state == "dead"
        assert not a.sessions.gate.may_act(machine, 1)
        (tmp_path / "go-a").touch()
        await b.until(s, "turn.end", count=2)
        log = await b.entries(s)
        assert one_writer_at_a_time(log)
        assert [e.body["status"] for e in log if e.kind == "turn.end"] == ["done", "done"]


async def test_a_clock_that_falls_back_gives_the_session_away_and_nothing_else(tmp_path):
    async with two_nodes(lease_s=3.0, margin_s=0.5) as (a, b):
        s, machine = await at_work(a, tmp_path, "a")
        a.clock.set_wall(-3600)
        async with asyncio.timeout(20):
            while (await b.log.get(s)).lease_until > b.clock.wall_s():  # until the renewal that says so
                await asyncio.sleep(0.05)
        assert a.sessions.gate.may_act(machine, 1), "its lease is measured by the clock that does not jump"
        await b.sessions.send(s, "hi", key="2")
        await taken_over(b, s, 2)
        await asyncio.wait_for(a.sessions.settled(s), 10)
        assert (await a.machines.get(machine)).state == "dead"
        (tmp_path / "go-a").touch()
        await b.until(s, "turn.end", count=2)
        assert one_writer_at_a_time(await b.entries(s))


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_session_that_is_fought_over_answers_each_message_once(tmp_path, seed):
    draw = random.Random(seed)
    async with two_nodes() as (a, b):
        await deploy_coder(a, tmp_path, "1", idle="60s")
        s = (await a.sessions.start("coder")).id
        said = []
        for n in range(5):
            here, there = draw.sample([a, b], 2)
            still = draw.random() < 0.6
            if still:
                there.stand_still(whole_host=draw.random() < 0.5)
            # By the wall clock of the node that goes on, the lease has ended: by one that is hours ahead, hours later.
            left = (await here.log.get(s)).lease_until - here.clock.wall_s()
            for node in (a, b) if draw.random() < 0.5 else (here,):
                node.clock.jump(max(left, 0.0) + draw.choice([2.0, 3600.0]))
            said.append((await here.sessions.send(s, f"say {n}", key=str(n))).position)
            if not still:  # the client hears nothing and says it to the other node too
                assert (await there.sessions.send(s, f"say {n}", key=str(n))).replayed
            await here.until(s, "turn.end", count=n + 1, timeout_s=30)
            there.go_on()
        log = await a.entries(s)
        assert one_writer_at_a_time(log)
        assert {e.turn: e.body["inbox"] for e in log if e.kind == "turn.start"} == dict(enumerate(said, 1))
        assert [e.turn for e in log if e.kind == "turn.end"] == [1, 2, 3, 4, 5]
        assert check_transcript(messages(log)) == []
