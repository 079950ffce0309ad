"""The crash matrix of sessions, many rounds: `python tools/crash_matrix.py [ROUNDS] [FIRST_SEED] [STORE...]`.

Each round is one session's life, struck once at every crash point (`recess.testing.session_matrix`), with real agent
processes and no VM. Prints a line a round and one line of JSON at the end; exit code 1 at the first round that does
not add up, with its log.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from recess.testing.postgres_server import PostgresServer
from recess.testing.session_matrix import STORES, crash_round


def main(argv: list[str]) -> int:
    """Run the rounds."""
    rounds, first = int(argv[0]) if argv else 20, int(argv[1]) if len(argv) > 1 else 1
    stores = argv[2:] or list(STORES)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a crashed server's tasks end as they end
    began, strikes, said = time.monotonic(), 0, 0
    with PostgresServer() if "postgres" in stores else nullcontext() as server:
        for seed, store in itertools.product(range(first, first + rounds), stores):
            database = server.database() if server is not None and store == "postgres" else ""
            with tempfile.TemporaryDirectory(prefix="matrix") as folder:
                try:
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
