"""The main story on processes: the same coroutine goes on after a freeze."""

from recess.testing.session_world import texts, world

AGENT = """
import os
from recess_agent import agent, tool

@tool
def add(a: int, b: int) -> int:
    "Add two numbers."
    return a + b

async def model(messages, tools):
    last = messages[-1]
    if last["role"] == "user":
        yield {"choices": [{"delta": {"content": "let me "}}]}
        yield {"choices": [{"delta": {"content": "see"}}]}
        yield {"choices": [{"delta": {"tool_calls": [
            {"index": 0, "id": "call_0", "function": {"name": "add", "arguments": "{\\"a\\": 1,"}}]}}]}
        yield {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": " \\"b\\": 2}"}}]}}]}
    else:
        yield {"choices": [{"delta": {"content": "it is " + last["content"]}}]}

@agent(image="base", idle="200ms", tools=[add])
async def coder(s):
    count = 0
    nonce = os.urandom(4).hex()
    async for turn in s:
        count += 1
        while True:
            reply = await s.stream(model(s.messages(), s.tools))
            if not reply.tool_calls:
                break
            await s.run_tools(reply)
        await s.say(f"turn {turn.number} count {count} pid {os.getpid()} nonce {nonce}: {turn.text}")
"""


async def test_lunch():
    async with world() as w:
        await w.sessions.deploy("coder", {"agent.py": AGENT})
        row = await w.sessions.start("coder")
        first = await w.say(row.id, "hello", turn=1)
        assert [e.kind for e in first] == [
            "user", "machine.restore", "turn.start", "assistant", "tool.start", "tool.result", "assistant", "assistant",
            "turn.end",
        ]  # fmt: skip
        await w.until_state(row.id, "frozen")
        frozen = await w.log.get(row.id)
        snapshot = (await w.entries(row.id, "machine.snapshot"))[-1]
        assert frozen.snapshot_position == frozen.head == snapshot.position == snapshot.body["position"]
        assert (await w.machines.get(frozen.meta["machine"])).state == "suspended"
        second = await w.say(row.id, "again", turn=2)
        said = [t for t in texts(second) if "count" in t]
        assert said[0].startswith("turn 1 count 1")
        assert said[1].startswith("turn 2 count 2")
        assert said[0].split("pid ")[1].split(":")[0] == said[1].split("pid ")[1].split(":")[0]
        restore = [e for e in second if e.kind == "machine.restore"][-1]
        assert restore.body["rung"] == 2
        assert restore.body["stale"] is False
        assert restore.body["agent_kept"] is True
