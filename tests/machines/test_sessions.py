"""The story on real machines: the same coroutine after lunch, forks that part in memory, crashes told, code that moves in."""

from __future__ import annotations

import asyncio
import shlex
from contextlib import asynccontextmanager

from recess.config import Config
from recess.contextlog.transcript import messages
from recess.guestlink.link import ExecRequest
from recess.node.local import LocalNode
from recess.testing.session_world import kinds, notes

AGENT = """
import os, pathlib, socket, subprocess, time
from recess_agent import agent, tool

VERSION = "VERSION_HERE"

@tool
def sh(cmd: str) -> str:
    p = subprocess.run(cmd, shell=True, capture_output=True, text=True)
    return (p.stdout + p.stderr).strip()

@tool
def serve(port: int) -> str:
    subprocess.Popen(["python3", "-m", "http.server", str(port), "-b", "127.0.0.1"], start_new_session=True)
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return "serving"
        time.sleep(0.1)
    return "no server"

@tool
def stuck(name: str) -> str:
    pathlib.Path("/root/stuck").write_text(name)
    time.sleep(600)

async def model(messages):
    asked = [m["content"] for m in messages if m["role"] == "user" and not m["content"].startswith("[recess]")][-1]
    last = messages[-1]
    name, _, rest = asked.partition(" ")
    if last["role"] == "user" and not last["content"].startswith("[recess]") and name in ("sh", "serve", "stuck"):
        key = {"sh": "cmd", "serve": "port", "stuck": "name"}[name]
        yield {"tool_calls": [{"id": "c", "name": name, "arguments": {key: int(rest) if name == "serve" else rest}}]}
    else:
        yield {"text": last["content"]}

@agent(image="base", idle="1s", tools=[sh, serve, stuck])
async def coder(s):
    nonce, cache, blob = os.urandom(8).hex(), {}, None
    async for turn in s:
        cache[turn.number] = turn.text
        if turn.text == "sh echo kept beside the log":
            blob = await s.blobs.put(os.urandom(1_500_000), name="random")
        while True:
            reply = await s.stream(model(s.messages()))
            if not reply.tool_calls:
                break
            await s.run_tools(reply)
        await s.note(version=VERSION, nonce=nonce, cache=len(cache), pid=os.getpid(), dice=os.urandom(8).hex(),
                     blob=len(await s.blobs.get(blob)) if blob else 0)
"""


def source(version: str = "1") -> dict[str, str]:
    """The agent's files."""
    return {"agent.py": AGENT.replace("VERSION_HERE", version)}


class Story:
    """A node with one session, and words for what happens to it."""

    def __init__(self, node: LocalNode, session: str) -> None:
        self.node = node
        self.id = session

    async def say(self, text: str, *, turn: int, session: str = "") -> list:
        """Send and wait for the turn's end; return the log."""
        ident = session or self.id
        position = (await self.node.sessions.send(ident, text)).position
        await self.until("turn.end", turn=turn, after=position, session=ident)
        return await self.node.sessions.read(ident)

    async def until(self, kind: str, *, turn: int, after: int = 0, session: str = ""):
        """Wait for an entry of a turn."""
        async with asyncio.timeout(100):
            async for item in self.node.sessions.follow(session or self.id, after=after):
                if getattr(item, "kind", "") == kind and item.turn == turn:
                    return

    async def frozen(self) -> None:
        """Wait until the session is put away and its VM gone."""
        async with asyncio.timeout(60):
            while (await self.node.sessions.get(self.id)).state != "frozen":
                await self.node.log.wait(self.id, (await self.node.sessions.get(self.id)).head, 0.2)
            await self.node.sessions.settled(self.id)

    async def machine(self) -> str:
        """The machine's id."""
        return str((await self.node.sessions.get(self.id)).meta["machine"])


@asynccontextmanager
async def story(config: Config):
    t = Story(await LocalNode.open(config), "")
    try:
        await t.node.sessions.deploy("coder", source())
        t.id = (await t.node.sessions.start("coder")).id
        yield t
    finally:
        for row in await t.node.sessions.list_sessions():
            await t.node.sessions.close(row.id)
        await t.node.close(detach=False)


async def test_lunch_fork_and_upgrade(real_config: Config) -> None:
    async with story(real_config) as t:
        await t.say("serve 8000", turn=1)
        await t.say("sh touch /root/made; echo index > /root/index.html", turn=2)
        await t.frozen()
        machine = await t.machine()
        assert (await t.node.machines.get(machine)).state == "suspended"
        log = await t.say("sh curl -sS -m 10 --noproxy '*' http://127.0.0.1:8000/index.html", turn=3)
        one, _two, three = notes(log)
        assert (three["nonce"], three["pid"], three["cache"]) == (one["nonce"], one["pid"], 3)
        assert [e.body["text"] for e in log if e.kind == "assistant"][-1] == "index"  # the dev server answers
        assert [e.body["rung"] for e in log if e.kind == "machine.restore"] == [5, 2]
        snapshot = next(e for e in log if e.kind == "machine.snapshot")
        assert snapshot.position == snapshot.body["position"]

        await t.say("sh echo kept beside the log", turn=4)
        await t.frozen()
        child = await t.node.sessions.fork(t.id, name="variant")
        left = await t.say("sh hostname; rm /root/made", turn=5)
        right = await t.say("sh hostname; ls /root/made", turn=5, session=child.id)
        mine, theirs = notes(left)[-1], notes(right)[-1]
        assert mine["nonce"] == theirs["nonce"] == one["nonce"]  # both coroutines went on from the same memory
        assert mine["dice"] != theirs["dice"]  # and share no randomness
        assert (
            mine["blob"] == theirs["blob"] == 1_500_000
        )  # put before the fork, read by both: its hash is checked there
        said = [[e.body["output"] for e in log if e.kind == "tool.result"][-1].split() for log in (left, right)]
        assert said[0][0] != said[1][0]
        assert said[1][1] == "/root/made"

        await t.node.sessions.deploy("coder", source("2"))
        log = await t.say("sh curl -sS -m 10 --noproxy '*' http://127.0.0.1:8000/index.html", turn=6)
        assert (notes(log)[-1]["version"], notes(log)[-1]["cache"]) == ("2", 1)
        assert [e.body["output"] for e in log if e.kind == "tool.result"][-1] == "index"


async def test_the_machine_is_killed_in_a_turn(real_config: Config) -> None:
    async with story(real_config) as t:
        await t.say("sh echo kept > /root/kept", turn=1)
        await t.frozen()
        await t.node.sessions.send(t.id, "stuck here")
        await t.until("tool.start", turn=2)
        await t.node.machines.kill(await t.machine(), why="the test pulls the plug")
        await t.until("turn.end", turn=2)
        log = await t.say("sh cat /root/kept; ls /root/stuck", turn=3)
        restore = [e.body for e in log if e.kind == "machine.restore"][-1]
        assert (restore["stale"], restore["agent_kept"]) == (True, False)
        assert [e.body["attempt"] for e in log if e.kind == "turn.start" and e.turn == 2] == [1, 2]
        told = [e.body["output"] for e in log if e.kind == "tool.result"]
        assert "lost" in told[-2]
        assert told[-1].startswith("kept")
        assert "No such file" in told[-1]
        assert notes(log)[-1]["nonce"] != notes(log)[0]["nonce"]


async def test_a_restarted_server_takes_its_session_back(real_config: Config) -> None:
    async with story(real_config) as t:
        await t.node.sessions.deploy("coder", source(), {"idle": "60s"})
        await t.say("sh true", turn=1)
        await t.node.sessions.send(t.id, "sh sleep 3; echo slept")
        await t.until("tool.start", turn=2)
        await t.node.close(detach=True)
        t.node = await LocalNode.open(real_config)
        await t.until("turn.end", turn=2)
        log = await t.node.sessions.read(t.id)
        assert "turn.cut" not in kinds(log)
        assert [e.body["output"] for e in log if e.kind == "tool.result"][-1] == "slept"
        assert notes(log)[0]["nonce"] == notes(log)[1]["nonce"]
        assert [e.body["rung"] for e in log if e.kind == "machine.restore"] == [5, 1]


ASKER = """
import os
from recess_agent import agent

@agent(image="base", idle="30s")
async def asker(s):
    nonce, told = os.urandom(8).hex(), TOLD
    async for turn in s:
        if turn.text == "ask":
            before = os.urandom(8).hex()
            answer = await s.ask("go on?", ["yes", "no"])
            await s.say("the answer is " + answer)
            await s.note(before=before, nonce=nonce, told=list(told))
        else:
            await s.say("hello")
            await s.note(nonce=nonce, told=list(told))

TOLD = []

@asker.on_suspend
def suspended(info):
    TOLD.append("suspend")

@asker.on_resume
def resumed(info):
    TOLD.append("resume on rung %s" % info["rung"])

@asker.on_fork
def forked(info):
    TOLD.append("fork of " + info["parent"])
"""


async def test_a_question_in_the_middle_of_a_turn_holds_no_machine(real_config: Config) -> None:
    async with story(real_config) as t:
        await t.node.sessions.deploy("asker", {"agent.py": ASKER})
        t.id = (await t.node.sessions.start("asker")).id
        log = await t.say("hi", turn=1)
        nonce = notes(log)[0]["nonce"]
        asked = (await t.node.sessions.send(t.id, "ask")).position
        await t.frozen()  # in the middle of turn 2
        assert (await t.node.machines.get(await t.machine())).state == "suspended"
        (question,) = await t.node.sessions.questions(t.id)
        await t.node.sessions.answer(t.id, question.ref, "yes")
        await t.until("turn.end", turn=2, after=asked)
        log = await t.node.sessions.read(t.id)
        assert [e.body["text"] for e in log if e.kind == "assistant"] == ["hello", "the answer is yes"]
        assert notes(log)[1]["nonce"] == nonce  # the coroutine that asked is the one that heard
        assert notes(log)[1]["told"] == ["suspend", "resume on rung 2"]
        assert "turn.cut" not in kinds(log)
        await t.node.sessions.suspend(t.id)
        child = await t.node.sessions.fork(t.id)
        log = await t.say("hi", turn=3, session=child.id)
        assert notes(log)[-1]["nonce"] == nonce
        assert f"fork of {t.id}" in notes(log)[-1]["told"]


async def test_a_machine_without_a_snapshot_keeps_its_files(real_config: Config) -> None:
    async with story(real_config) as t:
        await t.node.sessions.send(t.id, "stuck here")
        await t.until("tool.start", turn=1)
        machine = await t.machine()
        link = await t.node.machines.link(machine)
        async with asyncio.timeout(60):
            while not any(one.path.endswith("stuck") for one in await link.list_dir("/root")):
                await asyncio.sleep(0.1)
        assert await (await link.exec(ExecRequest(argv=["sync"]))).wait() == 0
        await t.node.machines.kill(machine, why="test")
        await t.until("turn.end", turn=1)
        log = await t.node.sessions.read(t.id)
        restore = [e.body for e in log if e.kind == "machine.restore"][-1]
        assert (restore["rung"], restore["agent_kept"]) == (4, False)
        assert await t.machine() == machine
        log = await t.say("sh cat /root/stuck", turn=2)
        assert [e.body["output"] for e in log if e.kind == "tool.result"][-1] == "here"


SERVE_NONCE = (
    "import http.server, os; nonce = os.urandom(8).hex(); count = [0]\n"
    "class H(http.server.BaseHTTPRequestHandler):\n"
    "    def do_GET(self):\n"
    "        count[0] += 1\n"
    "        said = f'{nonce} {count[0]}'.encode()\n"
    "        self.send_response(200); self.send_header('Content-Length', str(len(said))); self.end_headers()\n"
    "        self.wfile.write(said)\n"
    "    def log_message(self, *a): pass\n"
    "server = http.server.HTTPServer(('127.0.0.1', 8001), H); open('/root/up', 'w').close(); server.serve_forever()\n"
)


async def test_a_rewind_brings_back_files_processes_and_conversation(real_config: Config) -> None:
    """A process that answers with a number drawn in its memory and counts its calls there: as of a turn, so is the count."""
    begin = f"printf %s {shlex.quote(SERVE_NONCE)} > /root/n.py; setsid python3 /root/n.py >/dev/null 2>&1 & "
    ready = "until [ -e /root/up ]; do sleep 0.1; done; "
    ask = "curl -sS -m 20 --noproxy '*' http://127.0.0.1:8001/"
    async with story(real_config) as t:
        await t.node.sessions.deploy("coder", source(), {"snapshot": "turn", "idle": "60s"})
        await t.say(f"sh {begin}{ready}echo one > /root/file; {ask}", turn=1)
        async with asyncio.timeout(100):  # the snapshot of the first turn's end: there may be one before it
            while "machine.snapshot" not in (seen := kinds(await t.node.sessions.read(t.id)))[seen.index("turn.end") :]:
                await t.node.log.wait(t.id, len(seen), 0.5)
        await t.say(f"sh rm -rf /root/repo; echo two > /root/file; {ask}; echo; {ask}", turn=2)
        log = await t.node.sessions.read(t.id)
        first, second = (str(e.body["output"]) for e in log if e.kind == "tool.result")
        nonce = first.split()[0]
        assert (first, second) == (f"{nonce} 1", f"{nonce} 2\n{nonce} 3")

        (end, _) = [e.position for e in log if e.kind == "turn.end"]
        mark = next(e.position for e in log if e.kind == "machine.snapshot" and e.position > end)
        child = await t.node.sessions.fork(t.id, at=mark, name="other")
        await t.node.sessions.rewind(t.id, to=mark)
        for session in (t.id, child.id):
            after = await t.say(f"sh cat /root/file; {ask}", turn=3 if session == t.id else 2, session=session)
            said = [str(e.body["output"]) for e in after if e.kind == "tool.result"][-1]
            assert said == f"one\n{nonce} 2", "files and a process's memory are of the end of the first turn"
            asked = [m["text"] for m in messages(after) if m["role"] == "user" and not m.get("note")]
            assert len(asked) == 2, "and so is the conversation"
            assert "echo two" not in "".join(asked)
        whole = await t.node.sessions.read(t.id)
        assert whole[: len(log)] == log, "nothing is deleted"
