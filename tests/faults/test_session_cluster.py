"""Two nodes on one Postgres: each hears what the other writes; one that dies or stands still loses its sessions, and no more."""

import asyncio
import contextlib

import pytest

from recess.contextlog import SCHEMA, MemoryBodies, SqlLog
from recess.contextlog.transcript import check_transcript, messages
from recess.db import Database
from recess.errors import Unavailable
from recess.sessions.takeover import take_over
from recess.testing.postgres_server import PostgresServer
from recess.testing.session_nodes import two_nodes
from recess.testing.session_world import appears, deploy_coder, machine_of, texts


@contextlib.asynccontextmanager
async def cluster(server, **settings):
    """Two nodes over a log of their own in this server, each with a connection of its own, hearing each other."""
    where, bodies = server.database(), MemoryBodies()
    opened = [Database.open(where, [SCHEMA]) for _ in range(2)]
    logs = tuple(SqlLog(db, bodies) for db in opened)
    for db in opened:
        await asyncio.to_thread(db._listener.ready.wait, 60)
    loop = asyncio.get_running_loop()
    try:
        async with two_nodes(logs=logs, **settings) as nodes:
            for node, log in zip(nodes, logs, strict=True):
                log.watch(lambda session, n=node: loop.call_soon_threadsafe(n.sessions.heard, session))
            yield nodes
    finally:
        await asyncio.gather(*(db.close() for db in opened))


async def at_work(node, shared, name):
    """Start a session on a node and bring it into a tool."""
    await deploy_coder(node, shared, "1", idle="60s")
    session = (await node.sessions.start("coder")).id
    await node.sessions.send(session, f"work {name}", key="1")
    await appears(shared / f"work-{name}")
    return session, await machine_of(node, session)


async def test_a_message_that_another_node_took_is_answered_by_the_owner(tmp_path, postgres):
    async with cluster(postgres, lease_s=30.0) as (a, b):
        await deploy_coder(a, tmp_path, "1", idle="60s")
        session = (await a.sessions.start("coder")).id
        await a.say(session, "one", turn=1)
        done = await b.log.append_inbox(session, talk("two", "m2"))  # as an API of b does, which drives nothing here
        entry = await b.until(session, "turn.end", count=2)
        assert entry.position > done.position
        log = await b.entries(session)
        assert (await b.log.get(session)).owner == "node-a"
        assert {e.epoch for e in log if e.epoch} == {1}
        assert len(texts(log)) == 2


def talk(text, key):
    from recess.sessions.talking import message

    return message(text, key=key, mode="queue", body={}, max_bytes=1 << 20)


async def test_a_session_of_a_node_that_stands_still_is_taken_over_by_itself(tmp_path, postgres):
    async with cluster(postgres) as (a, b):
        session, machine = await at_work(a, tmp_path, "a")
        looking = asyncio.create_task(take_over(b.sessions))
        a.stand_still(whole_host=True)
        (tmp_path / "go-a").touch()
        b.clock.jump(5)  # past the lease
        await b.until(session, "turn.end")
        row = await b.log.get(session)
        assert (row.owner, row.epoch >= 2) == ("node-b", True)
        a.clock.jump(5)
        assert not a.sessions.gate.may_act(machine, 1)
        a.go_on()
        await asyncio.wait_for(a.sessions.settled(session), 60)
        assert (await a.machines.get(machine)).state == "dead"
        log = await b.entries(session)
        epochs = [e.epoch for e in log if e.epoch]
        assert epochs == sorted(epochs)
        assert check_transcript(messages(log)) == []
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


async def test_a_log_that_cannot_be_reached_stops_the_session_and_it_goes_on_when_it_can(tmp_path):
    """The database goes away under a session at work: nothing is said or done outside, and nothing is lost."""
    with PostgresServer() as server:
        async with cluster(server, lease_s=3.0, margin_s=0.5) as (a, _):
            session, machine = await at_work(a, tmp_path, "a")
            server.stop()
            gone = asyncio.create_task(a.sessions.gate.wait_lost(machine, 1))
            with pytest.raises(Unavailable):
                await a.sessions.send(session, "during", key="2")
            a.clock.jump(5)  # the lease ends; nobody could renew it
            await asyncio.wait_for(gone, 60)
            assert not a.sessions.gate.may_act(machine, 1)
            server.start()
            (tmp_path / "go-a").touch()
            a.clock.jump(5)
            await a.sessions.send(session, "after", key="3")
            await a.until(session, "turn.end", count=2, timeout_s=60)
            log = await a.entries(session)
            assert check_transcript(messages(log)) == []
            assert [e.body["text"] for e in log if e.kind == "user"] == ["work a", "after"]
