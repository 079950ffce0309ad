"""`recess bench snapshots`: our snapshots beside those of other ways to put the same guest with the same work away.

    python -m benchmarks.snapshots [--repeats N] [--out FOLDER] [--peer NAME]...

One run: ours, each peer that is here (`benchmarks.peers`), and the physical limits of the same bytes. Writes a Markdown
table, the samples as JSON and plots as PNG. Every time is also a ratio to ours of the same run; only those compare.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import quantile
from benchmarks.limits import limits
from benchmarks.peers import BETWEEN_S, KEYS, PEERS, Samples, measure_peers, start_work
from benchmarks.plots import PANELS, plot_snapshots
from benchmarks.run import SPEC, bare_files, close_node, machine_facts, open_node, say
from benchmarks.workload import DIRTIER
from recess.blobs import LocalBlobs
from recess.config import load_config
from recess.node.local import LocalNode
from recess.snapshots.contract import PageData
from recess.snapshots.forms import open_layer
from recess.snapshots.layer_v1 import LayerReader
from recess.snapshots.reader import read_manifest

DURABLE_GOAL = 1.5  # of the time of zstd and one fsync of the same bytes
OURS, FIRST = "Recess", "Recess, first snapshot"


async def ours(node: LocalNode, repeats: int) -> tuple[dict[str, Samples], Samples]:
    """Measure ours; return also the limits of the pages that each later snapshot stored, right after it, and their
    bytes. The first one is a row of its own: it stores all that differs from the template."""
    machines, blobs = node.machines, LocalBlobs(node.config.blobs_dir)
    row = await machines.create(SPEC, name="bench-work")
    await start_work(await machines.link(row.id), DIRTIER)
    later: Samples = {key: [] for key in KEYS}
    first: Samples = {key: [] for key in KEYS}
    bounds: Samples = {"raw": [], "memcpy": [], "zstd": [], "fsync": []}
    for number in range(repeats + 1):
        await asyncio.sleep(BETWEEN_S)
        snap = await machines.snapshot(row.id)
        side = later if number else first
        side["standstill"].append(float(snap.figures["freezer_s"]))
        side["durable"].append(float(snap.figures["durable_s"]))
        side["stored"].append(float(snap.figures["new_bytes"]))
        child, report = await machines.restore(snap.id, name=f"bench-r{number}")
        side["restore"].append(report.seconds)
        await machines.remove(child.id, force=True)
        pages = new_pages(blobs, snap.id, int(snap.figures["pages_new"]))
        if number and len(pages):
            bounds["raw"].append(float(pages.nbytes))
            for name, seconds in limits(pages, node.config.blobs_dir, level=node.config.zstd_level).items():
                bounds[name].append(seconds)
    await machines.remove(row.id, force=True)
    return {OURS: later, FIRST: first}, bounds


def new_pages(blobs: LocalBlobs, snapshot_id: str, count: int) -> PageData:
    """Return the pages, so many, that this snapshot wrote itself: not those that were joined for it before."""
    manifest = read_manifest(blobs, snapshot_id)
    pages = []
    for file in manifest.layers:
        if file.id in manifest.made and file.entries == count:
            reader = LayerReader(open_layer(blobs, file.id, file.bytes))
            pages += [reader.frame(n) for n in range(-(-reader.slots // reader.pages_per_frame))]
    return np.concatenate(pages) if pages else np.empty((0, 4096), np.uint8)


async def measure(repeats: int, wanted: list[str]) -> dict[str, Any]:
    """Run everything once; return sides (name to samples), skipped (name to reason) and limits."""
    images = load_config().images_dir
    scratch = Path(tempfile.mkdtemp(prefix="recess-bench-"))
    skipped: dict[str, str] = {}
    try:
        node = await open_node(scratch / "home", images)
        try:
            say("ours")
            files = bare_files(node.config, images, scratch)
            sides, bounds = await ours(node, repeats)
        finally:
            await close_node(node)
        async for name, found in measure_peers(files, scratch / "peers", DIRTIER, repeats, wanted):
            if isinstance(found, str):
                skipped[name] = found
            else:
                sides[name] = found
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {"sides": sides, "skipped": skipped, "limits": bounds}


def markdown(found: Mapping[str, Any], facts: Mapping[str, Any], repeats: int) -> str:
    """Return the report. Pure."""
    lines = [
        f"`recess bench snapshots --repeats {repeats}`, {facts['date']}: {facts['cpu']}, {facts['cores']} cores, "
        f"load {facts['load'][0]:.1f}. p50 / p95; in brackets the ratio of the medians to ours.",
        "",
        "| | " + " | ".join(title for _, title, _ in PANELS) + " |",
        "|---|" + "---|" * len(PANELS),
    ]
    sides: Mapping[str, Samples] = found["sides"]
    for name, samples in sides.items():
        cells = []
        for key, _, factor in PANELS:
            base = quantile(sides[OURS][key], 0.5)
            values = samples.get(key) or []
            p50, p95 = quantile(values, 0.5), quantile(values, 0.95)
            ratio = "" if name.startswith(OURS) or not base or not values else f" ({p50 / base:.1f} x)"
            cells.append(f"{p50 * factor:.3g} / {p95 * factor:.3g}{ratio}" if values else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name}: {why}" for name, why in found["skipped"].items())]
    return "\n".join([*lines, *ahead(sides), *against_limits(sides[OURS], found["limits"])])


def ahead(sides: Mapping[str, Samples]) -> list[str]:
    """Return, for each metric, how the best of the peers stands to ours. Pure."""
    lines = []
    for key, title, _ in PANELS:
        peers = {n: quantile(side[key], 0.5) for n, side in sides.items() if not n.startswith(OURS) and side.get(key)}
        base = quantile(sides[OURS][key], 0.5)
        if peers and base:
            best = min(peers, key=lambda name: peers[name])
            ratio = peers[best] / base
            lines.append(
                f"- {title.partition(',')[0]}: {'ahead of' if ratio > 1 else 'behind'} {best}, the best of the others, "
                f"which is {ratio:.2f} x ours."
            )
    return lines


def against_limits(ours: Samples, limits: Samples) -> list[str]:
    """Return the physical limits as a table, with our times as multiples of them, and whether the goal is met. Pure.

    The samples belong together one by one: each limit was measured on the pages of one snapshot, right after it.
    """
    if not limits["raw"]:
        return []
    floors = [a + b for a, b in zip(limits["zstd"], limits["fsync"], strict=True)]
    raw = quantile(limits["raw"], 0.5) / 1e6
    lines = [
        "",
        f"| limits, of the pages each snapshot stored ({raw:.1f} MB) | ms, p50 / p95 | ours to it, p50 / p95 |",
        "|---|---|---|",
    ]
    for title, key, samples in (
        ("memcpy, to our standstill", "standstill", limits["memcpy"]),
        ("zstd alone, to our durable time", "durable", limits["zstd"]),
        ("write and one fsync, to our durable time", "durable", limits["fsync"]),
        ("zstd and one fsync, to our durable time", "durable", floors),
    ):
        ratios = [mine / limit for mine, limit in zip(ours[key], samples, strict=False)]
        cells = [
            f"{quantile(some, 0.5):.3g} / {quantile(some, 0.95):.3g}" for some in ([1e3 * s for s in samples], ratios)
        ]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} x |")
    met = quantile([d / f for d, f in zip(ours["durable"], floors, strict=False)], 0.5)
    verdict = "met" if met <= DURABLE_GOAL else "missed"
    return [*lines, "", f"- Goal: durable within {DURABLE_GOAL} x of zstd and one fsync: {met:.2f} x, {verdict}."]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="recess bench snapshots", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument(
        "--out", default="build/bench-snapshots", help="folder for the table, the samples and the plots"
    )
    parser.add_argument(
        "--peer", action="append", default=[], help=f"only peers with this in their name: {', '.join(PEERS)}"
    )
    args = parser.parse_args()
    began = time.monotonic()
    found = asyncio.run(measure(args.repeats, args.peer))
    facts = machine_facts()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "snapshots.json").write_text(json.dumps({"machine": facts, **found}, indent=1))
    text = markdown(found, facts, args.repeats)
    (out / "snapshots.md").write_text(text + "\n")
    print(text)
    say(plot_snapshots(found["sides"], out / "snapshots.png"))
    say(f"{out}: snapshots.md, snapshots.json; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
