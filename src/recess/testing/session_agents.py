"""An agent for tests of sessions: a scripted model, tools that tell the test through files in $SHARED. Source text only."""

# Lines of an agent that tells its test what happened, by files in the folder $SHARED.
MARKS = """
import os, pathlib

SHARED = pathlib.Path(os.environ["SHARED"])

def mark(name, text="x"):
    with open(SHARED / name, "a") as f:
        f.write(text + "\\n")
"""

CODER = (
    MARKS
    + """
import asyncio, time
from recess_agent import agent, tool

VERSION = "VERSION_HERE"

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
)


def coder(version: str = "1", *, order_effect: str = "keyed") -> str:
    """Return the agent's source for a version; `order_effect` is the effect class of its tool `order`."""
    return CODER.replace("VERSION_HERE", version).replace("ORDER_EFFECT", order_effect)


MATRIX = """
import asyncio, http.client, json, os, pathlib, time, urllib.error, urllib.request
from recess_agent import agent, tool

VERSION = "VERSION_HERE"

def http_call(method, path, body=None, **headers):
    data = None if body is None else json.dumps(body).encode()
    url = os.environ["PAY"] + path
    request = urllib.request.Request(url, data, {"Authorization": "Bearer k", **headers}, method=method)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)

def told(path):
    # What the test says. The way out is gone for a while with the server that was struck.
    while True:
        try:
            return http_call("POST", path)
        except (OSError, ValueError, http.client.HTTPException):
            time.sleep(0.05)

def stand(name):
    # Stand still where the test wants to strike, once, until it has.
    if told("/struck?name=" + name)["struck"]:
        while not told("/going?name=" + name)["going"]:
            pass

async def pause(name):
    await asyncio.to_thread(stand, name)

def pay(cents, call):
    stand("tool.before")
    done = http_call("POST", "/charges", {"cents": cents}, **{"Idempotency-Key": call.key})
    stand("tool.after")
    return done

def paid(call):
    try:
        return http_call("GET", "/charges?key=" + call.key)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise

@tool(effect="once", verify=paid)
def charge(cents: int, name: str, *, call) -> dict:
    return pay(cents, call)

@tool(effect="once")
def wire(cents: int, name: str, *, call) -> dict:
    return pay(cents, call)

@tool(effect="keyed")
def order(cents: int, name: str, *, call) -> dict:
    return pay(cents, call)

@tool(effect="pure")
def look(cents: int, name: str) -> str:
    stand("tool.before")
    seen = "seen " + name
    stand("tool.after")
    return seen

@tool
def work(cents: int, name: str) -> str:
    stand("tool.before")
    with open("journal", "a") as f:
        f.write(name + "\\n")
    stand("tool.after")
    return "worked " + name

async def model(messages):
    await pause("model.before")
    mine = [m["role"] == "user" and not m["content"].startswith("[recess]") for m in messages]
    last = max(i for i, own in enumerate(mine) if own)
    called = any(m.get("tool_calls") for m in messages[last:])
    yield {"text": "I " if called else "let me "}
    await asyncio.sleep(0)
    await pause("model.middle")
    if called:
        yield {"text": "am done"}
        return
    word, number = messages[last]["content"].split()
    args = {"cents": int(number[1:]) + 1, "name": word + number[1:]}
    yield {"text": "see", "tool_calls": [{"id": "c", "name": word, "arguments": json.dumps(args)}]}

@agent(image="base", idle="50ms", tools=[charge, wire, order, look, work])
async def me(s):
    async for turn in s:
        word = turn.text.split()[0]
        if word == "ask":
            await s.say("heard " + str(await s.ask("well?", timeout=3600)))
        elif word == "spawn":
            report = await s.spawn("me", "look #0")
            await s.say(report.text + " " + report.status)
        elif word == "stuck":
            await pause("stuck")
            await s.say("was stuck")
        else:
            while True:
                reply = await s.stream(model(s.messages()))
                await pause("model.after")
                if not reply.tool_calls:
                    break
                await s.run_tools(reply)
        journal = pathlib.Path("journal")
        await s.note(version=VERSION, journal=journal.read_text().split() if journal.exists() else [])
"""


def matrix_agent(version: str) -> str:
    """Return the source of the crash matrix's agent: tools of every effect class, and moments at which a test can strike."""
    return MATRIX.replace("VERSION_HERE", version)
