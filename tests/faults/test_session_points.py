"""The server dies at every named point of the sessions room; the next one carries on and nothing is lost or doubled."""

import asyncio

import pytest

from recess import crashpoints
from recess.testing.crash import known_crash_points
from recess.testing.session_world import appears, coder_world, deploy_coder, kinds, machine_of, notes, world

LIFE = [
    "session.after_assistant",
    "session.after_freeze",
    "session.after_restore",
    "session.after_snapshot",
    "session.after_thaw",
    "session.after_tool_result",
    "session.after_tool_start",
    "session.after_turn_end",
    "session.after_turn_start",
    "session.before_append",
    "session.before_freeze",
]
# The machine is up and the row still says frozen: the next server ends it and restores, with memory on real machines,
# without on these.
BEFORE_RUNNING = ("session.after_thaw", "session.after_restore", "session.before_append")
UPGRADE = ["session.after_code", "session.before_upgrade", "session.after_upgrade_stop"]
RECOVERY = ["session.after_settle"]
FORK = ["session.after_live_snapshot", "session.after_fork"]
REWIND = ["session.after_rewind"]
WAITING = ["session.after_ask", "session.after_timer"]
CHILDREN = ["session.after_spawn", "session.before_report", "session.after_report"]
CANCEL = ["session.before_cancel"]
REBOOT = ["session.after_reboot"]
WAITER = """
import asyncio, os, pathlib
from recess_agent import agent

SHARED = pathlib.Path(os.environ["SHARED"])

@agent(image="base", idle="30s")
async def me(s):
    async for turn in s:
        if turn.text == "ask":
            await s.say("heard " + str(await s.ask("well?", timeout=3600)))
        elif turn.text == "spawn":
            report = await s.spawn("me", "be small")
            await s.say(report.text + " " + report.status)
        elif turn.text == "stuck":
            (SHARED / "stuck").touch()
            while turn.text:
                await asyncio.sleep(0.01)
        else:
            await s.say("I am " + turn.text)
"""


def test_every_point_is_tried():
    assert sorted(
        LIFE + UPGRADE + RECOVERY + FORK + REWIND + WAITING + CHILDREN + CANCEL + REBOOT
    ) == known_crash_points("session.")


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    crashpoints.disarm_all()


async def crash_at(w, name, *, kill_machine=""):
    """Wait until the armed point was passed, then lose the server."""
    async with asyncio.timeout(20):
        while name in crashpoints._armed:
            await asyncio.sleep(0.005)
    if kill_machine:
        await w.sessions.abandon()
        await w.machines.kill(kill_machine, why="test")
    await w.crash_server()


@pytest.mark.parametrize("vm", ["lives", "dies"])
@pytest.mark.parametrize("name", LIFE)
async def test_a_crash_in_the_life_of_a_session(tmp_path, name, vm):
    async with coder_world(tmp_path) as (w, s):
        (tmp_path / "go-a").touch()
        await w.say(s, "work a", turn=1)
        await w.until_state(s, "frozen")
        crashpoints.arm(name)
        await w.sessions.send(s, "work a", key="m2")
        await crash_at(w, name, kill_machine=await machine_of(w, s) if vm == "dies" else "")
        await w.sessions.recover()
        await w.until(s, "turn.end", count=2)
        await w.say(s, "hi", turn=3)
        log = await w.entries(s)
        assert [e.body["status"] for e in log if e.kind == "turn.end"] == ["done"] * 3
        inboxes = {e.turn: e.body["inbox"] for e in log if e.kind == "turn.start"}
        users = [e.position for e in log if e.kind == "user"]
        assert list(inboxes.values()) == users  # each message answered by its own turn, in order
        await w.until_state(s, "frozen")
        row = await w.log.get(s)
        assert row.snapshot_position == row.head
        if vm == "lives" and name not in BEFORE_RUNNING:
            assert {n["pid"] for n in notes(log)} == {notes(log)[0]["pid"]}  # the very same process all along


@pytest.mark.parametrize("name", UPGRADE)
async def test_a_crash_in_an_upgrade(tmp_path, name):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        crashpoints.arm(name)
        new = await deploy_coder(w, tmp_path, "2")
        await w.sessions.send(s, "two", key="m2")
        await crash_at(w, name)
        await w.sessions.recover()
        await w.until(s, "turn.end", count=2)
        log = await w.entries(s)
        assert notes(log)[-1]["version"] == "2"
        assert (await w.log.get(s)).code_version == new.version
        assert 1 <= kinds(log).count("code") <= 2


async def test_a_crash_after_the_settle_pass(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "launch x", key="m1")
        await w.until(s, "tool.start")
        machine = await machine_of(w, s)
        await w.sessions.abandon()
        await w.machines.kill(machine, why="test")
        crashpoints.arm("session.after_settle")
        w.new_server()
        await w.sessions.recover()
        await crash_at(w, "session.after_settle")
        await w.sessions.recover()
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert kinds(log).count("tool.doubt") == 1
        assert kinds(log).count("turn.cut") == 1


@pytest.mark.parametrize("name", FORK)
async def test_a_crash_in_a_fork_leaves_the_parent_whole(tmp_path, name):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        crashpoints.arm(name)
        fork = asyncio.create_task(w.sessions.fork(s))
        await crash_at(w, name)
        fork.cancel()
        await asyncio.gather(fork, return_exceptions=True)
        await w.sessions.recover()
        await w.say(s, "two", turn=2)
        child = await w.sessions.fork(s)
        await w.say(child.id, "three", turn=3)
        assert kinds(await w.entries(s)).count("turn.end") == 2


async def test_a_crash_in_a_rewind_can_be_repeated(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        await w.until_state(s, "frozen")
        mark = (await w.log.get(s)).head
        await w.say(s, "two", turn=2)
        await w.until_state(s, "frozen")
        crashpoints.arm("session.after_rewind")
        with pytest.raises(crashpoints.Crashed):
            await w.sessions.rewind(s, to=mark)
        await w.crash_server()
        await w.sessions.recover()
        await w.sessions.rewind(s, to=mark)
        await w.say(s, "three", turn=3)


async def waiter(w, shared):
    await w.sessions.deploy("me", {"agent.py": WAITER}, {"env": {"SHARED": str(shared)}})
    return (await w.sessions.start("me")).id


@pytest.mark.parametrize("vm", ["lives", "dies"])
@pytest.mark.parametrize("name", [*WAITING, "session.after_freeze", "session.after_snapshot", "session.before_freeze"])
async def test_a_crash_around_a_question(tmp_path, name, vm):
    async with world() as w:
        s = await waiter(w, tmp_path)
        await w.say(s, "here", turn=1)
        crashpoints.arm(name)
        await w.sessions.send(s, "ask", key="m2")
        await crash_at(w, name, kill_machine=await machine_of(w, s) if vm == "dies" else "")
        await w.sessions.recover()
        await w.until(s, "ask")
        await w.until_state(s, "frozen")
        (question,) = await w.sessions.questions(s)
        await w.sessions.answer(s, question.ref, "yes")
        await w.until(s, "turn.end", count=2)
        log = await w.entries(s)
        assert [e.body["text"] for e in log if e.kind == "assistant"] == ["I am here", "heard yes"]
        assert kinds(log).count("ask") == kinds(log).count("timer") == kinds(log).count("answer") == 1


@pytest.mark.parametrize("name", CHILDREN)
async def test_a_crash_around_a_child(tmp_path, name):
    async with world() as w:
        s = await waiter(w, tmp_path)
        crashpoints.arm(name)
        await w.sessions.send(s, "spawn", key="m1")
        await crash_at(w, name)
        await w.sessions.recover()
        await w.until(s, "turn.end", timeout_s=40)
        log = await w.entries(s)
        assert [e.body["text"] for e in log if e.kind == "assistant"] == ["I am be small done"]
        assert kinds(log).count("x.spawn") == kinds(log).count("answer") == 1
        (child,) = [e.body["child"] for e in log if e.kind == "x.spawn"]
        assert kinds(await w.entries(child)).count("turn.end") == 1


async def test_a_crash_in_a_cancel_cancels_once_more(tmp_path):
    async with world(cancel_s=0.2, term_s=0.2) as w:
        s = await waiter(w, tmp_path)
        await w.sessions.send(s, "stuck", key="m1")
        await appears(tmp_path / "stuck")
        crashpoints.arm("session.before_cancel")
        await w.sessions.cancel(s)
        await crash_at(w, "session.before_cancel")
        await w.sessions.recover()
        assert (await w.until(s, "turn.end")).body["status"] == "cancelled"
        await w.sessions.send(s, "here", key="m2")
        await w.until(s, "turn.end", count=2)
        assert [e.body["status"] for e in await w.entries(s) if e.kind == "turn.end"] == ["cancelled", "done"]


async def test_a_crash_right_after_a_cancelled_turn_does_not_cancel_the_next(tmp_path):
    async with world() as w:
        s = await waiter(w, tmp_path)
        await w.say(s, "here", turn=1)
        await w.sessions.send(s, "ask", key="m2")
        await w.until(s, "ask")
        await w.sessions.send(s, "seen", key="steer", mode="steer")
        await w.sessions.send(s, "next", key="next")
        crashpoints.arm("session.after_turn_end")
        await w.sessions.cancel(s)
        await crash_at(w, "session.after_turn_end")
        await w.sessions.recover()
        await w.until(s, "turn.end", count=3)
        await w.say(s, "last", turn=4)
        log = await w.entries(s)
        assert [e.body["status"] for e in log if e.kind == "turn.end"] == ["done", "cancelled", "done", "done"]
        said = [e.body["text"] for e in log if e.kind == "assistant"]
        assert said == ["I am here", "I am next", "I am last"]  # the steering message is not begun a second time


@pytest.mark.parametrize("vm", ["lives", "dies"])
async def test_a_crash_while_a_machine_boots_another_image(tmp_path, vm):
    async with coder_world(tmp_path, idle_timeout_s=60.0) as (w, s):
        await w.say(s, "one", turn=1)
        machine = await machine_of(w, s)
        await (await w.machines.link(machine)).write_file("/root/kept", b"file")
        await deploy_coder(w, tmp_path, "2", image="other")
        crashpoints.arm("session.after_reboot")
        await w.sessions.send(s, "two", key="m2")
        await crash_at(w, "session.after_reboot", kill_machine=machine if vm == "dies" else "")
        await w.sessions.recover()
        await w.until(s, "turn.end", count=2)
        assert await machine_of(w, s) == machine
        assert (await w.machines.get(machine)).spec.image == "other"
        assert await (await w.machines.link(machine)).read_file("/root/kept") == b"file"
        assert notes(await w.entries(s))[-1]["version"] == "2"


async def test_a_crash_while_a_machine_gets_more_memory(tmp_path):
    async with coder_world(tmp_path, idle_timeout_s=60.0) as (w, s):
        await w.say(s, "one", turn=1)
        machine = await machine_of(w, s)
        before = (await w.machines.get(machine)).spec.memory_bytes
        crashpoints.arm("session.after_reboot")
        await w.sessions.send(s, "work a", key="m2")
        await appears(tmp_path / "work-a")
        link = await w.machines.link(machine)
        await link.write_file("/oom-kills", b"x")
        link.signal_all(9)
        await crash_at(w, "session.after_reboot")
        (tmp_path / "go-a").touch()
        await w.sessions.recover()
        end = await w.until(s, "turn.end", count=2)
        assert end.body["status"] == "done", "cut with less memory than it has now: once more, in this one"
        assert (await w.machines.get(machine)).spec.memory_bytes == 2 * before
