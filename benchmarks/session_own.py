"""Figures of the session benchmark that only Recess has, or has in another way than the peers: lunch in a real machine, and a stream
that is cut off.

    lunch      seconds from the message to the answer of a session whose machine was put away: it asks its dev server and its dict
    reconnect  pieces of a reply that were missing or doubled for a client that is cut off 100 times; and what a client that keeps
               no ids would have shown
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import session_worker
from benchmarks.drivers import make_home
from recess.api.app import make_app
from recess.api.wire import ProgressHub
from recess.config import load_config
from recess.node.local import LocalNode
from recess.testing.event_reader import EventReader, served

LUNCH_S = 300.0
DROPS = 100
TOKENS = 400  # as one entry they are longer than any connection that is cut off: no client is done before its last drop
CUT_BYTES = 1200

COOK = """
from __future__ import annotations
import hashlib, subprocess, sys, time, urllib.request
from pathlib import Path
from recess_agent import agent

KITCHEN

async def model(words):
    yield words

@agent(image="base", idle="1s")
async def cook(s):
    table = {}
    async for turn in s:
        if not table:
            began = time.monotonic()
            table, address, server = kitchen(int(turn.text), Path("/root"))
            took = time.monotonic() - began
        with urllib.request.urlopen(address, timeout=60) as page:
            page.read()
        alive = server.poll() is None and len(table[turn.text]) == 64
        await s.stream(model(f"{alive} {took:.3f}"))
"""

TALK = """
import asyncio
from recess_agent import agent

async def model(count):
    for n in range(count):
        yield {"text": f"t{n} "}
        await asyncio.sleep(0.012)

@agent(backend="process", idle="1h")
async def talk(s):
    async for turn in s:
        await s.stream(model(int(turn.text)))
"""


async def _said(node: LocalNode, session: str, text: str, timeout_s: float) -> tuple[str, float]:
    """Send a message; return what was answered, and after how many seconds."""
    began = time.perf_counter()
    position = (await node.sessions.send(session, text)).position
    answer = ""
    async with asyncio.timeout(timeout_s):
        async for item in node.sessions.follow(session, after=position):
            kind = getattr(item, "kind", "")
            if kind == "assistant":
                answer = str(item.body["text"])  # type: ignore[union-attr]
            if kind == "turn.end":
                break
    return answer, time.perf_counter() - began


async def _put_away(node: LocalNode, session: str) -> None:
    async with asyncio.timeout(LUNCH_S):
        while (row := await node.sessions.get(session)).state != "frozen":
            await node.log.wait(session, row.head, 0.2)
        await node.sessions.settled(session)


async def lunch(entries: int, repeats: int) -> dict[str, Any]:
    """Return the seconds to each answer after lunch (`back`), those of doing the work in the guest (`work`), the driver that carried
    it and the bytes that the sleeping session keeps."""
    scratch = Path(tempfile.mkdtemp(prefix="recess-bench-"))
    node = await LocalNode.open(make_home(scratch / "home"))
    try:
        code = COOK.replace("KITCHEN", inspect.getsource(session_worker.kitchen))
        await node.sessions.deploy("cook", {"agent.py": code})
        session = (await node.sessions.start("cook")).id
        said, _ = await _said(node, session, str(entries), LUNCH_S)
        back: list[float] = []
        for turn in range(repeats):
            await _put_away(node, session)
            again, took = await _said(node, session, str(entries - 1 - turn), LUNCH_S)
            if again != said or not said.startswith("True"):
                raise RuntimeError(f"not the same kitchen: {said!r}, then {again!r}")
            back.append(took)
        row = await node.machines.get(str((await node.sessions.get(session)).meta["machine"]))
        bytes_kept = (await node.sessions.cost(session)).stored_bytes
        await node.sessions.close(session)
        return {"back": back, "work": float(said.split()[1]), "driver": row.driver, "bytes": bytes_kept}
    finally:
        await node.close(detach=False)
        shutil.rmtree(node.config.run_dir, ignore_errors=True)  # its template is in shared memory
        shutil.rmtree(scratch, ignore_errors=True)


async def reconnect(tokens: int = TOKENS, seed: int = 7) -> dict[str, int]:
    """Return drops, what was missing or doubled for a client that goes on by ids, and for one that keeps none."""
    draw = random.Random(seed)
    logging.getLogger("asyncio").setLevel(
        logging.ERROR
    )  # it would tell of every piece written to a client that has gone
    with tempfile.TemporaryDirectory(prefix="bs") as folder:
        node = await LocalNode.open(load_config(home=Path(folder, "h"), run_dir=Path(folder, "r"), driver="fake"))
        try:
            await node.sessions.deploy("talk", {"agent.py": TALK})
            session = (await node.sessions.start("talk")).id
            await node.sessions.send(session, str(tokens), key="1")
            async with served(make_app(node, ProgressHub()), Path(folder, "s")) as path, asyncio.timeout(LUNCH_S):
                ours, plain = EventReader(path, session), EventReader(path, session, remember=False)
                ended = [False, False]
                while not all(ended):
                    for at, reader in enumerate((ours, plain)):
                        cut = draw.randrange(1, CUT_BYTES) if reader.drops < DROPS else None
                        if not ended[at]:
                            ended[at] = await reader.connect(cut_after=cut)
                            reader.drops += not ended[at]
            whole = "".join(f"t{n} " for n in range(tokens))
            wrong = len(ours.faults) + (ours.final != whole) + (ours.positions != sorted(set(ours.positions)))
            shown = "".join(plain.shown).split()
            missing = set(whole.split()) - set(shown)
            return {"drops": ours.drops, "wrong": wrong, "plain_wrong": len(shown) - len(set(shown)) + len(missing)}
        finally:
            await node.close(detach=False)
