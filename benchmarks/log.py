"""The context log's figures on both engines, beside the engine alone writing the same rows: appends a second and their latency, a
long session opened and appended to, with and without its past sealed.

    python -m benchmarks.log [--json FILE] [--seconds 2] [--rounds 5] [--turns 20000]

Raw means: one connection, one thread, the same INSERTs and UPDATE in one durable transaction an append, nothing checked
(`benchmarks.log_raw`). The sides take turns (A B A B ...), on the same disk; ratios are of neighbours. Postgres is a server of
its own (Debian's), on a unix socket, fsync on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks import log_raw
from recess.blobs import LocalBlobs
from recess.contextlog import SCHEMA, DirectoryBodies, Draft, LogKeeper, SqlLog, rules, sql_tx
from recess.contextlog.transcript import messages
from recess.db import Database, Tx
from recess.testing.postgres_server import PostgresServer

Took = list[float]
OPENINGS = 9


def rate_of(took: Took, seconds: float) -> dict[str, float]:
    """Return appends a second, and the median and the 99th percentile of one in milliseconds."""
    ordered = sorted(took)
    return {
        "per_s": len(took) / seconds,
        "p50_ms": statistics.median(ordered) * 1e3,
        "p99_ms": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3,
    }


def raw_side(opened: AbstractContextManager[log_raw.Append], seconds: float) -> dict[str, float]:
    """Append with the engine alone for so long."""
    took: Took = []
    with opened as append:
        end = time.perf_counter() + seconds
        while (begin := time.perf_counter()) < end:
            append(len(took) + 1)
            took.append(time.perf_counter() - begin)
    return rate_of(took, seconds)


async def appends(log: SqlLog, session: str, epoch: int, seconds: float, mark: str) -> Took:
    """Append one entry after the other for so long."""
    took: Took = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        await log.append(session, epoch, [Draft("note", log_raw.BODY, turn=1, key=f"{mark}{len(took)}")])
        took.append(time.perf_counter() - begin)
    return took


async def log_side(where: Path | str, folder: Path, seconds: float, writers: int) -> dict[str, float]:
    """Append through the log, so many sessions at once."""
    db = Database.open(where, [SCHEMA])
    log = SqlLog(db, DirectoryBodies(folder / "bodies"))
    rows = [await log.create(agent="a", code_version="v") for _ in range(writers)]
    rows = [await log.claim(row.id, "n", 1e12, now=0.0) for row in rows]
    took = await asyncio.gather(*(appends(log, row.id, row.epoch, seconds, "k") for row in rows))
    await db.close()
    return rate_of([one for each in took for one in each], seconds)


def compare(
    engine: str, folder: Path, new: Callable[[], Path | str], raws: dict[str, Callable[[], AbstractContextManager[log_raw.Append]]],
    seconds: float, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """Return the medians of all sides on an engine, and the log's ratios to the raw ones."""
    sides: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name, opened in raws.items():
            sides.setdefault(name, []).append(raw_side(opened(), seconds))
        for writers in (1, 32):
            side = asyncio.run(log_side(new(), folder, seconds, writers))
            sides.setdefault(f"log_{writers}", []).append(side)
    out: dict[str, Any] = {"engine": engine}
    for name, found in sides.items():
        out[name] = {key: statistics.median(one[key] for one in found) for key in found[0]}
    for writers in (1, 32):
        mine = sides[f"log_{writers}"]
        for name in raws:
            pairs = zip(mine, sides[name], strict=True)
            out[f"log_{writers}_to_{name}"] = statistics.median(a["per_s"] / b["per_s"] for a, b in pairs)
    return out


def one_turn(tx: Tx, session: str, epoch: int, turn: int, position: int) -> int:
    """Write one turn of seven entries (a compaction in every thousandth) and return the head."""
    user = rules.pack(Draft("user", {"text": "go " * 20}, key=f"u{turn}"), inbox=True)
    sql_tx.append_inbox_in(tx, session, user, ts=1.0)
    call = {"id": f"c{turn}", "name": "sh", "arguments": {"cmd": "ls"}}
    drafts = [
        Draft("turn.start", {"inbox": position + 1, "attempt": 1}, turn=turn),
        Draft("assistant", {"text": "", "tool_calls": [call], "part": 0}, turn=turn, key=f"t{turn}/p0"),
        Draft("tool.start", {"name": "sh", "effect": "local"}, turn=turn, ref=f"c{turn}", key=f"t{turn}/s"),
        Draft("tool.result", {"output": "y" * 2000}, turn=turn, ref=f"c{turn}", key=f"t{turn}/r"),
        Draft("assistant", {"text": "z" * 800, "part": 1}, turn=turn, key=f"t{turn}/p1"),
        Draft("turn.end", {"status": "done"}, turn=turn, key=f"t{turn}/end"),
    ]
    if turn % 1000 == 900:
        drafts.append(Draft("compact", {"summary": "s" * 4000, "to": position - 70}))
    return sql_tx.append_in(tx, session, epoch, rules.pack_all(drafts), ts=1.0)[-1].position


class Long:
    """A session of many turns, compacted every 1,000 (the last 10 turns before each are kept)."""

    def __init__(self, where: Path | str, folder: Path) -> None:
        self.where, self.folder = where, folder
        self.session, self.epoch, self.head = "", 0, 0

    def open(self) -> SqlLog:
        """Open the database anew."""
        blobs = LocalBlobs(self.folder / "blobs")
        return SqlLog(Database.open(self.where, [SCHEMA]), DirectoryBodies(self.folder / "bodies"), blobs=blobs)

    async def make(self, turns: int) -> None:
        """Write it, and an empty one beside it."""
        log = self.open()
        row = await log.create(agent="a", code_version="v")
        row = await log.claim(row.id, "n", 1e12, now=0.0)
        self.session, self.epoch = row.id, row.epoch
        await log.append(row.id, row.epoch, [Draft("system", {"text": "be kind"})])
        self.head = 1
        for first in range(1, turns + 1, 100):

            def some(tx: Tx, first: int = first, position: int = self.head) -> int:
                for turn in range(first, min(first + 100, turns + 1)):
                    position = one_turn(tx, row.id, row.epoch, turn, position)
                return position

            self.head = await log.db.write(some, locks=(row.id,))
        await log.db.close()

    async def seal(self) -> dict[str, float]:
        """Seal its past."""
        log = self.open()
        keeper = LogKeeper(log)
        begin = time.perf_counter()
        made = await keeper.seal(self.session)
        took = time.perf_counter() - begin
        left = await log.db.read(lambda tx: tx.one("SELECT count(*) AS n FROM log_entry"))
        stored = sum(info.size_bytes for info in log.blobs.list_blobs("log/")) if log.blobs else 0
        keeper.close()
        await log.db.close()
        return {"segments": made, "seal_s": took, "segment_bytes": stored, "rows_left": int(left["n"]) if left else 0}

    async def figures(self, seconds: float) -> dict[str, float]:
        """Time its opening (row, tail, transcript; the database just opened), reading all of it, a fork in its middle, and
        appends to it beside appends to an empty one."""
        took: Took = []
        out: dict[str, float] = {}
        for _ in range(OPENINGS):
            log = self.open()
            await log.get(self.session)  # the connection is made by the first read, whatever that is
            begin = time.perf_counter()
            tail = await log.tail((await log.get(self.session)).id)
            transcript = messages(tail)
            took.append(time.perf_counter() - begin)
            await log.db.close()
            out.update(tail_entries=len(tail), messages=len(transcript))
        out |= {"open_p50_ms": statistics.median(took) * 1e3, "open_max_ms": max(took) * 1e3}
        log = self.open()
        head = (await log.get(self.session)).head
        begin, after = time.perf_counter(), 0
        while page := await log.read(self.session, after=after, limit=10_000, max_bytes=16 << 20):
            after = page[-1].position
        out["read_all_s"] = time.perf_counter() - begin
        begin = time.perf_counter()
        child = await log.fork(self.session, at=head // 2)
        out["fork_ms"] = (time.perf_counter() - begin) * 1e3
        if (after, child.head) != (head, head // 2):
            raise RuntimeError(f"the log is not whole: {after} of {head} entries, fork at {child.head}")
        empty = await log.claim((await log.create(agent="a", code_version="v")).id, "n", 1e12, now=0.0)
        ratios = []
        for n in range(3):
            short = await appends(log, empty.id, empty.epoch, seconds, f"e{n}-")
            long = await appends(log, self.session, self.epoch, seconds, f"{head}-{n}-")
            ratios.append(len(long) / len(short))
        out["append_to_empty"] = statistics.median(ratios)
        await log.db.close()
        return out


async def long_session(where: Path | str, folder: Path, turns: int, seconds: float) -> dict[str, Any]:
    """Return the figures of a long session, its past in rows and its past sealed."""
    long = Long(where, folder)
    await long.make(turns)
    rows = await long.figures(seconds)
    sealed = await long.seal()
    return {"turns": turns, "entries": long.head, "rows": rows, "sealed": {**sealed, **await long.figures(seconds)}}


def show(result: dict[str, Any], indent: str = "") -> None:
    """Print nested figures."""
    for key, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{key:24} {value:,.3f}" if isinstance(value, float) else f"{indent}{key:24} {value}")


def main() -> None:
    """Run all and print a table (and JSON)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=20_000)
    args = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=".") as name, PostgresServer() as server:
        folder = Path(name)

        def new() -> str:
            return log_raw.with_tables(server.database())

        result["sqlite"] = compare(
            "sqlite", folder, lambda: log_raw.fresh(folder / "log.db"), {"raw": lambda: log_raw.sqlite(folder / "raw.db")},
            args.seconds, args.rounds,
        )  # fmt: skip
        result["postgres"] = compare(
            "postgres", folder, new,
            {"raw": lambda: log_raw.postgres(new()), "raw_pipeline": lambda: log_raw.postgres(new(), pipeline=True)},
            args.seconds, args.rounds,
        )  # fmt: skip
        for engine, where in (("sqlite", folder / "long.db"), ("postgres", server.database())):
            (folder / engine).mkdir()
            result[engine]["long"] = asyncio.run(long_session(where, folder / engine, args.turns, args.seconds))
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
