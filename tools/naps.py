"""Two hundred naps of one real machine, with work in between: `python tools/naps.py [CYCLES]`.

Every 20th time all of its memory is compared with the snapshot. Prints one line of JSON; exit code 1 if a byte differed, if
a restore of the last snapshot took more than 1.2 x as long as one of the first, if the store grew, or if a restore has to open too many layers.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from recess.config import load_config
from recess.node.local import LocalNode
from recess.snapshots.rewrite import FILES_MAX
from recess.testing.naps import Naps, take_naps

SLOWER_MAX, GROWTH_MAX = 1.2, 1.5


async def run(cycles: int, home: Path) -> Naps:
    """Take the naps on a home of our own."""
    (home / "images").symlink_to(load_config().images_dir)
    config = load_config({}, home=str(home), snapshot_keep=1, snapshot_retention_s=0.0)
    node = await LocalNode.open(config, progress=lambda text: print(text, file=sys.stderr, flush=True))
    try:
        return await take_naps(node, cycles, compare_every=20, restores=12)
    finally:
        await node.close(detach=False)
        shutil.rmtree(config.run_dir, ignore_errors=True)


def main(argv: list[str]) -> int:
    """Run, print what was seen, and judge it."""
    cycles = int(argv[0]) if argv else 200
    began = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="recess-naps-"))
    try:
        naps = asyncio.run(run(cycles, home))
    except AssertionError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(
        json.dumps(
            {
                "naps": cycles, "compared": len(naps.compared), "slower": round(naps.slower, 2),
                "growth": round(naps.growth, 2), "layers": max(naps.layers),
                "first_ms": round(median(naps.first_s) * 1e3), "last_ms": round(median(naps.last_s) * 1e3),
                "stored_mb": round(max(naps.stored_bytes) / 1e6, 1), "seconds": round(time.monotonic() - began),
            }
        )
    )  # fmt: skip
    return 0 if naps.slower <= SLOWER_MAX and naps.growth <= GROWTH_MAX and max(naps.layers) <= FILES_MAX else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
