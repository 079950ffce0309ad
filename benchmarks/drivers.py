"""`recess bench drivers`: what a machine costs under each driver that works here, in one run, beside a process of the host.

Rounds go through the drivers in turn, so that what else the host does meets all of them alike. What a driver cannot do is
left out. Work is timed by the clock inside; everything else from outside, to an answer of the guest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.figures import quantile
from benchmarks.plots import plot_panels
from benchmarks.run import machine_facts, say
from recess.config import Config, load_config
from recess.errors import RecessError
from recess.guestlink.link import ExecRequest
from recess.machines.service import MachineSpec
from recess.node.drivers import real_drivers, try_driver
from recess.node.local import LocalNode

T = TypeVar("T")
NATIVE = "process of the host"
FORKS = 8
SPEC = MachineSpec(memory_bytes=512 << 20, disk_bytes=1 << 30)
ROWS = (
    ("start", "start, ms", 1e3),
    ("first_exec", "start to a first command's end, ms", 1e3),
    ("exec", "exec of `true`, ms", 1e3),
    ("standstill", "standstill of a snapshot, ms", 1e3),
    ("durable", "snapshot durable, ms", 1e3),
    ("bytes", "stored, MB", 1e-6),
    ("restore_exec", "resume to a first command's end, ms", 1e3),
    ("fork8", f"fork x{FORKS}, each answers, ms", 1e3),
    ("memory", "memory of an idle machine, MB", 1e-6),
    ("cpu", "CPU loop, ms", 1e3),
    ("files", "file-heavy work, ms", 1e3),
)  # fmt: skip

CPU = "import time\nt=time.perf_counter()\nn=0\nfor i in range(2000000): n+=i*i%7\nprint(time.perf_counter()-t)"
FILES = """import os, shutil, tempfile, time
t = time.perf_counter()
d = tempfile.mkdtemp(dir=os.environ.get("HOME", "/root"))
for i in range(1000):
    with open(f"{d}/{i}", "w") as f: f.write("x" * 500)
n = sum(len(open(e.path).read()) for e in os.scandir(d) if os.stat(e.path).st_size)
shutil.rmtree(d)
print(time.perf_counter() - t)"""
# A megabyte that is new each time, so that every snapshot has something to store.
DIRTY = "head -c 1000000 /dev/urandom >/dev/shm/new"

Samples = dict[str, list[float]]


async def timed(work: Awaitable[T]) -> tuple[T, float]:
    """Return what comes of it, and how many seconds it took."""
    began = time.perf_counter()
    result = await work
    return result, time.perf_counter() - began


class Side:
    """One driver's machine, and what was measured of it."""

    def __init__(self, node: LocalNode, name: str, spec: MachineSpec) -> None:
        self.node = node
        self.name = name
        self.spec = replace(spec, driver=name)
        self.samples: Samples = {key: [] for key, _, _ in ROWS}

    def note(self, key: str, value: float) -> None:
        """Add a sample."""
        self.samples[key].append(value)

    async def run(self, machine: str, argv: Sequence[str]) -> str:
        """Run a command to its end and return what it said. Raises RuntimeError when it fails."""
        job = await (await self.node.machines.link(machine)).exec(ExecRequest(list(argv), env={"HOME": "/root"}))
        out = b"".join([data async for _stream, data in job.output()])
        if await job.wait() != 0:
            raise RuntimeError(f"{self.name}: {argv[0]} failed: {out.decode(errors='replace')[-500:]}")
        return out.decode()

    async def round(self) -> None:
        """Measure everything once, on a machine of its own."""
        machines, began = self.node.machines, time.perf_counter()
        row = await machines.create(self.spec)
        self.note("start", time.perf_counter() - began)
        await self.run(row.id, ["true"])
        self.note("first_exec", time.perf_counter() - began)
        _, took = await timed(self.run(row.id, ["true"]))
        self.note("exec", took)
        self.note("cpu", float(await self.run(row.id, ["python3", "-c", CPU])))
        self.note("files", float(await self.run(row.id, ["python3", "-c", FILES])))
        await machines.snapshot(row.id)
        await self.run(row.id, ["sh", "-c", DIRTY])
        snapshot = await machines.snapshot(row.id)
        self.note("standstill", float(snapshot.figures["standstill_s"]))
        self.note("durable", float(snapshot.figures["durable_s"]))
        self.note("bytes", float(snapshot.figures["new_bytes"]))
        await machines.suspend(row.id)
        began = time.perf_counter()
        await machines.resume(row.id)
        await self.run(row.id, ["true"])
        self.note("restore_exec", time.perf_counter() - began)
        began = time.perf_counter()
        children = await machines.fork(row.id, FORKS)
        await asyncio.gather(*(self.run(child.id, ["true"]) for child in children))
        self.note("fork8", time.perf_counter() - began)
        for child in children:
            self.note("memory", float((await machines.stats(child.id))["pss_bytes"]))
        for one in (row, *children):
            await machines.remove(one.id, force=True)


def native_round(samples: Samples) -> None:
    """Measure what a process can be compared in."""

    def run(*argv: str) -> tuple[str, float]:
        began = time.perf_counter()
        said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        return said, time.perf_counter() - began

    for key in ("start", "first_exec", "exec"):
        samples[key].append(run("true")[1])
    for key, script in (("cpu", CPU), ("files", FILES)):
        samples[key].append(float(run(sys.executable, "-c", script)[0]))


def make_home(home: Path) -> Config:
    """Make a fresh home that has the user's images and tools; return its configuration."""
    user = load_config()
    home.mkdir(parents=True)
    (home / "images").symlink_to(user.images_dir)
    (home / "bin").symlink_to(user.home / "bin")
    return load_config(home=home, driver="qemu")  # the others are asked for by name


async def measure(repeats: int, wanted: Sequence[str], spec: MachineSpec = SPEC) -> dict[str, Any]:
    """Run it; returns sides (name to samples) and skipped (name to reason)."""
    scratch = Path(tempfile.mkdtemp(prefix="recess-bench-"))
    node = await LocalNode.open(make_home(scratch / "home"), progress=say)
    sides: dict[str, Samples] = {NATIVE: {key: [] for key, _, _ in ROWS}}
    skipped: dict[str, str] = {}
    try:
        running: list[Side] = []
        for name, driver in real_drivers(node.config).items():
            trial = await try_driver(driver)
            if not trial.engine or (wanted and name not in wanted):
                skipped[name] = trial.said if not trial.engine else "not asked for"
                continue
            side = Side(node, name, spec)
            sides[f"{name} ({trial.engine})"] = side.samples
            say(f"{name}: its template")
            warm = await node.machines.create(side.spec)
            await node.machines.remove(warm.id, force=True)
            running.append(side)
        for number in range(repeats):
            native_round(sides[NATIVE])
            for side in running:
                say(f"round {number + 1} of {repeats}: {side.name}")
                await _one(side, skipped)
    finally:
        await node.close(detach=False)
        shutil.rmtree(node.config.run_dir, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
    return {"sides": sides, "skipped": skipped}


async def _one(side: Side, skipped: dict[str, str]) -> None:
    try:
        await side.round()
    except RecessError as exc:  # what it did until then stays; the row shows fewer samples
        skipped[side.name] = f"a round broke off: {exc.message}"


def markdown(found: Mapping[str, Any], facts: Mapping[str, Any], repeats: int) -> str:
    """Return the table: medians, with the ratio to a process of the host where there is one, else to QEMU. Pure."""
    sides: Mapping[str, Samples] = found["sides"]
    beside = next((name for name in sides if name.startswith("qemu ")), NATIVE)
    told = ", ".join(f"{key} {value}" for key, value in facts.items())
    lines = [
        f"Medians of {repeats} rounds ({told}).",
        "",
        f"| | {' | '.join(sides)} |",
        "|---" * (len(sides) + 1) + "|",
    ]
    for key, title, factor in ROWS:
        base, unit = (NATIVE, "x") if sides[NATIVE][key] else (beside, "x qemu")
        cells = []
        for name, samples in sides.items():
            if not samples[key]:
                cells.append("-")
                continue
            p50 = quantile(samples[key], 0.5)
            low = quantile(sides[base][key], 0.5) if name != base and sides[base][key] else 0.0
            ratio = f" ({p50 / low:.3g} {unit})" if low else ""
            cells.append(f"{p50 * factor:.3g}{ratio}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {why}" for name, why in found["skipped"].items())]
    return "\n".join(lines).rstrip()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="recess bench drivers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--driver", action="append", default=[], help="only these")
    parser.add_argument("--memory-mib", type=int, default=SPEC.memory_bytes >> 20, help="of each machine")
    parser.add_argument("--out", default="build/bench-drivers", help="folder for the table, the samples and the plots")
    args = parser.parse_args()
    spec = replace(SPEC, memory_bytes=args.memory_mib << 20)
    found = asyncio.run(measure(args.repeats, args.driver, spec))
    facts = machine_facts()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "drivers.json").write_text(json.dumps({"machine": facts, **found}, indent=1))
    text = markdown(found, facts, args.repeats)
    (out / "drivers.md").write_text(text + "\n")
    print(text)
    say(plot_panels(found["sides"], out / "drivers.png", ROWS, columns=3))


if __name__ == "__main__":
    main()
