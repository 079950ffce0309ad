"""Crashes in the middle of a turn: what is lost is said, what happened once stays once."""

import asyncio
import os

import pytest

from recess import crashpoints
from recess.contextlog.transcript import messages
from recess.errors import Corrupt, Incompatible, NotFound
from recess.testing.session_agents import coder
from recess.testing.session_world import appears, coder_world, deploy_coder, kinds, machine_of, notes, texts


async def test_server_dies_and_the_machine_lives_on(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "work a", key="1")
        await appears(tmp_path / "work-a")
        await w.crash_server()
        assert await w.sessions.recover() == [s]
        await w.until(s, "machine.restore", count=2)
        (tmp_path / "go-a").touch()
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert "turn.cut" not in kinds(log)
        assert kinds(log).count("turn.start") == 1
        assert (tmp_path / "work-a").read_text() == "x\n"
        assert texts(log)[-1] == "after: worked a"
        restore = [e for e in log if e.kind == "machine.restore"][-1]
        assert restore.body["rung"] == 1
        assert restore.body["agent_kept"] is True


async def test_server_dies_and_the_tool_ends_before_the_next_server(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "work a", key="1")
        await appears(tmp_path / "work-a")
        await w.sessions.abandon()
        await w.machines.drop_streams()
        (tmp_path / "go-a").touch()
        w.new_server()
        await w.sessions.recover()
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert kinds(log).count("tool.result") == 1
        assert kinds(log).count("turn.start") == 1


async def test_a_stream_that_comes_while_nobody_serves_finds_the_next_server_soon(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "work a", key="1")
        await appears(tmp_path / "work-a")
        machine = w.machines.machines[await machine_of(w, s)]
        await w.sessions.abandon()
        before = machine.accepted
        async with asyncio.timeout(10):
            while machine.accepted < before + 2:  # it came, was sent away, and came again
                await asyncio.sleep(0.01)
        (tmp_path / "go-a").touch()
        w.new_server()
        await w.sessions.recover()
        await w.until(s, "turn.end", timeout_s=10)
        assert kinds(await w.entries(s)).count("turn.start") == 1


async def test_a_server_that_is_cut_off_while_it_leaves_keeps_no_agent_to_itself(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "work a", key="1")
        await appears(tmp_path / "work-a")
        machine = w.machines.machines[await machine_of(w, s)]
        left = asyncio.Event()

        async def endless():
            left.set()
            await asyncio.Event().wait()

        w.sessions._live[s].job.forget = endless
        w.sessions._tasks[s].cancel()
        await left.wait()
        await w.sessions.abandon()
        await w.machines.drop_streams()
        before = machine.accepted
        async with asyncio.timeout(10):
            while machine.accepted < before + 2:  # it is sent away, and comes again
                await asyncio.sleep(0.01)
        w.new_server()
        await w.sessions.recover()
        (tmp_path / "go-a").touch()
        await w.until(s, "turn.end", timeout_s=10)
        assert kinds(await w.entries(s)).count("turn.start") == 1


async def test_machine_dies_in_a_local_tool(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "hi", turn=1)
        await w.until_state(s, "frozen")
        await w.sessions.send(s, "work a", key="2")
        await appears(tmp_path / "work-a")
        await w.machines.kill(await machine_of(w, s), why="test")
        await w.until(s, "turn.end", count=2)
        log = await w.entries(s)
        result = [e for e in log if e.kind == "tool.result"][-1]
        assert result.body["error"] is True
        assert "lost" in result.body["output"]
        restore = [e for e in log if e.kind == "machine.restore"][-1]
        assert restore.body["stale"] is True
        assert restore.body["rung"] == 2
        assert [e.body["attempt"] for e in log if e.kind == "turn.start" and e.turn == 2] == [1, 2]
        assert "machine.lost" in kinds(log)
        assert notes(log)[-1]["attempt"] == 2
        assert texts(log)[-1].startswith("after: [recess] Your turn was cut (crash)")  # told once, and it said so
        assert texts(log)[-1].count("[recess]") == 1
        assert f"on rung 2 from its snapshot at entry {restore.body['position']} of the log" in texts(log)[-1]
        assert [m["text"] for m in messages(log) if m.get("note")] == [texts(log)[-1].removeprefix("after: ")]


async def test_a_crash_between_a_restore_and_its_entry_does_not_hide_the_loss(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await deploy_coder(w, tmp_path, "quiet", idle="60s")
        await w.say(s, "hi", turn=1)
        await w.sessions.suspend(s)
        await w.say(s, "again", turn=2)
        await w.sessions.abandon()
        await w.machines.kill(await machine_of(w, s), why="test")
        crashpoints.arm("session.before_append")
        w.new_server()
        await w.sessions.recover()
        async with asyncio.timeout(10):
            while crashpoints.is_armed("session.before_append"):
                await asyncio.sleep(0.005)
        assert (await w.machines.get(await machine_of(w, s))).state == "running", "it is back, and nobody was told"
        await w.crash_server()
        await w.sessions.recover()
        restore = await w.until(s, "machine.restore", count=3)
        assert (restore.body["rung"], restore.body["stale"]) == (2, True)
        assert restore.body["lost"].startswith("files, processes and memory changed after entry")
        await w.say(s, "and now", turn=3)


async def test_machine_dies_before_any_snapshot_and_its_disk_is_booted(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "work a", key="1")
        await appears(tmp_path / "work-a")
        machine = await machine_of(w, s)
        await (await w.machines.link(machine)).write_file("/root/kept", b"files are kept")
        await w.machines.kill(machine, why="test")
        await w.until(s, "turn.end")
        log = await w.entries(s)
        restore = [e for e in log if e.kind == "machine.restore"][-1]
        assert (restore.body["rung"], restore.body["stale"], restore.body["agent_kept"]) == (4, False, False)
        assert restore.body["lost"] == "processes and memory of before; no file"
        assert await machine_of(w, s) == machine
        assert await (await w.machines.link(machine)).read_file("/root/kept") == b"files are kept"
        (result,) = [e.body["output"] for e in log if e.kind == "tool.result"]
        assert result.startswith("interrupted")  # its files are there, as far as it got
        (note,) = [m["text"] for m in messages(log) if m.get("note")]
        assert "(rung 4): files are kept, processes and memory are gone" in note


async def test_a_snapshot_that_cannot_be_used_leaves_its_disk(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "hi", turn=1)
        await w.until_state(s, "frozen")
        position = (await w.log.get(s)).snapshot_position
        w.machines.fail_next["resume"] = Corrupt("a layer is damaged")
        w.machines.fail_next["restore"] = Incompatible("another CPU")
        before = notes(await w.entries(s))[0]["pid"]
        await w.say(s, "again", turn=2)
        with pytest.raises(ProcessLookupError):
            os.kill(before, 0)  # what a cold boot ends is gone
        restore = (await w.entries(s, "machine.restore"))[-1]
        assert restore.body["rung"] == 4
        assert restore.body["position"] == position
        assert "resume failed: a layer is damaged" in restore.body["why"]
        assert "restore failed: another CPU" in restore.body["why"]


async def test_with_nothing_left_the_machine_is_a_fresh_one(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "work a", key="1")
        await appears(tmp_path / "work-a")
        w.machines.fail_next["bring_back"] = NotFound("its disk is gone")
        await w.machines.kill(await machine_of(w, s), why="test")
        await w.until(s, "turn.end")
        restore = (await w.entries(s, "machine.restore"))[-1]
        assert restore.body["rung"] == 5
        assert restore.body["stale"] is True
        assert restore.body["lost"] == "all files, processes and memory of before"


@pytest.mark.parametrize("stored", [True, False])
async def test_a_damaged_row_of_its_machine_costs_the_session_no_message(tmp_path, stored):
    async with coder_world(tmp_path) as (w, s):
        if not stored:
            await deploy_coder(w, tmp_path, "quiet", idle="60s")
        await w.say(s, "hi", turn=1)
        if stored:
            await w.until_state(s, "frozen")
        damaged = await machine_of(w, s)
        await w.crash_server()
        whole = w.machines.get

        async def get(ref):
            if ref == damaged:
                raise Corrupt("the machine's row says nonsense")
            return await whole(ref)

        w.machines.get = get
        await w.sessions.recover()
        await w.say(s, "again", turn=2)
        restore = (await w.entries(s, "machine.restore"))[-1]
        assert restore.body["rung"] == (2 if stored else 5)
        assert f"its machine {damaged} cannot be read: the machine's row says nonsense" in restore.body["why"]
        assert restore.body.get("lost", "") == ("" if stored else "all files, processes and memory of before")
        assert await machine_of(w, s) != damaged
        assert not w.sessions.gate.may_act(damaged, 1)
        assert damaged in w.machines.machines, "what it stands for is left alone"


async def test_charge_stands_once_when_machine_and_server_die(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "charge 500", key="1")
        await appears(tmp_path / "charge-done")
        machine = await machine_of(w, s)
        await w.sessions.abandon()
        await w.machines.kill(machine, why="test")
        w.new_server()
        await w.sessions.recover()
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert len((tmp_path / "charges").read_text().split()) == 1
        settled = [e for e in log if e.kind == "tool.settled"]
        assert len(settled) == 1
        assert settled[0].body["by"] == "verify"
        assert "tool.doubt" not in kinds(log)
        cut = [e for e in log if e.kind == "turn.cut"]
        assert [e.body["cause"] for e in cut] == ["crash"]


async def test_a_charge_that_did_not_happen_is_made(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "charge 500", key="1")
        await appears(tmp_path / "charge-done")
        machine = await machine_of(w, s)
        await w.sessions.abandon()
        await w.machines.kill(machine, why="test")
        (tmp_path / "charges").unlink()  # the provider never saw it
        (tmp_path / "go-charge").touch()
        w.new_server()
        await w.sessions.recover()
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert len((tmp_path / "charges").read_text().split()) == 1
        assert kinds(log).count("tool.result") == 1


async def test_once_without_verify_is_a_visible_doubt(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "launch rocket", key="1")
        await appears(tmp_path / "launches")
        await w.machines.kill(await machine_of(w, s), why="test")
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert kinds(log).count("tool.doubt") == 1
        assert (tmp_path / "launches").read_text() == "rocket\n"


async def test_pure_is_run_again(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "look sky", key="1")
        await appears(tmp_path / "looks")
        (tmp_path / "go-look").touch(exist_ok=True)
        await w.until(s, "turn.end")
        (tmp_path / "go-look").unlink()
        await w.sessions.send(s, "look sea", key="2")
        async with asyncio.timeout(20):
            while "sea" not in (tmp_path / "looks").read_text():
                await asyncio.sleep(0.01)
        await w.machines.kill(await machine_of(w, s), why="test")
        (tmp_path / "go-look").touch()
        await w.until(s, "turn.end", count=2)
        log = await w.entries(s)
        results = [e.body for e in log if e.kind == "tool.result"]
        assert results[-1] == {"output": "seen sea"}


async def test_keyed_is_run_again_with_the_same_key(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "order tea", key="1")
        await appears(tmp_path / "orders")
        machine = await machine_of(w, s)
        await w.sessions.abandon()
        await w.machines.kill(machine, why="test")
        (tmp_path / "go-order").touch()
        w.new_server()
        await w.sessions.recover()
        await w.until(s, "turn.end")
        log = await w.entries(s)
        first, second = (tmp_path / "orders").read_text().split()
        assert first == second, "the provider must see one order"
        assert [dict(e.body) for e in log if e.kind == "tool.result"] == [{"output": "ordered tea"}]
        assert kinds(log).count("tool.start") == 1
        other = (await w.sessions.start("coder")).id
        await w.say(other, "order tea", turn=1)
        assert (tmp_path / "orders").read_text().split()[2] != first, "another session's order is another order"


async def test_what_new_code_calls_once_is_not_run_again(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "order tea", key="1")
        await appears(tmp_path / "orders")
        files = {"agent.py": coder("2", order_effect="once")}
        await w.sessions.deploy("coder", files, {"env": {"SHARED": str(tmp_path)}, "policy": "now"})
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert kinds(log).count("tool.doubt") == 1
        assert len((tmp_path / "orders").read_text().split()) == 1


async def test_attempts_are_capped_and_the_session_waits_for_a_human(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "die 3", key="1")
        end = await w.until(s, "turn.end", timeout_s=40)
        assert end.body["status"] == "failed"
        log = await w.entries(s)
        assert "code 3" in end.body["error"]
        assert kinds(log).count("turn.cut") == 3
        assert [e.body["attempt"] for e in log if e.kind == "turn.start"] == [1, 2, 3]
        assert len((tmp_path / "deaths").read_text().split()) == 3
        after = await w.say(s, "hi", turn=2)
        assert after[-1].body["status"] == "done"
        assert [e.body["attempt"] for e in after if e.kind == "turn.start" and e.turn == 2] == [1]


async def test_detached_server_leaves_the_machine_to_the_next(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "work a", key="1")
        await appears(tmp_path / "work-a")
        await w.sessions.shutdown(detach=True)
        machine = await machine_of(w, s)
        assert (await w.machines.get(machine)).state == "running"
        assert w.machines.deadlines[machine] is None
        await w.machines.drop_streams()
        w.new_server()
        await w.sessions.recover()
        (tmp_path / "go-a").touch()
        await w.until(s, "turn.end")
        assert kinds(await w.entries(s)).count("turn.start") == 1
