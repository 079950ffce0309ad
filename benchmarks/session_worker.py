"""One side of the session benchmark as a process that can be killed: the same loop in each system's own recommended style.

    python benchmarks/session_worker.py SIDE FOLDER TURNS LINE     (MODEL and PAY: addresses, from the environment)

Every turn asks the model once and charges once. A start in a FOLDER that holds an earlier run goes on with it. LINE is 0, or 1
for the same loop with one line more in it: newer code. Peers run under a Python of their own that has their packages.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL, PAY = os.environ.get("MODEL", ""), os.environ.get("PAY", "")

AGENT = """
import json, os, urllib.error, urllib.request
from recess_agent import agent, tool

def http(method, url, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, method=method), timeout=600) as answer:
        return json.load(answer)

def paid(call):
    found = http("GET", os.environ["PAY"] + "/charges?key=" + call.key)
    return found or None

@tool(effect="once", verify=paid)
def charge(turn: int, *, call) -> dict:
    return http("POST", os.environ["PAY"] + "/charges", {"turn": turn, "key": call.key})

async def model(messages, turn):
    own = [m["role"] == "user" and not m["content"].startswith("[recess]") for m in messages]
    since = messages[max(i for i, mine in enumerate(own) if mine):]  # notes of the system may stand behind the tool's answer
    if any(m["role"] == "tool" for m in since):
        yield "done"
    else:
        said = http("POST", os.environ["MODEL"] + "/reply", {"turn": turn, "messages": len(messages)})
        yield {"text": said["text"], "tool_calls": [{"id": "c", "name": "charge", "arguments": {"turn": turn}}]}

@agent(backend="process", idle="1h", tools=[charge])
async def loop(s):
    async for turn in s:
        LINE
        while True:
            reply = await s.stream(model(s.messages(), int(turn.text)))
            if not reply.tool_calls:
                break
            await s.run_tools(reply)
"""


def http(method: str, url: str, body: Any = None) -> Any:
    """Call a server of the benchmark."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, method=method), timeout=600) as answer:
        return json.load(answer)


async def recess(folder: Path, turns: int, line: int) -> None:
    """A session of a local server, its agent as a plain process."""
    sys.path.insert(0, str(ROOT / "src"))
    from recess.config import load_config
    from recess.node.local import LocalNode

    node = await LocalNode.open(load_config({}, home=folder / "h", run_dir=folder / "r", driver="fake"))
    code = AGENT.replace("LINE", 'await s.note(line="newer")' if line else "pass")
    await node.sessions.deploy("loop", {"agent.py": code}, {"env": {"MODEL": MODEL, "PAY": PAY}})
    known = await node.sessions.list_sessions()
    row = known[0] if known else await node.sessions.start("loop")
    ended = 0
    async with asyncio.TaskGroup() as group:
        group.create_task(_send_all(node, row.id, turns))
        async for item in node.sessions.follow(row.id):
            ended += getattr(item, "kind", "") == "turn.end"
            if ended >= turns:
                break
    await node.close(detach=False)


async def _send_all(node: Any, session: str, turns: int) -> None:
    for turn in range(1, turns + 1):
        await node.sessions.send(session, str(turn), key=f"m{turn}")  # known keys append nothing


def dbos(folder: Path, turns: int, line: int) -> None:
    """One durable workflow, its calls as steps; `launch` recovers it."""
    from dbos import DBOS, SetWorkflowID

    DBOS(config={"name": "bench", "system_database_url": f"sqlite:///{folder}/dbos.sqlite", "log_level": "ERROR",
                 "run_admin_server": False})  # fmt: skip

    @DBOS.step()
    def model(turn: int) -> str:
        return str(http("POST", MODEL + "/reply", {"turn": turn, "messages": 2 * turn})["text"])

    @DBOS.step()
    def charge(turn: int) -> Any:
        return http("POST", PAY + "/charges", {"turn": turn, "key": f"{DBOS.workflow_id}-{DBOS.step_id}"})

    if line:

        @DBOS.workflow(name="loop")
        def loop(turns: int) -> None:
            for turn in range(1, turns + 1):
                charge(-turn)
                model(turn)
                charge(turn)
    else:

        @DBOS.workflow(name="loop")
        def loop(turns: int) -> None:
            for turn in range(1, turns + 1):
                model(turn)
                charge(turn)

    DBOS.launch()
    with SetWorkflowID("one"):
        DBOS.start_workflow(loop, turns).get_result()
    DBOS.destroy()


def langgraph(folder: Path, turns: int, line: int) -> None:
    """A graph of a model and a tool node over the SQLite saver, one thread, one invocation a message."""
    from operator import add
    from typing import Annotated, TypedDict

    from langgraph.checkpoint.sqlite import SqliteSaver
    from langgraph.graph import END, START, StateGraph

    # Not as a class: its annotations would be names of this function, which nobody else can look up.
    State = TypedDict("State", {"messages": Annotated[list, add], "turn": int})  # noqa: UP013

    def model(state: Any) -> Any:
        said = http("POST", MODEL + "/reply", {"turn": state["turn"], "messages": len(state["messages"])})
        return {"messages": [{"role": "assistant", "content": said["text"]}]}

    def charge(state: Any) -> Any:
        body = {"turn": state["turn"], "key": f"t{state['turn']}"}
        return {"messages": [{"role": "tool", "content": json.dumps(http("POST", PAY + "/charges", body))}]}

    graph = StateGraph(State)
    graph.add_node("model", model)
    graph.add_node("charge", charge)
    if line:
        graph.add_node("newer", lambda state: {"messages": [{"role": "system", "content": "newer"}]})
        graph.add_edge(START, "newer")
        graph.add_edge("newer", "model")
    else:
        graph.add_edge(START, "model")
    graph.add_edge("model", "charge")
    graph.add_edge("charge", END)
    config: Any = {"configurable": {"thread_id": "one"}}
    with SqliteSaver.from_conn_string(f"{folder}/langgraph.sqlite") as saver:
        app = graph.compile(checkpointer=saver)
        state = app.get_state(config)
        if state.next:
            app.invoke(None, config, durability="sync")  # what was cut goes on at its node
        first = int(app.get_state(config).values.get("turn", 0)) + 1
        for turn in range(first, turns + 1):
            asked = {"messages": [{"role": "user", "content": str(turn)}], "turn": turn}
            app.invoke(asked, config, durability="sync")


def main(argv: list[str]) -> int:
    """Run one side to its end."""
    side, folder, turns, line = argv[0], Path(argv[1]), int(argv[2]), int(argv[3])
    if side == "recess":
        asyncio.run(recess(folder, turns, line))
    else:
        {"dbos": dbos, "langgraph": langgraph}[side](folder, turns, line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
