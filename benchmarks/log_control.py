"""The control plane alone: sessions and machines started as fast as one server can, on the fake driver, on either database.

    python -m benchmarks.log_control [--json FILE] [--seconds 5] [--at-once 64]

A *session start* is what `POST /v1/sessions` does: the agent's current version looked up, the session durable. A *machine start* is
`POST /v1/machines`: restored from its template, the guest's thaw answered, its row durable. Both through the node, in one
process, without HTTP; every answer is waited for. `cpu_ms` is processor time of this process a start, which a busy host does not
change.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from recess.config import load_config
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from recess.testing.postgres_server import PostgresServer

AGENT = "from recess_agent import agent\n\n@agent(image='base')\nasync def coder(s):\n    async for turn in s:\n        pass\n"


async def rate(start: Callable[[int], Awaitable[object]], seconds: float, at_once: int) -> dict[str, float]:
    """Return starts a minute, with so many under way at once."""
    done = 0
    begin, busy = time.perf_counter(), time.process_time()

    async def one() -> None:
        nonlocal done
        while time.perf_counter() - begin < seconds:
            done += 1
            await start(done)

    await asyncio.gather(*(one() for _ in range(at_once)))
    took = time.perf_counter() - begin
    return {"per_minute": done / took * 60, "cpu_ms": (time.process_time() - busy) / done * 1e3, "started": float(done)}


async def measure(folder: Path, database_url: str, seconds: float, at_once: int) -> dict[str, Any]:
    """Return the figures of one node."""
    config = load_config({}, home=folder / "home", run_dir=folder / "run", driver="fake", database_url=database_url)
    node = await LocalNode.open(config)
    try:
        await node.sessions.deploy("coder", {"agent.py": AGENT})
        spec = MachineSpec(image="base")
        first = await node.machines.create(spec)  # the template is made once
        await node.machines.remove(first.id, force=True)

        async def machine(_n: int) -> None:
            row = await node.machines.create(spec)
            await node.machines.remove(row.id, force=True)

        return {
            "sessions": await rate(lambda _n: node.sessions.start("coder"), seconds, at_once),
            "machines_and_their_ends": await rate(machine, seconds, at_once),
        }
    finally:
        await node.close(detach=False)


def main() -> None:
    """Run on both databases and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--at-once", type=int, default=64)
    args = parser.parse_args()
    result: dict[str, Any] = {}
    with PostgresServer() as server:
        for name, url in (("sqlite", ""), ("postgres", server.database())):
            with tempfile.TemporaryDirectory(prefix="rc-") as folder:
                result[name] = asyncio.run(measure(Path(folder), url, args.seconds, args.at_once))
    for name, kinds in result.items():
        for kind, figures in kinds.items():
            print(f"{name:9} {kind:24}", "  ".join(f"{key} {value:,.2f}" for key, value in figures.items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
