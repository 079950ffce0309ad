"""One side of the session benchmark as a process that can be killed: the same loop in each system's own recommended style.

    python -m benchmarks.session_worker SIDE FOLDER TURNS LINE     (from the environment, see `Job`: MODEL, PAY, FULL, FORKS, LUNCH,
                                                                    DATABASE_URL, PAST)

Every turn asks the model once and charges once. A start in a FOLDER that holds an earlier run goes on with it. LINE is 0, or 1
for the same loop with one line more in it: newer code. Peers (`benchmarks.session_peers`) run under a Python of their own that has
their packages, so this module imports nothing but the standard library before it knows its side.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECENT = 200  # entries in which there is a whole turn, whatever was cut in it
ROOT = Path(__file__).resolve().parents[1]

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
    # From the end: the loop itself costs the same whatever the past. Notes of the system may stand behind the tool's answer.
    since = []
    for m in reversed(messages):
        since.append(m)
        if m["role"] == "user" and not m["content"].startswith("[recess]"):
            break
    if any(m["role"] == "tool" for m in since):
        yield "done"
    else:
        said = http("POST", os.environ["MODEL"] + "/reply", {"turn": turn, "messages": messages if os.environ["FULL"] else len(messages)})
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


REPLY = "words " * 40  # what the model of the world says


@dataclass(frozen=True)
class Job:
    """What a worker is to do. `full`: the model is sent the whole transcript. `forks`: so many at the end, at the head. `lunch`: so
    many entries of a dict, and a dev server, that the loop needs. `database`: a Postgres that two workers share. `past`: so many turns
    are written straight into the log first (Recess alone)."""

    folder: Path
    turns: int
    line: int
    model: str
    pay: str
    full: bool
    forks: int
    lunch: int
    database: str
    past: int

    @classmethod
    def read(cls, argv: list[str]) -> Job:
        """From the command line and the environment."""
        env = os.environ
        return cls(
            Path(argv[0]), int(argv[1]), int(argv[2]), env["MODEL"], env["PAY"], bool(env.get("FULL")),
            int(env.get("FORKS", "0")), int(env.get("LUNCH", "0")), env.get("DATABASE_URL", ""),
            int(env.get("PAST", "0")),
        )  # fmt: skip

    def reply(self, turn: int, messages: list[Any]) -> str:
        """Ask the model."""
        body = {"turn": turn, "messages": messages if self.full else len(messages)}
        return str(http("POST", self.model + "/reply", body)["text"])

    def charge(self, turn: int, key: str) -> str:
        """Charge."""
        return str(http("POST", self.pay + "/charges", {"turn": turn, "key": key})["text"])

    def mark(self, name: str, value: Any = None) -> None:
        """Tell the world that a point was reached."""
        http("POST", self.model + "/mark", {"name": name, "value": value})


def http(method: str, url: str, body: Any = None) -> Any:
    """Call a server of the benchmark."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, method=method), timeout=600) as answer:
        return json.load(answer)


def asked(turn: int) -> dict[str, Any]:
    """Return the user's message of a turn."""
    return {"role": "user", "content": str(turn)}


def called(turn: int, text: str) -> dict[str, Any]:
    """Return the model's reply of a turn, as the transcript has it: it asks for the charge."""
    return {"role": "assistant", "content": text, "tool_calls": [{"id": f"c{turn}", "name": "charge"}]}


def charged(turn: int, text: str) -> dict[str, Any]:
    """Return the charge's result."""
    return {"role": "tool", "tool_call_id": f"c{turn}", "content": text}


def stored(folder: Path) -> int:
    """Return the bytes of a folder's files, databases written out and shortened to what they need."""
    for path in [*folder.rglob("*.db"), *folder.rglob("*.sqlite")]:
        with sqlite3.connect(path, timeout=30) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "worker.log")


def kitchen(entries: int, folder: Path) -> tuple[dict[str, str], str, subprocess.Popen[bytes]]:
    """Fill a dict and start a dev server that answers; return both. A process that begins anew has neither. (Its source runs in the
    guest as well.)"""
    table = {str(n): hashlib.sha256(str(n).encode()).hexdigest() for n in range(entries + 1)}
    said = folder / "dev.log"
    said.unlink(missing_ok=True)
    with said.open("wb") as log:
        command = [sys.executable, "-u", "-m", "http.server", "0", "-b", "127.0.0.1", "-d", str(folder)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    while "port" not in (words := said.read_text().split()):
        if server.poll() is not None:
            raise RuntimeError("the dev server ended")
        time.sleep(0.002)
    address = f"http://127.0.0.1:{words[words.index('port') + 1]}/"
    with urllib.request.urlopen(address, timeout=60) as page:
        page.read()
    return table, address, server


async def recess(job: Job) -> None:
    """A session of a local server, its agent as a plain process."""
    sys.path.insert(0, str(ROOT / "src"))
    from recess.config import load_config
    from recess.node.local import LocalNode

    config = load_config(home=job.folder / "h", run_dir=job.folder / "r", driver="fake", **(
        {"database_url": job.database, "lease_s": 6.0} if job.database else {}
    ))  # fmt: skip
    node = await LocalNode.open(config)
    job.mark("up")
    known = await node.sessions.list_sessions()
    if not known or job.line:
        code = AGENT.replace("LINE", 'await s.note(line="newer")' if job.line else "pass")
        env = {"MODEL": job.model, "PAY": job.pay, "FULL": "1" if job.full else ""}
        await node.sessions.deploy("loop", {"agent.py": code}, {"env": env})
    row = known[0] if known else await node.sessions.start("loop")
    if job.past and not known:
        row = await _write_past(job, node, row.id)
    await _talk(job.turns, node, row.id, row.head)
    if job.forks:
        await _fork(job, node, row.id)
    await node.close(detach=False)


async def _write_past(job: Job, node: Any, session: str) -> Any:
    """Write turns into the log as the loop's own are, 100 in a transaction; return the session's row."""
    from recess.contextlog import Draft, rules
    from recess.contextlog import sql_tx as sql

    row = await node.log.claim(session, "past", 600.0, now=time.time())

    def turn_in(tx: Any, turn: int) -> int:
        said = rules.pack(Draft("user", {"text": str(turn)}, key=f"m{turn}"), inbox=True)
        inbox = sql.append_inbox_in(tx, session, said, ts=time.time()).position
        call = {"id": f"c{turn}", "name": "charge", "arguments": {"turn": turn}}
        charge = {"name": "charge", "arguments": {"turn": turn}, "effect": "once", "verify": True}
        drafts = [
            Draft("turn.start", {"attempt": 1, "inbox": inbox}, turn=turn, key=f"t{turn}/start/1"),
            Draft("assistant", {"text": REPLY, "tool_calls": [call], "part": 0}, turn=turn, key=f"t{turn}/a0"),
            Draft("tool.start", charge, turn=turn, ref=call["id"], key=f"t{turn}/s"),
            Draft("tool.result", {"output": '{"text": "paid"}'}, turn=turn, ref=call["id"], key=f"t{turn}/r"),
            Draft("assistant", {"text": "done", "tool_calls": [], "part": 1}, turn=turn, key=f"t{turn}/a1"),
            Draft("turn.end", {"status": "done"}, turn=turn, key=f"t{turn}/end"),
        ]
        sql.append_in(tx, session, row.epoch, rules.pack_all(drafts), ts=time.time())
        return inbox

    inbox = 0
    for first in range(1, job.past + 1, 100):
        some = range(first, min(first + 100, job.past + 1))
        inbox = await node.log.db.write(
            lambda tx, some=some: [turn_in(tx, turn) for turn in some][-1], locks=(session,)
        )
    await node.log.update(session, row.epoch, consumed=inbox, turn=job.past)
    await node.log.release(session, row.epoch, state="cold")
    return await node.sessions.get(session)


async def _talk(turns: int, node: Any, session: str, head: int) -> None:
    """Send each message when the turn of the one before has ended, as a user does; go on with what is in the log up to `head`, whose
    end says how far that is (the messages are the turns' numbers)."""
    await node.sessions.send(session, "1", key="m1")  # a known key appends nothing
    after = max(0, head - RECENT)
    said = ended = 0
    async for item in node.sessions.follow(session, after=after):
        kind = getattr(item, "kind", "")
        said = int(item.body["text"]) if kind == "user" else said
        ended = item.turn if kind == "turn.end" else ended
        if ended >= turns:
            return
        if said == ended > 0 and getattr(item, "position", 0) >= head:
            await node.sessions.send(session, str(ended + 1), key=f"m{ended + 1}")


async def _fork(job: Job, node: Any, session: str) -> None:
    head = (await node.sessions.get(session)).head
    before, began = stored(job.folder), time.perf_counter()
    for number in range(job.forks):
        await node.sessions.fork(session, at=head, name=f"way-{number}")
    took = time.perf_counter() - began
    job.mark("forked", {"s": took, "bytes": stored(job.folder) - before})


def main(argv: list[str]) -> int:
    """Run one side to its end."""
    job = Job.read(argv[1:])
    if argv[0] == "recess":
        asyncio.run(recess(job))
    else:
        from benchmarks import session_peers

        session_peers.SIDES[argv[0]](job)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
