"""Memory and disk that are used up inside a machine: told, a larger machine once, a bounded number of attempts, a clear end."""

import errno

from recess.contextlog.transcript import messages
from recess.errors import OutOfSpace, Unsupported
from recess.sessions.agent_job import AgentJob
from recess.testing.session_world import kinds, machine_of, notes, texts, world
from recess.units import MIB

# The process harness has no kernel of its own: a process that "runs out of memory" counts itself in the file that stands for
# the kernel's counter (ProcessLink.stats) and is killed, as the kernel would do it.
AGENT = """
import os, pathlib, signal
from recess_agent import agent, tool

KILLS = pathlib.Path("../oom-kills")

@tool
def step(n: int) -> str:
    with open("steps", "a") as f:
        f.write(str(n))
    return "step " + str(n)

async def model(messages):
    if any(m["role"] == "tool" for m in messages):
        yield "all done"
    else:
        yield {"text": "", "tool_calls": [{"id": "c", "name": "step", "arguments": {"n": 0}}]}

@agent(image="base", memory="256M", idle="1h", tools=[step])
async def me(s):
    async for turn in s:
        while True:
            reply = await s.stream(model(s.messages()))
            if not reply.tool_calls:
                break
            await s.run_tools(reply)
            if turn.text == "hungry":
                break
        if turn.text == "hungry" and turn.attempt <= DEATHS:
            with open(KILLS, "a") as f:
                f.write("COUNTED")
            os.kill(os.getpid(), signal.SIGKILL)
        await s.note(steps=pathlib.Path("steps").read_text())
"""


async def started(w, deaths, counted="x"):
    await w.sessions.deploy("me", {"agent.py": AGENT.replace("DEATHS", str(deaths)).replace("COUNTED", counted)})
    return (await w.sessions.start("me")).id


async def test_a_machine_that_ran_out_of_memory_gets_more_and_no_tool_runs_twice():
    async with world(idle_timeout_s=60.0) as w:
        s = await started(w, 1)
        await w.sessions.send(s, "hungry")
        end = await w.until(s, "turn.end", timeout_s=60)
        assert end.body["status"] == "done"
        log = await w.entries(s)
        (cut,) = [e for e in log if e.kind == "turn.cut"]
        assert cut.body["cause"] == "oom"
        assert "256 MiB" in cut.body["detail"]
        assert "gets 512 MiB" in cut.body["detail"]
        back = [e for e in log if e.kind == "machine.restore"][-1]
        assert back.body["rung"] == 4
        assert "512 MiB" in back.body["why"]
        assert notes(log)[-1]["steps"] == "0", "its files are there, the finished call was not repeated"
        machine = await w.machines.get(await machine_of(w, s))
        assert machine.spec.memory_bytes == 512 * MIB
        told = [m["text"] for m in messages(log) if m.get("note")]
        assert any("256 MiB" in text and "rung 4" in text for text in told), told


async def test_twice_is_the_end_and_a_human_may_go_on():
    async with world(idle_timeout_s=60.0) as w:
        s = await started(w, 3)
        await w.sessions.send(s, "hungry")
        end = await w.until(s, "turn.end", timeout_s=60)
        assert end.body["status"] == "failed"
        assert "512 MiB are not enough" in end.body["error"]
        assert "memory=" in end.body["error"], "it says what to do"
        starts = [e.body["attempt"] for e in await w.entries(s, "turn.start")]
        assert starts == [1, 2], "once in the larger machine, then a clear end"
        assert [name for name, _ in w.machines.calls].count("reboot") == 1
        assert texts(await w.say(s, "modest", turn=2))[-1] == "all done"


async def test_a_machine_that_cannot_grow_says_so():
    async with world(idle_timeout_s=60.0) as w:
        s = await started(w, 1)
        w.machines.fail_next["reboot"] = Unsupported("files are in memory here")
        await w.sessions.send(s, "hungry")
        end = await w.until(s, "turn.end", timeout_s=60)
        assert "files are in memory here" in end.body["error"]
        assert texts(await w.say(s, "modest", turn=2))[-1] == "all done", "in the machine as it was"
        assert "reboot" in [name for name, _ in w.machines.calls]


async def test_a_kill_without_a_sign_of_the_kernel_is_a_crash_like_any_other():
    async with world(idle_timeout_s=60.0) as w:
        s = await started(w, 3, counted="")
        await w.sessions.send(s, "hungry")
        end = await w.until(s, "turn.end", timeout_s=60)
        assert {e.body["cause"] for e in await w.entries(s, "turn.cut")} == {"crash"}
        assert end.body["status"] == "failed"


async def test_a_full_disk_in_the_machine_is_a_bounded_and_clear_failure(monkeypatch):
    real, full = AgentJob.start, [True]

    async def start(self, *args, **more):
        if full[0]:
            raise OutOfSpace("No space left on device", guest_kind="no_space")
        await real(self, *args, **more)

    monkeypatch.setattr(AgentJob, "start", start)
    async with world(idle_timeout_s=60.0) as w:
        s = await started(w, 0)
        await w.sessions.send(s, "modest")
        end = await w.until(s, "turn.end", timeout_s=60)
        assert end.body["status"] == "failed"
        assert "No space left on device" in end.body["error"]
        assert kinds(await w.entries(s)).count("turn.start") <= 3
        full[0] = False
        assert texts(await w.say(s, "modest", turn=2))[-1] == "all done"


async def test_a_disk_of_the_host_that_is_full_for_a_while_costs_no_attempt(monkeypatch):
    real, full = AgentJob.start, [True]

    async def start(self, *args, **more):
        if full[0]:
            full[0] = False
            raise OutOfSpace("machine stands still: the host's disk is full")
        await real(self, *args, **more)

    monkeypatch.setattr(AgentJob, "start", start)
    async with world(idle_timeout_s=60.0) as w:
        s = await started(w, 0)
        log = await w.say(s, "modest", turn=1)
        assert texts(log)[-1] == "all done"
        assert "turn.cut" not in kinds(log)


def test_what_a_tool_is_told(tmp_path, monkeypatch):
    from recess_agent import signs

    assert signs.disk_full(OSError(errno.ENOSPC, "full")) == signs.DISK_FULL
    assert signs.disk_full(OSError(errno.EIO, "io")) == signs.disk_full(ValueError()) == ""
    counter = tmp_path / "vmstat"
    counter.write_text("pgfault 7\noom_kill 2\n")
    monkeypatch.setattr(signs, "VMSTAT", str(counter))
    monkeypatch.setattr(signs, "IN_MACHINE", str(tmp_path))
    watch = signs.Watch()
    assert watch.told() == ""
    counter.write_text("oom_kill 4\n")
    assert "ended 2 processes" in watch.told()
    monkeypatch.setattr(signs, "IN_MACHINE", str(tmp_path / "none"))
    assert signs.oom_kills() == 0
