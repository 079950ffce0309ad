"""The crash matrix of sessions, many rounds: `python tools/crash_matrix.py [ROUNDS] [FIRST_SEED] [STORE...]`.

Each round is one session's life, struck once at every crash point (`recess.testing.session_matrix`), with real agent
processes and no VM; on the stores `machines` (SQLite) and `machines-postgres`, which are asked for by name, its machine is a
real one (`recess.testing.session_real`; 5 to 15 minutes a round where QEMU is software). Prints a line a round and one line of JSON at the end; exit code 1 at the first round that does
not add up, with its log.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from recess.config import load_config
from recess.testing.postgres_server import PostgresServer
from recess.testing.second_image import with_second_image
from recess.testing.session_account import Account, CountingPayments
from recess.testing.session_matrix import STORES, Round, crash_round
from recess.testing.session_real import real_world

MACHINES = ("machines", "machines-postgres")
STEP_S = 300.0  # of one strike on a machine in software


async def machine_round(seed: int, folder: Path, database: str) -> Account:
    """A whole round on a real machine: a home in `folder`, with the images that `make setup` made. Raises AssertionError."""
    home, run_dir = folder / "home", Path(tempfile.mkdtemp(prefix="recess-matrix-", dir="/dev/shm"))
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(load_config().images_dir)
    config = load_config(home=str(home), run_dir=str(run_dir), driver="qemu", database_url=database)
    with_second_image(config)
    try:
        async with CountingPayments() as pay, real_world(config, ("base", "second")) as w:
            return await Round(w, pay, seed, step_s=STEP_S).strike_all()
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


def main(argv: list[str]) -> int:
    """Run the rounds."""
    rounds, first = int(argv[0]) if argv else 20, int(argv[1]) if len(argv) > 1 else 1
    stores = argv[2:] or list(STORES)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a crashed server's tasks end as they end
    began, strikes, said = time.monotonic(), 0, 0
    with PostgresServer() if any("postgres" in store for store in stores) else nullcontext() as server:
        for seed, store in itertools.product(range(first, first + rounds), stores):
            database = server.database() if server is not None and "postgres" in store else ""
            with tempfile.TemporaryDirectory(prefix="matrix") as folder:
                try:
                    if store in MACHINES:
                        account = asyncio.run(machine_round(seed, Path(folder), database))
                    else:
                        account = asyncio.run(crash_round(store, seed, Path(folder), database=database))
                except AssertionError as exc:
                    print(f"round {seed} on {store} does not add up:\n{exc}", file=sys.stderr)
                    return 1
            strikes += len(account.strikes)
            said += len(account.said)
            print(f"round {seed} on {store}: {len(account.strikes)} strikes, {len(account.said)} messages", flush=True)
    seconds = round(time.monotonic() - began)
    print(json.dumps({"rounds": rounds, "stores": stores, "strikes": strikes, "messages": said, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
