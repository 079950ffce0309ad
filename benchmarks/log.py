"""The context log's figures on both engines, beside the engine alone writing the same rows: appends a second and their latency, a
long session opened and appended to, with and without its past sealed.

    python -m benchmarks.log [--json FILE] [--seconds 0.5] [--rounds 24] [--turns 20000]

Raw means: one connection, one thread, the same INSERTs and UPDATE in one durable transaction an append, nothing checked
(`benchmarks.log_raw`). All sides are open at once, on the same disk, and take short turns (A B C C B A ...), so that what else
the host does meets them alike; a ratio is the median of those of the rounds. Postgres is a server of its own (Debian's), on a
unix socket, fsync on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import log_raw
from recess.blobs import LocalBlobs
from recess.contextlog import SCHEMA, DirectoryBodies, Draft, LogKeeper, SqlLog, rules, sql_tx
from recess.contextlog.contract import SessionRow
from recess.contextlog.transcript import messages
from recess.db import Database, Tx
from recess.testing.postgres_server import PostgresServer

Took = list[float]
WRITERS = (1, 32)
OPENINGS = 9


def rate_of(slices: Sequence[Slice]) -> dict[str, float]:
    """Return appends a second (the median slice), and the median and the 99th percentile of one in milliseconds, of all slices."""
    ordered = sorted(one for piece in slices for one in piece.took)
    return {
        "appends": len(ordered),
        "per_s": statistics.median(piece.per_s for piece in slices),
        "p50_ms": statistics.median(ordered) * 1e3,
        "p99_ms": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3,
    }


@dataclass(frozen=True)
class Slice:
    """The appends of one side in one of its turns: how long each took, and all of them."""

    took: Took
    seconds: float

    @property
    def per_s(self) -> float:
        """Appends a second."""
        return len(self.took) / self.seconds


class RawSide:
    """The engine alone."""

    def __init__(self, append: log_raw.Append) -> None:
        self._append, self._count = append, 0

    async def run(self, seconds: float) -> Slice:
        """Append for so long."""
        took: Took = []
        start = time.perf_counter()
        while (begin := time.perf_counter()) < start + seconds:
            self._count += 1
            self._append(self._count)
            took.append(time.perf_counter() - begin)
        return Slice(took, time.perf_counter() - start)


async def appends(log: SqlLog, session: str, epoch: int, seconds: float, mark: str) -> Took:
    """Append one entry after the other for so long."""
    took: Took = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        await log.append(session, epoch, [Draft("note", log_raw.BODY, turn=1, key=f"{mark}{len(took)}")])
        took.append(time.perf_counter() - begin)
    return took


class LogSide:
    """The log, so many sessions at once."""

    def __init__(self, log: SqlLog, rows: Sequence[SessionRow]) -> None:
        self._log, self._rows, self._turn = log, rows, 0

    @classmethod
    @asynccontextmanager
    async def open(cls, where: Path | str, folder: Path, writers: int) -> AsyncIterator[LogSide]:
        """Open a database with so many sessions."""
        db = Database.open(where, [SCHEMA])
        log = SqlLog(db, DirectoryBodies(folder / "bodies"))
        rows = [await log.create(agent="a", code_version="v") for _ in range(writers)]
        yield cls(log, [await log.claim(row.id, "n", 1e12, now=0.0) for row in rows])
        await db.close()

    async def run(self, seconds: float) -> Slice:
        """Append for so long."""
        self._turn += 1
        start = time.perf_counter()
        each = await asyncio.gather(
            *(appends(self._log, row.id, row.epoch, seconds, f"k{self._turn}-") for row in self._rows)
        )
        return Slice([one for took in each for one in took], time.perf_counter() - start)


async def compare(
    engine: str, folder: Path, new: Callable[[str], Path | str], raws: dict[str, AbstractContextManager[log_raw.Append]],
    seconds: float, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """Return the figures of all sides on an engine, and the log's ratios to the raw ones: the median of neighbours, round by round,
    every other round in the other direction."""
    slices: dict[str, list[Slice]] = {}
    async with AsyncExitStack() as stack:
        sides: dict[str, RawSide | LogSide] = {
            name: RawSide(stack.enter_context(opened)) for name, opened in raws.items()
        }
        for writers in WRITERS:
            name = f"log_{writers}"
            sides[name] = await stack.enter_async_context(LogSide.open(new(name), folder, writers))
        for number in range(rounds + 1):
            for name in [*sides][:: -1 if number % 2 else 1]:
                taken = await sides[name].run(seconds)
                if number:  # the first is for statements that are prepared and files that grow
                    slices.setdefault(name, []).append(taken)
    out: dict[str, Any] = {"engine": engine, **{name: rate_of(found) for name, found in slices.items()}}
    for writers in WRITERS:
        for name in raws:
            pairs = zip(slices[f"log_{writers}"], slices[name], strict=True)
            ratios = sorted(mine.per_s / bare.per_s for mine, bare in pairs)
            out[f"log_{writers}_to_{name}"] = statistics.median(ratios)
            out[f"log_{writers}_to_{name}_quarters"] = (ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4])
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
        if isinstance(value, tuple):
            print(f"{indent}{key:28} {' '.join(f'{one:.3f}' for one in value)}")
        elif isinstance(value, dict):
            print(f"{indent}{key}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{key:28} {value:,.3f}" if isinstance(value, float) else f"{indent}{key:28} {value}")


def main() -> None:
    """Run all and print a table (and JSON)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a side's turn")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--turns", type=int, default=20_000)
    args = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=".") as name, PostgresServer() as server:
        folder = Path(name)

        async def both() -> None:
            result["sqlite"] = await compare(
                "sqlite", folder, lambda name: folder / f"{name}.db", {"raw": log_raw.sqlite(folder / "raw.db")},
                args.seconds, args.rounds,
            )  # fmt: skip
            raws = {
                name: log_raw.postgres(await log_raw.with_tables(server.database()), pipeline=pipeline)
                for name, pipeline in (("raw", False), ("raw_pipeline", True))
            }
            result["postgres"] = await compare(
                "postgres", folder, lambda _: server.database(), raws, args.seconds, args.rounds
            )

        asyncio.run(both())
        for engine, where in (("sqlite", folder / "long.db"), ("postgres", server.database())):
            (folder / engine).mkdir()
            result[engine]["long"] = asyncio.run(long_session(where, folder / engine, args.turns, args.seconds))
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
