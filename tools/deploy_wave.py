"""Sessions through a deploy, agents as processes: `python tools/deploy_wave.py [COUNT]` (default 100, some 15 MB each).

Each of the upgrade policies `turn` and `now` is tried once, with all sessions in the middle of a turn
(`recess.testing.deploy_wave`). Prints one line of JSON; an AssertionError ends it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

from recess.testing.deploy_wave import deploy_wave
from recess.testing.session_world import world


async def run(count: int) -> dict[str, object]:
    """Run both policies."""
    found: dict[str, object] = {"sessions": count}
    for policy in ("turn", "now"):
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="wave") as folder:
            async with world(idle_timeout_s=3600.0, term_s=60.0, cancel_s=60.0) as made:
                found[policy] = dict(await deploy_wave(made, count, policy, Path(folder)))
        found[f"{policy}_s"] = round(time.monotonic() - began, 1)
    return found


def main(argv: list[str]) -> int:
    """Run and print."""
    print(json.dumps(asyncio.run(run(int(argv[0]) if argv else 100))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
