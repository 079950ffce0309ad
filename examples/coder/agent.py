"""A coding agent: an ordinary loop around a model, in its own machine.

The model is reached at a route of the machine's broker, which adds the key: no secret is in this process. Everything
here that lives in memory (MEMORY, the counters, the dev server's process) is frozen, thawed and forked with the
machine; what must survive the machine itself is in the log, which `session` writes.
"""

import json
import os
import secrets
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from recess_agent import Call, ModelError, Session, agent, openai_chat, tool

VERSION = 1
WORKDIR = Path(os.environ.get("CODER_WORKDIR", "/root"))
BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:3128/route/llm")
PAY_URL = os.environ.get("PAY_URL", "http://127.0.0.1:3128/route/pay")
OUTPUT_MAX = 20_000
PROMPT = (
    "You are a coding agent. You work in your own Linux machine with the tools you are given; the working folder is "
    f"{WORKDIR}. Messages that begin with [recess] come from the system you run on and tell what happened to your "
    "machine: believe them, and tell the user what was lost."
)

MEMORY = {}  # plain memory: survives freeze, fork and thaw
LIFE = {"version": VERSION, "pid": os.getpid(), "nonce": secrets.token_hex(8), "turns": 0}


@tool
def sh(cmd: str) -> str:
    """Run a shell command in the working folder; returns its output and, if it failed, its exit code."""
    done = subprocess.run(
        ["sh", "-c", cmd], cwd=WORKDIR, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=600, check=False,
    )  # fmt: skip
    text = done.stdout.decode(errors="replace")
    if len(text) > OUTPUT_MAX:
        text = text[:OUTPUT_MAX] + f"\n... {len(text) - OUTPUT_MAX} more characters"
    return text if done.returncode == 0 else f"{text}\n[exit code {done.returncode}]"


@tool(effect="pure")
def read_file(path: str) -> str:
    """Return a text file."""
    return (WORKDIR / path).read_text(errors="replace")[:OUTPUT_MAX]


@tool
def write_file(path: str, text: str) -> str:
    """Write a text file, making its folders."""
    full = WORKDIR / path
    full.parent.mkdir(parents=True, exist_ok=True)
    full.write_text(text)
    return f"wrote {len(text)} characters to {full}"


@tool
def start_server(cmd: str, port: int) -> str:
    """Start a server that keeps running (also after this turn, a freeze and an upgrade); waits until it listens."""
    log = Path(f"/tmp/server-{port}.log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["sh", "-c", f"exec {cmd}"], cwd=WORKDIR, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
            continue
        return f"listening on port {port}, pid {process.pid}"
    raise RuntimeError(f"the server does not listen on port {port}: {log.read_text(errors='replace')[:2000]}")


@tool
def remember(key: str, value: str) -> str:
    """Keep a fact in memory (not on disk)."""
    MEMORY[key] = value
    return f"{len(MEMORY)} facts in memory"


@tool
def recall() -> dict:
    """Return all facts kept in memory, and which process keeps them."""
    return {"memory": MEMORY, "process": LIFE}


def _pay(method: str, path: str, body: "dict | None" = None, key: str = "") -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(PAY_URL + path, data=data, method=method)
    request.add_header("Content-Type", "application/json")
    if key:
        request.add_header("Idempotency-Key", key)
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def already_paid(call: Call) -> "dict | None":
    """Used only after a crash: the charge that this call made, or None if it was never made."""
    try:
        return _pay("GET", f"/charges?key={call.key}")
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


@tool(effect="once", verify=already_paid)
def charge(cents: int, *, call: Call) -> dict:
    """Charge the customer's card."""
    return _pay("POST", "/charges", {"cents": cents}, key=call.key)


@agent(
    image="base",
    idle="30s",
    tools=[sh, read_file, write_file, start_server, remember, recall, charge],
    routes={"llm": "https://api.openai.com/v1"},
)
async def coder(session: Session) -> None:
    turns = 0  # a local variable of this coroutine: it goes on counting after every thaw
    async for turn in session:
        turns += 1
        LIFE["turns"] = turns
        print(f"turn {turn.number}: {turn.text[:80]}", flush=True)
        while True:
            messages = [{"role": "system", "content": PROMPT}, *session.messages()]
            try:
                reply = await session.stream(openai_chat(messages, session.tools, base_url=BASE_URL))
            except ModelError as error:
                await session.retry_after(error)  # "come back in 15 minutes": the machine is frozen meanwhile
                continue
            if not reply.tool_calls:
                break
            await session.run_tools(reply)
