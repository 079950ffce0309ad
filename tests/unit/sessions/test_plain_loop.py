"""A plain loop, with all that journals forbid: clocks, dice, threads, subprocesses, sockets, state in local variables. It goes on
behind a crash of its server, and after that of its machine, without a past turn being run again."""

from recess.contextlog.transcript import check_transcript, messages
from recess.testing.session_world import appears, machine_of, notes, world

AGENT = """
import asyncio, os, pathlib, queue, random, socket, subprocess, threading, time
from recess_agent import agent, tool

SHARED = pathlib.Path(os.environ["SHARED"])

def by_thread():
    told = queue.Queue()
    threading.Thread(target=lambda: told.put(threading.get_native_id())).start()
    return told.get(timeout=60)

def by_network():
    server, said = socket.create_server(("127.0.0.1", 0)), []
    def answer():
        link, _ = server.accept()
        link.sendall(b"hello")
        link.close()
    threading.Thread(target=answer).start()
    with socket.create_connection(server.getsockname(), timeout=60) as link:
        said.append(link.recv(5).decode())
    server.close()
    return said[0]

@tool
def act(name: str) -> str:
    with open(SHARED / "acts", "a") as file:
        file.write(name + "\\\\n")
    return subprocess.run(["echo", name], capture_output=True, text=True).stdout.strip()

async def model(messages, name):
    await asyncio.sleep(random.random() / 1000)
    if messages[-1]["role"] == "tool":
        yield "done"
    else:
        yield {"tool_calls": [{"id": f"c{time.time_ns()}", "name": "act", "arguments": {"name": name}}]}

@agent(image="base", idle="60s", tools=[act])
async def plain(s):
    rolls, began = [], time.monotonic()
    async for turn in s:
        rolls.append(random.random())
        by_thread()
        if turn.text.startswith("wait") and turn.attempt == 1:
            (SHARED / ("in-" + turn.text.split()[1])).touch()
            while not (SHARED / ("go-" + turn.text.split()[1])).exists():
                await asyncio.sleep(0.01)
        while True:
            reply = await s.stream(model(s.messages(), turn.text.split()[-1]))
            if not reply.tool_calls:
                break
            await s.run_tools(reply)
        await s.note(rolls=list(rolls), said=by_network(), pid=os.getpid(), for_s=time.monotonic() - began)
"""


async def test_it_survives_its_server_and_then_its_machine(tmp_path):
    async with world() as w:
        await w.sessions.deploy("plain", {"agent.py": AGENT.replace("\\\\", "\\")}, {"env": {"SHARED": str(tmp_path)}})
        s = (await w.sessions.start("plain")).id
        await w.say(s, "first", turn=1)
        await w.sessions.send(s, "wait second", key="2")
        await appears(tmp_path / "in-second")
        await w.crash_server()
        await w.sessions.recover()
        (tmp_path / "go-second").touch()
        await w.until(s, "turn.end", count=2)
        one, two = notes(await w.entries(s))
        assert two["rolls"][:1] == one["rolls"], "the same dice: its memory went on"
        assert (len(two["rolls"]), two["pid"], two["said"]) == (2, one["pid"], "hello")

        await w.sessions.send(s, "wait third", key="3")
        await appears(tmp_path / "in-third")
        await w.machines.kill(await machine_of(w, s), why="test")
        await w.until(s, "turn.end", count=3)
        log = await w.entries(s)
        assert notes(log)[-1]["pid"] != one["pid"]
        assert len(notes(log)[-1]["rolls"]) == 1, "a new process begins with the turn at work, not with the past"
        assert [e.body["status"] for e in log if e.kind == "turn.end"] == ["done"] * 3
        assert (tmp_path / "acts").read_text().split() == ["first", "second", "third"], "each tool ran once"
        assert check_transcript(messages(log)) == []
