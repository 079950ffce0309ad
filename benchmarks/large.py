"""`recess bench large`: what a snapshot of a large machine costs when little of it changed, much of it, or nothing.

    python -m benchmarks.large [--repeats N] [--much N] [--resident MIB] [--filled MIB] [--out FOLDER]

A guest with so much resident memory and a disk of 2 GiB that holds so much data changes a given part of either and is
snapshotted, again and again, so that the last snapshots are of an old machine with many behind it: the standstill as the
guest's freezer has it, the time until it is durable, and the bytes stored. At the end the newest snapshot is restored, and
its Python answers with the checksum over all of its memory and its file that it gave before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.figures import quantile
from benchmarks.lazy import filled, line_of, opened
from benchmarks.run import SPEC, machine_facts, make_home, say
from recess.config import load_config
from recess.guestlink.link import ExecRequest, Job
from recess.node.local import LocalNode
from recess.units import GIB, MIB

WORKER = r"""
import os, sys, zlib
resident, filled = (int(word) << 20 for word in sys.argv[1:3])
block, at = bytearray(resident), {"memory": 0, "disk": 0}
def fresh(size):  # half of each page compresses to nothing
    return b"".join(os.urandom(2048) + b"\0" * 2048 for _ in range(size >> 12))
disk = open("/root/large", "w+b", buffering=0)
def change(where, size):
    start = at[where]
    whole = resident if where == "memory" else filled
    for done in range(0, size, 1 << 20):
        place = (start + done) % whole
        if where == "memory":
            block[place : place + (1 << 20)] = fresh(1 << 20)
        else:
            os.pwrite(disk.fileno(), fresh(1 << 20), place)
    if where == "disk":
        os.fsync(disk.fileno())
    at[where] = (start + size) % whole
def checksum():
    total = zlib.crc32(block)
    for start in range(0, filled, 1 << 20):
        total = zlib.crc32(os.pread(disk.fileno(), 1 << 20, start), total)
    return total
change("memory", resident)
change("disk", filled)
print("ready", flush=True)
for line in sys.stdin:
    where, size = line.split()
    if where == "sum":
        print(checksum(), flush=True)
    else:
        change(where, int(size) << 20)
        print("done", flush=True)
"""
CHANGED_MIB, MUCH_MIB = 10, 500
STANDSTILL_MS, STORED_MB = (
    25.0,
    12.0,
)  # for 10 MiB of 1 GiB, whatever the machine's age; the standstill for 500 MiB, too


@dataclass
class Change:
    """One kind of change, and its snapshots. Times in ms, sizes in MB."""

    name: str
    where: str  # memory | disk
    mib: int
    standstill: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)
    stored: list[float] = field(default_factory=list)

    def ages(self) -> tuple[float, float]:
        """Return the medians of the standstills of the first third and of the last."""
        third = max(1, len(self.standstill) // 3)
        return quantile(self.standstill[:third], 0.5), quantile(self.standstill[-third:], 0.5)


class Worker:
    """The guest's Python: told what to change, asked what it holds."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._output: AsyncIterator[tuple[int, bytes]] = job.output()

    async def line(self) -> str:
        """Return its next line. Raises RuntimeError if it ended."""
        return await line_of(self._output)

    async def ask(self, where: str, mib: int = 0) -> str:
        """Have it do something and return its answer."""
        await self.job.write(f"{where} {mib}\n".encode())
        return await self.line()


async def measure(node: LocalNode, args: argparse.Namespace, changes: Sequence[Change]) -> None:
    """Change, snapshot, and so on; then restore and compare. Raises RuntimeError if anything differs."""
    machines = node.machines
    spec = replace(SPEC, memory_bytes=args.resident * MIB + 512 * MIB, disk_bytes=2 * GIB)
    row = await machines.create(spec, name="bench-large")
    argv = ["python3", "-u", "-c", WORKER, str(args.resident), str(args.filled)]
    worker = Worker(await (await machines.link(row.id)).exec(ExecRequest(argv=argv, cwd="/root", stdin=True)))
    await worker.line()
    say("the first snapshot")
    await machines.snapshot(row.id)
    for number in range(args.repeats):
        say(f"round {number + 1} of {args.repeats}")
        for change in changes:
            if change.mib == MUCH_MIB and number >= args.much:
                continue
            if change.mib:
                await worker.ask(change.where, change.mib)
            snap = await machines.snapshot(row.id)
            change.standstill.append(float(snap.figures["freezer_s"]) * 1e3)
            change.durable.append(float(snap.figures["durable_s"]) * 1e3)
            change.stored.append(float(snap.figures["new_bytes"]) / 1e6)
    held = await worker.ask("sum")
    last = await machines.snapshot(row.id)
    await worker.job.detach()
    await machines.remove(row.id, force=True)
    await compare(node, last.id, worker.job.job_id, held)


async def compare(node: LocalNode, snapshot: str, job_id: str, held: str) -> None:
    """Restore it and ask once more. Raises RuntimeError if the answer is another."""
    row, _ = await node.machines.restore(snapshot)
    try:
        found = await Worker(await (await node.machines.link(row.id)).attach(job_id)).ask("sum")
        if found != held:
            raise RuntimeError(
                f"the restored guest holds {found}, not {held}: its memory or its disk is not what it was"
            )
        await filled(node, row.id)
    finally:
        await node.machines.remove(row.id, force=True)


async def run(args: argparse.Namespace, changes: Sequence[Change]) -> None:
    """Measure on a home of our own."""
    scratch = Path(tempfile.mkdtemp(prefix="recess-large-"))
    try:
        async with opened(make_home(scratch / "home", load_config().images_dir)) as node:
            await measure(node, args, changes)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def markdown(changes: Sequence[Change], args: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return the report. Pure."""
    options = " ".join(f"--{name} {args[name]}" for name in ("repeats", "much", "resident", "filled"))
    out = [
        f"`recess bench large {options}`, {facts['date']}: {facts['cpu']}, {facts['cores']} cores, load {facts['load'][0]:.1f} "
        f"before. p50 / p95. Goals: {STANDSTILL_MS:.0f} ms of standstill, {STORED_MB:.0f} MB for {CHANGED_MIB} MiB.",
        "", "| changed | n | standstill, ms | first third, last third | durable, ms | stored, MB |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for change in changes:
        young, old = change.ages()
        cells = [change.name, str(len(change.standstill)), _pair(change.standstill), f"{young:.1f}, {old:.1f}"]
        out.append("| " + " | ".join([*cells, _pair(change.durable, 0), _pair(change.stored, 2)]) + " |")
    return "\n".join(out)


def _pair(samples: Sequence[float], digits: int = 1) -> str:
    return f"{quantile(samples, 0.5):,.{digits}f} / {quantile(samples, 0.95):,.{digits}f}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="recess bench large", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--much", type=int, default=3, help=f"rounds with {MUCH_MIB} MiB changed")
    parser.add_argument("--resident", type=int, default=GIB // MIB, help="MiB that the guest's Python holds")
    parser.add_argument("--filled", type=int, default=512, help="MiB of data on its disk")
    parser.add_argument("--out", default="build/bench-large", help="folder for the table and the figures")
    args = parser.parse_args()
    out, facts = Path(args.out), machine_facts()
    out.mkdir(parents=True, exist_ok=True)
    changes = [
        Change("nothing", "memory", 0),
        Change(f"{CHANGED_MIB} MiB of memory", "memory", CHANGED_MIB),
        Change(f"{CHANGED_MIB} MiB of the disk", "disk", CHANGED_MIB),
        Change(f"{MUCH_MIB} MiB of memory", "memory", MUCH_MIB),
    ]
    asyncio.run(run(args, changes))
    figures = {"machine": facts, "arguments": vars(args), "changes": [vars(one) for one in changes]}
    (out / "large.json").write_text(json.dumps(figures, indent=1))
    (out / "large.md").write_text(markdown(changes, vars(args), facts) + "\n")
    print((out / "large.md").read_text(), end="")


if __name__ == "__main__":
    main()
