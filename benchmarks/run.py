"""`make bench`: the figures of DESIGN's budget table, each beside the bare QEMU of the same run; JSON and a table.

    python -m benchmarks.run [--json FILE] [--repeats N] [--seconds S]

Uses the images of the configured home and a home of its own for everything else. Absolute times are worth only as
ratios to the bare column of the same run: the machine, its load and its accelerator are recorded with them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.bare import Bare, BareVm, Files
from benchmarks.figures import Figure, table
from benchmarks.peers import start_work
from benchmarks.workload import HEARTBEAT, WORK
from recess.config import Config, load_config
from recess.drivers.qemu import QemuDriver
from recess.drivers.qemu.host import measure_tsc_khz
from recess.guestlink.link import ExecRequest, GuestLink, Job
from recess.images import clone_sparse, ensure_blank_disk
from recess.machines import warmup
from recess.machines.bringback import FIRST_REPLY
from recess.machines.manager import Manager
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode

MEMORY = 512 << 20
DISK = 4 << 30
SPEC = MachineSpec(image="base", memory_bytes=MEMORY, disk_bytes=DISK, network="none")


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


class Beat:
    """The heartbeat as the host hears it: the longest silence since it was asked last."""

    def __init__(self, job: Job) -> None:
        self._worst = 0.0
        self._task = asyncio.create_task(self._listen(job))

    @classmethod
    async def start(cls, link: GuestLink) -> Beat:
        """Start the heartbeat in the guest."""
        return cls(await link.exec(ExecRequest(argv=["python3", "-u", "-c", HEARTBEAT])))

    async def _listen(self, job: Job) -> None:
        last = 0.0
        async for _stream, _data in job.output():
            now = time.perf_counter()
            self._worst = max(self._worst, now - last if last else 0.0)
            last = now

    def worst(self) -> float:
        """Return the longest silence in seconds and begin anew."""
        worst, self._worst = self._worst, 0.0
        return worst

    async def stop(self) -> None:
        """Stop listening."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def timed(work: Awaitable[Any]) -> tuple[Any, float]:
    """Await and return (result, seconds)."""
    started = time.perf_counter()
    result = await work
    return result, time.perf_counter() - started


async def snapshots(node: LocalNode, bare: Bare, repeats: int) -> list[Figure]:
    """Standstill, durable, bytes, restore: ours and bare over the same workload."""
    machines = node.machines
    row = await machines.create(SPEC, name="bench-work")
    link = await machines.link(row.id)
    await start_work(link, WORK)
    await asyncio.sleep(1.0)
    first = await machines.snapshot(row.id, name="bench-first")  # of the agent alone: the heartbeat is a Python more
    beat = await Beat.start(link)
    await asyncio.sleep(1.0)
    idle = []
    for _ in range(5):
        beat.worst()
        await asyncio.sleep(0.3)
        idle.append(beat.worst())
    await machines.snapshot(row.id)
    host, felt, durable, size = [], [], [], []
    for _ in range(repeats):
        await asyncio.sleep(0.3)
        beat.worst()
        snap = await machines.snapshot(row.id)
        await asyncio.sleep(0.05)
        felt.append(beat.worst())
        host.append(float(snap.figures["freezer_s"]))
        durable.append(float(snap.figures["durable_s"]))
        size.append(float(snap.figures["new_bytes"]))
    pool = pool_of(node)
    restores = await _restores(machines, snap.id, repeats, pool.pool_settled)
    await pool.resize_pool(0)
    unready = await _restores(machines, snap.id, repeats, pool.pool_settled)
    await pool.resize_pool(node.config.warm_pool_max)
    forks = []
    for i in range(max(5, repeats // 2)):
        await pool.pool_settled()
        children, seconds = await timed(machines.fork(row.id, 1, names=[f"bench-f{i}"]))
        forks.append(seconds)
        await machines.remove(children[0].id, force=True)
    await beat.stop()
    await machines.remove(row.id, force=True)
    say("bare: the same work under QEMU alone")
    b = await bare_snapshots(bare, max(5, repeats // 2))
    ms, mb = 1e3, 1e-6
    note = f"longest silence of a 2 ms heartbeat as the host hears it; without a snapshot {max(idle) * ms:.1f} ms"
    return [
        Figure("standstill, host (freezer included)", "ms", _scale(host, ms), _scale(b["still"], ms), 25, 60),
        Figure("standstill, felt by the workload", "ms", _scale(felt, ms), (), 25, 60, note=note),
        Figure("snapshot durable", "ms", _scale(durable, ms), _scale(b["durable"], ms), 100),
        Figure("stored, first snapshot over a warm template", "MB", (first.figures["new_bytes"] * mb,), _scale(b["bytes"], mb), 4),
        Figure("stored, each later snapshot", "MB", _scale(size, mb)),
        *_ways_back("a VM waits", restores, b["restore"], 70),
        *_ways_back("none waits", unready, b["restore"], 120),
        Figure("fork of a running machine to child served", "ms", _scale(forks, ms), _scale(b["fork"], ms), 150),
    ]  # fmt: skip


def _ways_back(how: str, took: list[tuple[float, float]], bare: list[float], budget: float) -> list[Figure]:
    """Both ends of a restore, held to the same budget: what bare does, too, and what Recess promises. Pure."""
    ends = (("guestd's first reply (its hello, as bare's)", [first for first, _ in took]),
            ("a thawed, served machine", [served for _, served in took]))  # fmt: skip
    return [
        Figure(f"restore to {end}, {how}", "ms", _scale(seconds, 1e3), _scale(bare, 1e3), budget)
        for end, seconds in ends
    ]


async def _restores(
    machines: Manager, snapshot: str, repeats: int, ready: Callable[[], Awaitable[None]]
) -> list[tuple[float, float]]:
    """Restore again and again, each time when as many VMs wait as will; return how long each took to guestd's first reply,
    and until it was served."""
    out = []
    for i in range(repeats):
        await ready()
        child, report = await machines.restore(snapshot, name=f"bench-r{i}")
        out.append((report.timings_s[FIRST_REPLY], report.seconds))
        await machines.remove(child.id, force=True)
    return out


def pool_of(node: LocalNode) -> QemuDriver:
    """Return the node's driver, whose warm pool these figures switch on and off."""
    driver = node._chosen.driver
    if not isinstance(driver, QemuDriver):
        raise SystemExit(f"these figures are about QEMU, and this node runs {driver.name}")
    return driver


def _scale(samples: list[float], factor: float) -> tuple[float, ...]:
    return tuple(s * factor for s in samples)


async def bare_snapshots(bare: Bare, repeats: int) -> dict[str, list[float]]:
    """QEMU's own whole-machine snapshot: save, fsync, compress (zstd -1), restore."""
    vm, _ = await bare.fork()
    await start_work(vm.link, WORK)
    out: dict[str, list[float]] = {"still": [], "durable": [], "bytes": [], "restore": [], "fork": []}
    folder = Path(tempfile.mkdtemp(prefix="recess-bare-"))
    state = folder / "state"
    for _ in range(repeats):
        await asyncio.sleep(0.3)
        started = time.perf_counter()
        out["still"].append(await vm.save(state))
        with state.open("rb") as f:
            os.fsync(f.fileno())
        out["durable"].append(time.perf_counter() - started)
        packed = await _output("zstd", "-1", "-q", "-c", str(state))
        out["bytes"].append(float(packed))
        child, seconds = await bare.restore(state)
        out["restore"].append(seconds)
        out["fork"].append(seconds + out["still"][-1])  # a bare fork of a running machine is a save and a restore
        await child.kill()
    await vm.kill()
    shutil.rmtree(folder)
    return out


async def _output(*argv: str) -> int:
    """Run a program and return how many bytes it wrote."""
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    total = 0
    while process.stdout and (data := await process.stdout.read(1 << 20)):
        total += len(data)
    await process.wait()
    return total


async def template_forks(node: LocalNode, bare: Bare, repeats: int, seconds: float) -> list[Figure]:
    """Fork of a template, starts a minute at 2 in parallel, memory of 8 idle forks."""
    machines, pool = node.machines, pool_of(node)
    ours, theirs = await _forks(node, bare, repeats)
    await pool.resize_pool(0)
    unready, theirs_then = await _forks(node, bare, repeats)
    count = iter(range(1_000_000))

    async def one() -> None:
        row = await machines.create(SPEC, name=f"bench-s{next(count)}")
        await (await machines.link(row.id)).ping()
        await machines.remove(row.id, force=True)

    async def one_bare() -> None:
        vm, _ = await bare.fork()
        await vm.kill()

    rate, rate_unready, rate_bare = [], [], []
    for _ in range(3):
        await pool.resize_pool(0)
        rate_unready.append(await per_minute(one, seconds / 3))
        await pool.resize_pool(node.config.warm_pool_max)
        rate.append(await per_minute(one, seconds / 3))
        await pool.pool_settled()
        rate_bare.append(await per_minute(one_bare, seconds / 3))
    (ready,) = (await node.kept_ready()).values()
    held = [ready["memory_bytes"] / ready["waiting"]] if ready["waiting"] else []
    await pool.resize_pool(0)  # what waits shares pages with what is measured now
    rows = [await machines.create(SPEC, name=f"bench-p{i}") for i in range(8)]
    await asyncio.sleep(1.0)
    pss = [float((await machines.stats(r.id))["pss_bytes"]) for r in rows]
    for r in rows:
        await machines.remove(r.id, force=True)
    vms: list[BareVm] = [(await bare.fork())[0] for _ in range(8)]
    await asyncio.sleep(1.0)
    pss_bare = [float(vm.pss_bytes()) for vm in vms]
    for vm in vms:
        await vm.kill()
    await pool.resize_pool(node.config.warm_pool_max)
    return [
        Figure("fork of a template to child's reply, a VM waits", "ms", _scale(ours, 1e3), _scale(theirs, 1e3), 90),
        Figure("fork of a template to child's reply, none waits", "ms", _scale(unready, 1e3), _scale(theirs_then, 1e3), 90),
        Figure("starts a minute, 2 in parallel, each answered", "1/min", tuple(rate), tuple(rate_bare), 1400, more_is_better=True),
        Figure("the same without a warm pool", "1/min", tuple(rate_unready), tuple(rate_bare), 1400, more_is_better=True),
        Figure("memory of a VM that waits (PSS, keeper included)", "MB", _scale(held, 1e-6)),
        Figure("memory per idle fork, 8 of one template (PSS, keeper included)", "MB", _scale(pss, 1e-6), _scale(pss_bare, 1e-6), 55),
    ]  # fmt: skip


async def _forks(node: LocalNode, bare: Bare, repeats: int) -> tuple[list[float], list[float]]:
    """Return what forks of the template took, ours and bare, in turns: both see the same load."""
    ours, theirs = [], []
    for i in range(repeats):
        await pool_of(node).pool_settled()
        row, took = await timed(node.machines.create(SPEC, name=f"bench-t{i}"))
        ours.append(took)
        await node.machines.remove(row.id, force=True)
        await pool_of(node).pool_settled()
        vm, took = await bare.fork()
        theirs.append(took)
        await vm.kill()
    return ours, theirs


async def per_minute(one: Callable[[], Awaitable[None]], seconds: float) -> float:
    """Run `one` two at a time for this long; return how many a minute."""
    started, done = time.perf_counter(), 0

    async def worker() -> None:
        nonlocal done
        while time.perf_counter() - started < seconds:
            await one()
            done += 1

    await asyncio.gather(worker(), worker())
    return done / (time.perf_counter() - started) * 60


async def cold_template(home: Path, images: Path) -> list[Figure]:
    """Bytes over a template that was frozen right after boot."""
    steps = warmup.STEPS
    warmup.STEPS = ()
    try:
        node = await open_node(home, images)
        try:
            row = await node.machines.create(SPEC, name="bench-cold")
            await start_work(await node.machines.link(row.id), WORK)
            await asyncio.sleep(1.0)
            snap = await node.machines.snapshot(row.id)
            await node.machines.remove(row.id, force=True)
        finally:
            await close_node(node)
    finally:
        warmup.STEPS = steps
    return [Figure("stored, first snapshot over a cold template", "MB", (snap.figures["new_bytes"] * 1e-6,), (), 10)]


def make_home(home: Path, images: Path) -> Config:
    """Make a fresh home that shares the user's images."""
    home.mkdir(parents=True)
    (home / "images").symlink_to(images)
    return load_config(home=home, driver="qemu")  # what the bare side is compared with


async def open_node(home: Path, images: Path) -> LocalNode:
    """Open a node on a fresh home."""
    return await LocalNode.open(make_home(home, images), progress=say)


async def close_node(node: LocalNode) -> None:
    """End a node on a home of our own, and what it left in shared memory: its templates."""
    await node.close(detach=False)
    shutil.rmtree(node.config.run_dir, ignore_errors=True)


def bare_files(config: Config, images: Path, scratch: Path) -> Files:
    """Return the files for the bare QEMU: the same kernel, initrd and root."""
    from recess.images import ImageStore, ensure_boot_files

    boot = ensure_boot_files(images, config.bin_dir / "guestd")
    disk = scratch / "disk"
    clone_sparse(ensure_blank_disk(images, DISK).path, disk)
    root = ImageStore(images).get("base").root_path
    qemu = config.qemu_bin or shutil.which("qemu-system-x86_64") or "qemu-system-x86_64"
    khz = measure_tsc_khz(config.bin_dir / "keeper")
    return Files(qemu, boot.kernel, boot.initrd, root, disk, MEMORY >> 20, khz)


async def measure(repeats: int, seconds: float) -> list[Figure]:
    """Measure everything."""
    images = load_config().images_dir
    scratch = Path(tempfile.mkdtemp(prefix="recess-bench-"))
    node = await open_node(scratch / "warm", images)
    bare = Bare(bare_files(node.config, images, scratch))
    try:
        say("templates")
        row = await node.machines.create(SPEC, name="bench-first-fork")
        await node.machines.remove(row.id, force=True)
        await bare.make_template()
        say("forks and starts")
        figures = await template_forks(node, bare, repeats, seconds)
        say("snapshots and restores")
        figures = [*await snapshots(node, bare, repeats), *figures]
    finally:
        bare.close()
        await close_node(node)
    say("a cold template")
    figures += await cold_template(scratch / "cold", images)
    shutil.rmtree(scratch)
    return figures


def machine_facts() -> dict[str, Any]:
    """Return what the figures were measured on."""
    cpu = next(
        (
            ln.split(":", 1)[1].strip()
            for ln in Path("/proc/cpuinfo").read_text().splitlines()
            if ln.startswith("model name")
        ),
        "?",
    )
    return {
        "cpu": cpu, "cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"), "load": os.getloadavg(),
    }  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="build/bench.json", help="where to write the figures")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each throughput run")
    args = parser.parse_args()
    figures = asyncio.run(measure(args.repeats, args.seconds))
    facts = machine_facts()
    out = Path(args.json)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": facts, "figures": [f.to_json() for f in figures]}, indent=1))
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    print(table(figures))
    for f in figures:
        if f.note:
            print(f"{f.name}: {f.note}")


if __name__ == "__main__":
    main()
