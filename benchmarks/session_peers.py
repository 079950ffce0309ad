"""The peers' loops of the session benchmark, each in its system's own recommended style (see `benchmarks.session_worker`, which runs
them under a Python that has their packages). It must never import Recess.

What a journal cannot keep, the dev server and the dict of `kitchen`, each makes anew when its process begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.session_worker import Job, asked, called, charged, kitchen, stored

RECOVERIES = 1_000_000  # DBOS gives a workflow up after 100 by default, which is not what is measured here


def dbos(job: Job) -> None:
    """One durable workflow, its calls as steps; `launch` recovers it."""
    from dbos import DBOS, SetWorkflowID

    database = job.database.replace("postgresql://", "postgresql+psycopg://") or f"sqlite:///{job.folder}/dbos.sqlite"
    DBOS(config={"name": "bench", "system_database_url": database, "log_level": "ERROR", "run_admin_server": False})
    if job.lunch:
        kitchen(job.lunch, job.folder)

    @DBOS.step()
    def model(turn: int, messages: list[Any]) -> str:
        return job.reply(turn, messages)

    @DBOS.step()
    def charge(turn: int) -> str:
        return job.charge(turn, f"{DBOS.workflow_id}-{DBOS.step_id}")

    @DBOS.step()
    def newer() -> None:
        pass

    def one_turn(turn: int, messages: list[Any]) -> None:
        messages.append(asked(turn))
        messages.append(called(turn, model(turn, messages)))
        messages.append(charged(turn, charge(turn)))

    if job.line:

        @DBOS.workflow(name="loop", max_recovery_attempts=RECOVERIES)
        def loop(turns: int) -> None:
            messages: list[Any] = []
            for turn in range(1, turns + 1):
                newer()
                one_turn(turn, messages)
    else:

        @DBOS.workflow(name="loop", max_recovery_attempts=RECOVERIES)
        def loop(turns: int) -> None:
            messages: list[Any] = []
            for turn in range(1, turns + 1):
                one_turn(turn, messages)

    job.mark("up")
    DBOS.launch()
    with SetWorkflowID("one"):
        DBOS.start_workflow(loop, job.turns).get_result()
    if job.forks:
        before, began = stored(job.folder), time.perf_counter()
        for _ in range(job.forks):
            DBOS.fork_workflow("one", 2 * job.turns + 1)  # behind its last step: a fork repeats none
        took = time.perf_counter() - began
        job.mark("forked", {"s": took, "bytes": stored(job.folder) - before})
    DBOS.destroy()


def langgraph(job: Job) -> None:
    """A graph of a model and a tool node over the SQLite saver, one thread, one invocation a message."""
    from operator import add
    from typing import Annotated, TypedDict

    from langgraph.checkpoint.sqlite import SqliteSaver
    from langgraph.graph import END, START, StateGraph

    # Not as a class: its annotations would be names of this function, which nobody else can look up.
    State = TypedDict("State", {"messages": Annotated[list, add], "turn": int})  # noqa: UP013

    def model(state: Any) -> Any:
        return {"messages": [called(state["turn"], job.reply(state["turn"], state["messages"]))]}

    def charge(state: Any) -> Any:
        return {"messages": [charged(state["turn"], job.charge(state["turn"], f"t{state['turn']}"))]}

    graph = StateGraph(State)
    graph.add_node("model", model)
    graph.add_node("charge", charge)
    if job.line:
        graph.add_node("newer", lambda state: {"messages": [{"role": "system", "content": "newer"}]})
        graph.add_edge(START, "newer")
        graph.add_edge("newer", "model")
    else:
        graph.add_edge(START, "model")
    graph.add_edge("model", "charge")
    graph.add_edge("charge", END)
    config: Any = {"configurable": {"thread_id": "one"}}
    if job.lunch:
        kitchen(job.lunch, job.folder)
    job.mark("up")
    shared = Path(os.environ.get("SHARED") or job.folder)
    with SqliteSaver.from_conn_string(f"{shared}/langgraph.sqlite") as saver:
        app = graph.compile(checkpointer=saver)
        state = app.get_state(config)
        if state.next:
            app.invoke(None, config, durability="sync")  # what was cut goes on at its node
        first = int(app.get_state(config).values.get("turn", 0)) + 1
        for turn in range(first, job.turns + 1):
            app.invoke({"messages": [asked(turn)], "turn": turn}, config, durability="sync")
        if job.forks:
            saver.conn.commit()
            head = app.get_state(config).config
            before, began = stored(job.folder), time.perf_counter()
            for number in range(job.forks):
                app.update_state(head, {"messages": [{"role": "user", "content": f"way {number}"}]})
            took = time.perf_counter() - began
            job.mark("forked", {"s": took, "bytes": stored(job.folder) - before})


def restate(job: Job) -> None:
    """A virtual object whose handler runs the loop, its calls as `ctx.run`; the server and the service, both ended with this process's
    group. The service is served by hypercorn, as its documentation recommends."""
    import hypercorn.asyncio
    import hypercorn.config
    import restate as sdk

    agent = sdk.VirtualObject("loop")

    @agent.handler()
    async def run(ctx: Any, turns: int) -> None:
        messages: list[Any] = []
        for turn in range(1, turns + 1):
            if job.line:
                await ctx.run_typed("newer", lambda: None)
            messages.append(asked(turn))
            text = await ctx.run_typed("model", job.reply, turn=turn, messages=messages)
            messages.append(called(turn, text))
            paid = await ctx.run_typed("charge", job.charge, turn=turn, key=f"{ctx.request().id}-{turn}")
            messages.append(charged(turn, paid))

    if job.lunch:
        kitchen(job.lunch, job.folder)

    async def serve() -> None:
        config = hypercorn.config.Config()
        config.bind = [f"127.0.0.1:{port}"]
        config.accesslog = config.errorlog = None
        over = asyncio.Event()
        serving = asyncio.create_task(hypercorn.asyncio.serve(sdk.app([agent]), config, shutdown_trigger=over.wait))
        try:
            await asyncio.to_thread(_restate_calls, job, sockets, port)
        finally:
            over.set()
            await serving

    port = _own_port(job.folder / "port")
    with _restate_server(job.folder) as sockets:
        asyncio.run(serve())


def _own_port(kept: Path) -> int:
    """Return the service's port, the same at every start: the server knows the service by it."""
    if not kept.exists():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            kept.write_text(str(probe.getsockname()[1]))
    return int(kept.read_text())


@contextlib.contextmanager
def _restate_server(folder: Path) -> Any:
    """Run the server over the folder; yield where its sockets are, once both answer."""
    env = {
        **os.environ,
        "RESTATE_DISABLE_TELEMETRY": "true",
        "RESTATE_ROCKSDB_TOTAL_MEMORY_SIZE": "256MB",
        "RESTATE_LOG_FILTER": "warn",
    }
    command = [
        os.environ["RESTATE_SERVER"],
        "--base-dir",
        str(folder / "rs"),
        "--node-name",
        "n",
        "--no-logo",
        "--listen-mode",
        "unix",
    ]
    server = subprocess.Popen(command, env=env)
    sockets = folder / "rs" / "n"
    try:
        for name, path in (("admin.sock", "/health"), ("ingress.sock", "/restate/health")):
            while _unix(sockets / name, "GET", path)[0] != 200:
                if server.poll() is not None:
                    raise RuntimeError("restate-server ended")
                time.sleep(0.01)
        yield sockets
    finally:
        server.kill()
        server.wait()


def _unix(path: Path, method: str, target: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    """Make one HTTP call over a unix socket; (0, b"") where nobody answers."""
    link = http.client.HTTPConnection("localhost", timeout=600)
    link.sock = socket.socket(socket.AF_UNIX)
    try:
        link.sock.connect(str(path))
        data = None if body is None else json.dumps(body)
        link.request(method, target, data, {"content-type": "application/json", **headers} if data else headers)
        answer = link.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        link.close()


def _restate_calls(job: Job, sockets: Path, port: int) -> None:
    """Register the service where it is not, ask for the loop (its key is known: it is begun once), and wait for its end."""
    job.mark("up")
    registered = job.folder / f"registered-{job.line}"
    if not registered.exists():
        body = {"uri": f"http://127.0.0.1:{port}", "force": True, "breaking": True}
        for _ in range(200):  # the service begins to listen beside us
            status, said = _unix(sockets / "admin.sock", "POST", "/deployments", body)
            if status in (200, 201):
                break
            time.sleep(0.05)
        else:
            raise RuntimeError(f"not registered: {status} {said!r}")
        registered.touch()
    status, said = _unix(
        sockets / "ingress.sock", "POST", "/loop/one/run", job.turns, **{"idempotency-key": f"run-{job.turns}"}
    )
    if status != 200:
        raise RuntimeError(f"the loop did not end well: {status} {said!r}")


SIDES: dict[str, Callable[[Job], None]] = {"dbos": dbos, "langgraph": langgraph, "restate": restate}

if __name__ == "__main__":
    sys.exit("this is a part of benchmarks.session_worker")
