"""`recess bench codec`: what levels and frame sizes make of real guests' snapshots, and what else saves bytes.

    python -m benchmarks.codec [--guest NAME]... [--out FOLDER]

Each guest is a machine with its program at work; one at a time. The pages that its first snapshot stored are compressed
at every level and frame size, by one thread. Images: `recess images create node --packages nodejs`, `recess images
create chromium --packages chromium,fonts-dejavu-core`; a guest whose image or kernel is not there is skipped, by name, and
so is the npm project where npm or its registry is not. Guests run on Debian's kernel unless their name says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import start_work
from benchmarks.run import SPEC, close_node, machine_facts, make_home, say
from benchmarks.snapshots import new_pages
from benchmarks.workload import CHROMIUM, NODE, NPM_PROJECT, WORK
from recess.blobs import LocalBlobs
from recess.config import load_config
from recess.drivers.qemu import start
from recess.frames import FrameEncoder, WorkPool, decode_frame
from recess.guestlink.link import GuestLink
from recess.images.kernels import TRIMMED
from recess.machines import warmup
from recess.machines.contract import VmSpec
from recess.machines.emptying import drop_caches
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from recess.snapshots.archive import announce, archive_bytes
from recess.snapshots.contract import PageData, PageSource
from recess.snapshots.pagemap import KIND_BLOCKS
from recess.snapshots.reader import OpenSnapshot, by_hash
from recess.units import KIB, MIB, PAGE_BYTES

LEVELS = (-5, 1, 3, 6, 9, 12, 19)
FRAMES = (64 * KIB, 256 * KIB, 2 * MIB)
SETTLE_S = 2.0
SAMPLE_MIB = 48  # of a large guest: level 19 packs 2 MB a second


@dataclass(frozen=True)
class Guest:
    """One guest: an image and the Python program that brings its work up and says `ready`."""

    name: str
    image: str
    code: str
    memory_bytes: int = 512 * MIB
    warm: bool = True  # over a template that was pre-warmed
    zeroed: bool = True  # a kernel that zeroes what it frees
    kernel: str = "debian"
    npm: tuple[str, ...] = ()  # what its project in /root/app depends on


GUESTS = (
    Guest("idle base", "base", ""),
    Guest("Python agent", "base", WORK),
    Guest("Node server", "node", NODE, npm=NPM_PROJECT),
    Guest("Chromium, a page open", "chromium", CHROMIUM, 1024 * MIB),
    Guest("Python agent, cold template", "base", WORK, warm=False),
    Guest("Python agent, without init_on_free", "base", WORK, zeroed=False),
    Guest("Python agent, trimmed kernel", "base", WORK, kernel="trimmed"),
)


class Skipped(Exception):
    """What a guest needs is not here. Says what, and how to get it."""


async def put_project(link: GuestLink, packages: Sequence[str], scratch: Path) -> None:
    """Install npm packages on the host and put the project into the guest. Raises Skipped."""
    npm = shutil.which("npm")
    if npm is None:
        raise Skipped("npm is not installed: apt install npm")
    project = scratch / "app"
    project.mkdir(parents=True)
    process = await asyncio.create_subprocess_exec(
        npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", *packages, cwd=project,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, said = await process.communicate()
    if process.returncode:
        raise Skipped(f"npm cannot install {' '.join(packages)}: {said.decode(errors='replace')[-300:]}")
    packed = scratch / "app.tar"
    await asyncio.to_thread(shutil.make_archive, str(packed.with_suffix("")), "tar", scratch, "app")

    async def pieces() -> AsyncIterator[bytes]:
        with packed.open("rb") as file:
            while piece := file.read(1 << 16):
                yield piece

    await link.put_tar("/root", pieces())


def sample(pages: PageData, sample_mib: int) -> PageData:
    """Return stretches of the largest frame's size, evenly from all over, of so many MiB together at most."""
    stretch = FRAMES[-1] // PAGE_BYTES
    count, wanted = -(-len(pages) // stretch), max(1, sample_mib * MIB // FRAMES[-1])
    if count <= wanted:
        return pages
    chosen = np.linspace(0, count - 1, wanted).astype(np.int64)
    return np.concatenate([pages[at * stretch : (at + 1) * stretch] for at in chosen.tolist()])


def levels_of(pages: PageData, sample_mib: int) -> list[dict[str, float]]:
    """Return size and speed at each level and frame size; MB/s of content, one thread. Sizes of a large guest are those of
    an even sample, scaled."""
    taken = sample(pages, sample_mib)
    content, scale = (taken.data.cast("B"), len(pages) / len(taken)) if len(pages) else (memoryview(b""), 1.0)
    rows = []
    for level, frame in [(level, FRAMES[0]) for level in LEVELS] + [
        (level, f) for f in FRAMES[1:] for level in (1, 19)
    ]:
        encoder = FrameEncoder(level)
        began = time.process_time()
        frames = [encoder.encode(content[at : at + frame]) for at in range(0, len(content), frame)]
        packed = time.process_time()
        for one in frames:
            decode_frame(one.data, one.raw_bytes, one.hash, "bench")
        unpacked = time.process_time()
        size = sum(one.stored_bytes for one in frames)
        seconds = max(1e-9, packed - began), max(1e-9, unpacked - packed)
        rows.append({
            "level": level, "frame_bytes": frame, "bytes": round(size * scale), "encode_mb_s": len(content) / seconds[0] / 1e6,
            "decode_mb_s": len(content) / seconds[1] / 1e6, "decode_frame_us": seconds[1] / max(1, len(frames)) * 1e6,
        })  # fmt: skip
    return rows


async def measure(node: LocalNode, guest: Guest, scratch: Path, sample_mib: int) -> dict[str, Any]:
    """Bring a guest up, snapshot it, look at what was stored; then the same after its caches were dropped."""
    machines, blobs = node.machines, LocalBlobs(node.config.blobs_dir)
    spec: MachineSpec = replace(SPEC, image=guest.image, memory_bytes=guest.memory_bytes)
    row = await machines.create(spec, name="bench")
    try:
        link = await machines.link(row.id)
        if guest.npm:
            await put_project(link, guest.npm, scratch)
        if guest.code:
            await start_work(link, guest.code)
        await asyncio.sleep(SETTLE_S)
        snap = await machines.snapshot(row.id)
        pages = await asyncio.to_thread(new_pages, blobs, snap.id)
        sources = machines.fleet.need(row.id).template.sources
        matched = await asyncio.to_thread(block_pages, blobs, snap.id, sources)
        levels = await asyncio.to_thread(levels_of, pages, sample_mib)
        whole = archive_bytes(announce(blobs, snap.id, ""))
        await machines.keeping.remove(snap.id, force=True)  # so the next one stores everything anew
        # A busy host may be too slow for it: the rest of what was measured is not lost for that.
        emptied = await drop_caches(link)
        again = await machines.snapshot(row.id) if emptied else None
        return {
            "stored": snap.figures["new_bytes"], "pages_new": snap.figures["pages_new"], "raw_bytes": pages.nbytes,
            "pages_shared": dict(snap.figures["pages_shared"]), "levels": levels,
            "matched_bytes": size_at(matched, node.config.zstd_level), "stored_after_drop_caches": again.figures["new_bytes"] if again is not None else None,
            "exported_bytes": whole,
        }  # fmt: skip
    finally:
        await machines.remove(row.id, force=True)


def block_pages(blobs: LocalBlobs, snapshot_id: str, sources: list[PageSource]) -> PageData:
    """Return the pages that were not stored because the image or the kernel has them."""
    pool = WorkPool(1)
    snapshot = OpenSnapshot(blobs, snapshot_id, pool)
    found = []
    for name in snapshot.manifest.parts:
        page_map = snapshot.page_map(name)
        kinds = np.array([0, *(source.kind for source in page_map.sources)])[page_map.source]
        found.append(snapshot.read_pages(page_map.select(kinds == KIND_BLOCKS), by_hash(sources)))
    pool.close()
    return np.concatenate(found)


def size_at(pages: PageData, level: int) -> int:
    """Return what pages would cost to store."""
    if not len(pages):
        return 0
    content, encoder = pages.data.cast("B"), FrameEncoder(level)
    return sum(encoder.encode(content[at : at + FRAMES[0]]).stored_bytes for at in range(0, len(content), FRAMES[0]))


@contextlib.contextmanager
def set_up(guest: Guest) -> Iterator[None]:
    """Have templates made as this guest wants them, while this lasts."""
    steps, parameters = warmup.STEPS, vars(start)["kernel_command_line"]

    def unzeroed(spec: VmSpec, tsc_khz: int) -> str:
        return str(parameters(spec, tsc_khz)).replace("init_on_free=1", "init_on_free=0")

    warmup.STEPS = steps if guest.warm else ()
    vars(start)["kernel_command_line"] = parameters if guest.zeroed else unzeroed
    try:
        yield
    finally:
        warmup.STEPS, vars(start)["kernel_command_line"] = steps, parameters


async def run(wanted: Sequence[str], keep: Callable[[dict[str, Any]], None], sample_mib: int) -> None:
    """Measure every guest whose image is there; `keep` is told all there is after each: a long run may be cut short."""
    images = load_config().images_dir
    scratch = Path(tempfile.mkdtemp(prefix="recess-codec-"))
    out: dict[str, Any] = {}
    try:
        for number, guest in enumerate(GUESTS):
            if wanted and not any(one.lower() in guest.name.lower() for one in wanted):
                continue
            if not (images / "names" / f"{guest.image}.json").is_file():
                out[guest.name] = f"skipped: there is no image {guest.image}; recess images create makes it"
                continue
            if guest.kernel == TRIMMED and not (images / "kernel" / f"{TRIMMED}.json").is_file():
                out[guest.name] = "skipped: there is no trimmed kernel; make kernel builds it"
                continue
            say(f"guest: {guest.name}")
            with set_up(guest):
                config = replace(make_home(scratch / str(number), images), kernel=guest.kernel)
                node = await LocalNode.open(config, progress=say)
                try:
                    out[guest.name] = await measure(node, guest, scratch / f"{number}-files", sample_mib)
                except Skipped as why:
                    out[guest.name] = f"skipped: {why}"
                finally:
                    await close_node(node)
            keep(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    keep(out)


def markdown(found: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return the report. Pure."""
    measured = {name: one for name, one in found.items() if not isinstance(one, str)}
    out = [
        f"`recess bench codec`, {facts['date']}: {facts['cpu']}, one thread, CPU time. Sizes in MB (speed in MB/s).",
        "",
    ]
    out += ["| level, frame | " + " | ".join(measured) + " |", "|---|" + "---|" * len(measured)]
    for number in range(len(next(iter(measured.values()), {"levels": []})["levels"])):
        cells = []
        for one in measured.values():
            row = one["levels"][number]
            cells.append(f"{row['bytes'] / 1e6:.2f} ({row['encode_mb_s']:.0f}, {row['decode_mb_s']:.0f})")
            head = f"{row['level']}, {row['frame_bytes'] // KIB} KiB"
        out.append(f"| {head} | " + " | ".join(cells) + " |")
    for title, cells in (
        ("pages packed, MB", [f"{one['raw_bytes'] / 1e6:.1f}" for one in measured.values()]),
        ("stored, all counted", [f"{one['stored'] / 1e6:.2f}" for one in measured.values()]),
        ("more without image and kernel blocks", [f"{one['matched_bytes'] / 1e6:.2f}" for one in measured.values()]),
        ("exported whole, template and all", [f"{one['exported_bytes'] / 1e6:.2f}" for one in measured.values()]),
        ("stored after drop_caches", [_megabytes(one["stored_after_drop_caches"]) for one in measured.values()]),
        ("captured pages that cost nothing", [_counts(one["pages_shared"]) for one in measured.values()]),
    ):
        out.append(f"| {title} | " + " | ".join(cells) + " |")
    out += ["", *(f"- {name}: {one}" for name, one in found.items() if isinstance(one, str))]
    return "\n".join(out)


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f}"


def _counts(shared: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in shared.items())


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="recess bench codec", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--guest", action="append", default=[], help="only guests with this in their name")
    parser.add_argument("--sample", type=int, default=SAMPLE_MIB, help="MiB of each guest that every level packs")
    parser.add_argument("--out", default="build/bench-codec", help="folder for the table and the figures")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    facts = machine_facts()

    def keep(found: dict[str, Any]) -> None:
        (out / "codec.json").write_text(json.dumps({"machine": facts, "guests": found}, indent=1))
        (out / "codec.md").write_text(markdown(found, facts) + "\n")

    asyncio.run(run(args.guest, keep, args.sample))
    print((out / "codec.md").read_text(), end="")


if __name__ == "__main__":
    main()
