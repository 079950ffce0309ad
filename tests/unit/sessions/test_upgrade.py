"""New code takes the next turn; the machine stays; rollback is the same move."""

import pytest

from recess.contextlog.transcript import messages
from recess.errors import BadInput, Incompatible, NotFound
from recess.testing.session_world import appears, coder_world, deploy_coder, kinds, machine_of, notes


async def test_upgrade_at_the_next_turn_and_rollback(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        old = (await w.log.get(s)).code_version
        machine = await machine_of(w, s)
        new = await deploy_coder(w, tmp_path, "2")
        await w.say(s, "two", turn=2)
        log = await w.entries(s)
        assert [n["version"] for n in notes(log)] == ["1", "2"]
        assert [dict(e.body) for e in log if e.kind == "code"] == [{"old": old, "new": new.version}]
        assert kinds(log).index("code") < kinds(log).index("turn.start", kinds(log).index("turn.end"))
        assert await machine_of(w, s) == machine
        assert ("kill", machine) not in w.machines.calls
        assert "turn.cut" not in kinds(log)
        await deploy_coder(w, tmp_path, "1")
        await w.say(s, "three", turn=3)
        assert [n["version"] for n in notes(await w.entries(s))] == ["1", "2", "1"]


async def test_upgrade_of_a_frozen_session_keeps_its_machine(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        await w.until_state(s, "frozen")
        await deploy_coder(w, tmp_path, "2")
        await w.say(s, "two", turn=2)
        log = await w.entries(s)
        assert notes(log)[1]["version"] == "2"
        assert [e.body["rung"] for e in log if e.kind == "machine.restore"] == [5, 2]


async def test_policy_pin_stays(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        await deploy_coder(w, tmp_path, "2", policy="pin")
        await w.say(s, "two", turn=2)
        assert [n["version"] for n in notes(await w.entries(s))] == ["1", "1"]


async def test_policy_contract_stays_until_a_client_needs_more(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        await deploy_coder(w, tmp_path, "2", policy="contract", contract=2)
        await w.say(s, "an old client", turn=2)
        with pytest.raises(
            Incompatible, match="needs contract 3 of agent coder: the session's code has 0, the deployed 2"
        ):
            await w.sessions.send(s, "a client of tomorrow", contract=3)
        await w.sessions.send(s, "a new client", key="new", contract=2)
        await w.until(s, "turn.end", count=3)
        await w.say(s, "the old client again", turn=4)
        assert [n["version"] for n in notes(await w.entries(s))] == ["1", "1", "2", "2"]


async def test_a_frozen_session_is_moved_by_the_message_that_needs_it(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        await deploy_coder(w, tmp_path, "2", policy="contract", contract=1)
        await w.until_state(s, "frozen")
        await w.sessions.send(s, "new", key="new", contract=1)
        await w.until(s, "turn.end", count=2)
        log = await w.entries(s)
        assert notes(log)[-1]["version"] == "2"
        assert [e.body["rung"] for e in log if e.kind == "machine.restore"] == [5, 2]


async def test_a_pinned_session_refuses_who_needs_more(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        await deploy_coder(w, tmp_path, "2", policy="pin", contract=2)
        with pytest.raises(Incompatible, match="upgrade policy pin"):
            await w.sessions.send(s, "a new client", contract=2)
        with pytest.raises(BadInput):
            await w.sessions.send(s, "nobody", contract=-1)
        assert len(await w.entries(s, "user")) == 1


async def test_policy_now_cuts_the_turn(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.sessions.send(s, "work a", key="1")
        await appears(tmp_path / "work-a")
        await deploy_coder(w, tmp_path, "2", policy="now")
        await w.until(s, "turn.end")
        log = await w.entries(s)
        assert [e.body["cause"] for e in log if e.kind == "turn.cut"] == ["upgrade"]
        assert notes(log)[-1] == {**notes(log)[-1], "version": "2", "attempt": 2}


async def test_code_that_does_not_import_fails_the_turn_and_rollback_heals(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        good = await w.agents.files("coder", (await w.agents.current("coder")).version)
        await w.sessions.deploy("coder", {"agent.py": "import nothing_like_this\n"})
        await w.sessions.send(s, "two", key="2")
        end = await w.until(s, "turn.end", count=2)
        assert end.body["status"] == "failed"
        assert "nothing_like_this" in end.body["error"]
        await w.sessions.deploy("coder", good, {"env": {"SHARED": str(tmp_path)}})
        await w.sessions.send(s, "three", key="3")
        assert (await w.until(s, "turn.end", count=3)).body["status"] == "done"


async def test_another_image_keeps_the_disk_and_says_that_memory_is_gone(tmp_path):
    async with coder_world(tmp_path, idle_timeout_s=60.0) as (w, s):
        await w.say(s, "one", turn=1)
        machine = await machine_of(w, s)
        await (await w.machines.link(machine)).write_file("/root/repo/file", b"kept")
        await deploy_coder(w, tmp_path, "2", image="python:3.12")
        log = await w.say(s, "two", turn=2)
        assert await machine_of(w, s) == machine
        assert (await w.machines.get(machine)).spec.image == "python:3.12"
        assert await (await w.machines.link(machine)).read_file("/root/repo/file") == b"kept"
        back = [e for e in log if e.kind == "machine.restore"][-1].body
        assert back["rung"] == 4
        assert back["why"].startswith("its image was base and is python:3.12 now")
        assert back["lost"] == "processes and memory of before; no file"
        told = [m["text"] for m in messages(log) if m.get("note")]
        assert any("python:3.12" in text and "files are kept" in text for text in told), told
        assert (notes(log)[-1]["version"], notes(log)[-1]["cache"]) == ("2", [2])
        calls = len(w.machines.calls)
        await w.say(s, "three", turn=3)
        assert "reboot" not in [name for name, _ in w.machines.calls[calls:]], "once is enough"


async def test_an_image_that_is_not_there_leaves_the_machine_as_it_is_and_says_so(tmp_path):
    async with coder_world(tmp_path, idle_timeout_s=60.0) as (w, s):
        await w.say(s, "one", turn=1)
        w.machines.fail_next["reboot"] = NotFound("no such image: nix")
        await deploy_coder(w, tmp_path, "2", image="nix")
        log = await w.say(s, "two", turn=2)
        assert notes(log)[-1]["version"] == "2", "the code is new, the machine is not"
        (kept,) = [dict(e.body) for e in log if e.kind == "x.image_kept"]
        assert kept == {"image": "nix", "kept": "base", "why": "no such image: nix"}
        assert (await w.machines.get(await machine_of(w, s))).state == "running"
