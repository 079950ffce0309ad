"""New code takes the next turn; the machine stays; rollback is the same move."""

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
