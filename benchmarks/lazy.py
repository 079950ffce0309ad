"""`recess bench lazy`: a large machine that comes back at once: first replies, with and without its working set known.

    python -m benchmarks.lazy [--repeats N] [--resident MIB] [--remote-resident MIB] [--only WORD] [--out FOLDER]

A guest with so much resident memory and a Python that holds it is snapshotted once and restored again and again, each way:
lazily from this disk and lazily from a bucket (a real S3 server on loopback, filled by another home: `benchmarks.buckets`),
each with its working set forgotten before, and known; and by mapping page files, for comparison. Every
reply of the Python is a checksum over its own pages and compared with what it was before the snapshot.

The server's own speed is measured beside it and told. With `moto` the times are its own: it takes a whole object in hand for
every range, so the remote half has a smaller guest by default.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import buckets
from benchmarks.figures import quantile
from benchmarks.run import SPEC, close_node, machine_facts, make_home, pool_of, say
from recess.config import Config, load_config
from recess.guestlink.link import ExecRequest, Job
from recess.machines.bringback import FIRST_REPLY
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from recess.units import GIB, MIB

HOLDER = r"""
import os, sys, zlib
pages = int(sys.argv[1])
block, pool = bytearray(pages << 12), memoryview(os.urandom(4 << 20))
for n in range(pages):  # each page its own, and half of it compresses to nothing
    at = n << 12
    start = n * 2048 % (len(pool) - 2048)
    block[at : at + 2040] = pool[start : start + 2040]
    block[at + 2040 : at + 2048] = n.to_bytes(8, "little")
print("ready", flush=True)
for line in sys.stdin:
    start, total = int(line), 0
    for n in range(64):
        at = (start * 7919 + n * 4057) % pages << 12
        total = zlib.crc32(block[at : at + 4096], total)
    print(total, flush=True)
"""
QUESTION = 1  # the same pages each time: what a working set can know
FILLED_S = 600.0
GUESTD_MS, PYTHON_MS, READ_SHARE = 100.0, 350.0, 0.01  # DESIGN's budgets for 1 GiB


@dataclass
class Way:
    """One way back, and what was seen of it. Times in ms; `read`: stored bytes read for faults, as a share of all."""

    name: str
    first: list[float] = field(default_factory=list)
    guestd: list[float] = field(default_factory=list)
    python: list[float] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    steps: dict[str, list[float]] = field(default_factory=dict)


async def line_of(output: AsyncIterator[tuple[int, bytes]]) -> str:
    """Return the next line that the Python writes. Raises RuntimeError if it ended."""
    said = b""
    async for stream, data in output:
        said += data if stream == 1 else b""
        if said.endswith(b"\n"):
            return said.decode().split()[-1]
    raise RuntimeError("the guest's Python has ended")


async def ask(job: Job, output: AsyncIterator[tuple[int, bytes]]) -> int:
    """Return the Python's answer."""
    await job.write(b"%d\n" % QUESTION)
    return int(await line_of(output))


async def hold(node: LocalNode, resident_mib: int) -> tuple[str, str, int]:
    """Bring the guest up and snapshot it; return the snapshot, the Python's job and its answer."""
    spec: MachineSpec = replace(SPEC, memory_bytes=resident_mib * MIB + 512 * MIB)
    row = await node.machines.create(spec, name="bench-large")
    link = await node.machines.link(row.id)
    pages = resident_mib * MIB // 4096
    job = await link.exec(ExecRequest(argv=["python3", "-u", "-c", HOLDER, str(pages)], cwd="/root", stdin=True))
    output = job.output()
    await line_of(output)
    answer = await ask(job, output)
    await job.detach()
    say(f"snapshot of {resident_mib} MiB")
    snap = await node.machines.snapshot(row.id, name="bench-large:v1")
    await node.machines.remove(row.id, force=True)
    return snap.id, job.job_id, answer


async def once(node: LocalNode, way: Way, snapshot: str, job_id: str, answer: int, *, forget: bool) -> None:
    """Restore, ask, wait until every page is there, and remove it. `forget`: nothing is known of what it will touch."""
    if forget:
        shutil.rmtree(node.config.home / "touched", ignore_errors=True)
    await pool_of(node).pool_settled()
    began = time.perf_counter()
    row, report = await node.machines.restore(snapshot)
    guestd = time.perf_counter() - began
    try:
        job = await (await node.machines.link(row.id)).attach(job_id)
        found = await ask(job, job.output())
        python = time.perf_counter() - began
        if found != answer:
            raise RuntimeError(
                f"{way.name}: the guest's Python answers {found}, not {answer}: its memory is not what it was"
            )
        await job.detach()
        way.first.append(report.timings_s[FIRST_REPLY] * 1e3)
        way.guestd.append(guestd * 1e3)
        way.python.append(python * 1e3)
        for step, seconds in report.timings_s.items():
            if step == FIRST_REPLY:
                continue
            way.steps.setdefault(step, []).append(seconds * 1e3)
        paging = await filled(node, row.id)
        if "pager_faults" in paging:
            way.faults.append(float(paging["pager_faults"]))
            way.read.append(float(paging["pager_fault_bytes"]) / max(1.0, float(paging["pager_stored_bytes"])))
    finally:
        await node.machines.remove(row.id, force=True)


async def filled(node: LocalNode, machine: str) -> Mapping[str, Any]:
    """Return what a machine's pager reports once it has brought every page; at once if it has none. Raises TimeoutError."""
    async with asyncio.timeout(FILLED_S):
        while True:
            paging: Mapping[str, Any] = (await node.machines.stats(machine))["paging"]
            if "pager_faults" in paging or "pager_state" not in paging:
                return paging
            await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def opened(config: Config) -> AsyncIterator[LocalNode]:
    """Open a node on a home of our own."""
    node = await LocalNode.open(config, progress=say)
    try:
        yield node
    finally:
        await close_node(node)


async def from_disk(scratch: Path, images: Path, args: argparse.Namespace, keep: Callable[[Way], None]) -> None:
    """The ways back from this disk."""
    config = make_home(scratch / "local", images)
    lazily = replace(config, lazy_memory="lazy", page_files_bytes=0)
    async with opened(lazily) as node:
        made = await hold(node, args.resident)
        await alternate(node, ("lazily, from this disk", made), args.repeats, keep)
    if args.only:
        return
    async with opened(config) as node:
        way = Way(f"page files mapped, {args.resident} MiB")
        await node.machines.restore(made[0], name="bench-first")  # read from the store: this writes the page files
        await filled(node, (await node.machines.get("bench-first")).id)
        await node.machines.remove("bench-first", force=True)
        await node.caches_settled()
        for _ in range(args.repeats):
            await once(node, way, *made, forget=False)
        keep(way)


async def alternate(
    node: LocalNode, what: tuple[str, tuple[str, str, int]], repeats: int, keep: Callable[[Way], None]
) -> None:
    """Restore in turns with the working set forgotten and known (each forgotten one teaches the next)."""
    name, made = what
    without, known = Way(f"{name}, nothing known"), Way(f"{name}, working set known")
    for number in range(repeats):
        say(f"{name}: {number + 1} of {repeats}")
        await once(node, without, *made, forget=True)
        await once(node, known, *made, forget=False)
    keep(without)
    keep(known)


async def from_bucket(scratch: Path, images: Path, args: argparse.Namespace, keep: Callable[[Way], None]) -> None:
    """The ways back from a bucket that another home has filled; this one keeps no copies."""
    with buckets.served(scratch) as bucket:
        say(bucket.speed())
        keys: dict[str, Any] = {**bucket.config, "lazy_memory": "lazy", "page_files_bytes": 0}
        async with opened(replace(make_home(scratch / "filling", images), **keys)) as node:
            snapshot, job, answer = await hold(node, args.remote_resident)
        args.bucket = bucket.speed()
        async with opened(replace(make_home(scratch / "remote", images), **keys)) as node:
            await alternate(node, ("lazily, from a bucket", (snapshot, job, answer)), args.repeats, keep)


async def run(args: argparse.Namespace, keep: Callable[[Way], None]) -> None:
    """Measure all ways, or those with `--only` in their kind."""
    images = load_config().images_dir
    scratch = Path(tempfile.mkdtemp(prefix="recess-lazy-"))
    try:
        if args.only in ("", "disk"):
            await from_disk(scratch, images, args, keep)
        if args.only in ("", "bucket"):
            if not buckets.server_here():
                say("skipped: from a bucket (neither s3s-fs nor moto is installed)")
            else:
                await from_bucket(scratch, images, args, keep)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def cells(way: Way) -> Iterator[str]:
    """Yield a row of the table. Pure."""
    yield way.name
    yield str(len(way.guestd))
    for samples in (way.first, way.guestd, way.python):
        yield f"{quantile(samples, 0.5):.0f} / {quantile(samples, 0.95):.0f}"
    yield f"{quantile(way.faults, 0.5):.0f}" if way.faults else "-"
    yield f"{quantile(way.read, 0.5):.2%}" if way.read else "-"


def markdown(ways: Sequence[Way], args: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return the report. Pure."""
    out = [
        f"`recess bench lazy --repeats {args['repeats']} --resident {args['resident']} "
        f"--remote-resident {args['remote_resident']}`, {facts['date']}: {facts['cpu']}, {facts['cores']} cores, "
        f"load {facts['load'][0]:.1f} before. p50 / p95 in ms, from the call. Goals for 1 GiB: guestd's first reply, and "
        f"served, {GUESTD_MS:.0f} ms, its own Python {PYTHON_MS:.0f} ms, less than {READ_SHARE:.0%} read for faults.",
        "", "| way back | n | guestd's first reply | thawed and served | its own Python's | faults | read for them |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    out += ["| " + " | ".join(cells(way)) + " |" for way in ways]
    out += ["", "Steps until it is served, p50 in ms (they overlap):", ""]
    if args.get("bucket"):
        out += [args["bucket"] + ".", ""]
    for way in ways:
        steps = ", ".join(f"{name} {quantile(ms, 0.5):.1f}" for name, ms in way.steps.items())
        out.append(f"- {way.name}: {steps}")
    return "\n".join(out)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="recess bench lazy", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--resident", type=int, default=GIB // MIB, help="MiB that the guest's Python holds")
    parser.add_argument("--remote-resident", type=int, default=256, help="the same for the bucket")
    parser.add_argument(
        "--only", choices=("disk", "bucket"), default="", help="one kind of store; no page files either"
    )
    parser.add_argument("--out", default="build/bench-lazy", help="folder for the table and the figures")
    args = parser.parse_args()
    out, facts, ways = Path(args.out), machine_facts(), list[Way]()
    out.mkdir(parents=True, exist_ok=True)

    def keep(way: Way) -> None:
        ways.append(way)
        figures = {"machine": facts, "arguments": vars(args), "ways": [vars(one) for one in ways]}
        (out / "lazy.json").write_text(json.dumps(figures, indent=1))
        (out / "lazy.md").write_text(markdown(ways, vars(args), facts) + "\n")

    asyncio.run(run(args, keep))
    print((out / "lazy.md").read_text(), end="")


if __name__ == "__main__":
    main()
