"""An agent for tests of sessions: a scripted model, tools that tell the test through files in $SHARED. Source text only."""

CODER = """
import asyncio, os, pathlib, time
from recess_agent import agent, tool

SHARED = pathlib.Path(os.environ["SHARED"])
VERSION = "VERSION_HERE"

def mark(name, text="x"):
    with open(SHARED / name, "a") as f:
        f.write(text + "\\n")

def wait_for(name):
    while not (SHARED / name).exists():
        time.sleep(0.01)

@tool
def work(name: str) -> str:
    mark("work-" + name)
    wait_for("go-" + name)
    return "worked " + name

async def already_paid(call):
    paid = (SHARED / "charges").read_text().split() if (SHARED / "charges").exists() else []
    return {"paid": True, "key": call.key} if call.key in paid else None

@tool(effect="once", verify=already_paid)
async def charge(cents: int, *, call) -> dict:
    mark("charges", call.key)
    mark("charge-done")
    while not (SHARED / "go-charge").exists():
        await asyncio.sleep(0.01)
    return {"paid": True, "cents": cents}

@tool(effect="once")
def launch(name: str) -> str:
    mark("launches", name)
    wait_for("go-launch")
    return "launched"

@tool(effect="pure")
def look(name: str) -> str:
    mark("looks", name)
    wait_for("go-look")
    return "seen " + name

@tool(effect="ORDER_EFFECT")
def order(name: str, *, call) -> str:
    mark("orders", call.key)
    wait_for("go-order")
    return "ordered " + name

@tool
def die(code: int) -> str:
    mark("deaths")
    os._exit(code)

async def model(messages):
    last = messages[-1]
    asked = [m["content"] for m in messages if m["role"] == "user" and not m["content"].startswith("[recess]")]
    if last["role"] == "user" and asked[-1].startswith("die"):
        yield {"tool_calls": [{"id": "c", "name": "die", "arguments": '{"code": 3}'}]}
        return
    if last["role"] == "user" and not last["content"].startswith("[recess]"):
        words = last["content"].split()
        if words[0] in ("work", "charge", "launch", "look", "order", "die"):
            arg = {"charge": '{"cents": %s}', "die": '{"code": %s}'}.get(words[0], '{"name": "%s"}') % words[1]
            yield {"tool_calls": [{"id": "c", "name": words[0], "arguments": arg}]}
            return
        yield {"text": "hello to " + last["content"]}
    else:
        yield {"text": "after: " + last["content"]}

@agent(image="base", idle="200ms", tools=[work, charge, launch, look, order, die])
async def coder(s):
    cache = []
    async for turn in s:
        cache.append(turn.number)
        while True:
            reply = await s.stream(model(s.messages()))
            if not reply.tool_calls:
                break
            await s.run_tools(reply)
        await s.note(version=VERSION, pid=os.getpid(), cache=list(cache), attempt=turn.attempt)
"""


def coder(version: str = "1", *, order_effect: str = "keyed") -> str:
    """Return the agent's source for a version; `order_effect` is the effect class of its tool `order`."""
    return CODER.replace("VERSION_HERE", version).replace("ORDER_EFFECT", order_effect)
