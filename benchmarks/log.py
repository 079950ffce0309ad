"""The context log's figures: append throughput beside raw SQLite of the same rows, and opening a long session.

    python -m benchmarks.log [--json FILE] [--seconds 2] [--turns 20000]

Raw SQLite means: one connection, one thread, the same INSERTs and UPDATE in one transaction an append, WAL and
synchronous=FULL, nothing checked. The two sides take turns (A B A B ...), on the same disk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from recess.contextlog import SCHEMA, DirectoryBodies, Draft, SqlLog, rules, sql_tx
from recess.contextlog.transcript import messages
from recess.db import Database, Tx

BODY = {"text": "x" * 600, "tool_calls": [], "part": 0}
ROUNDS = 5


def raw_rate(folder: Path, seconds: float) -> float:
    """Return appends a second of bare SQLite."""
    db = sqlite3.connect(_fresh(folder / "raw.db"), isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    for migration in SCHEMA.migrations:
        for statement in migration.statements:
            db.execute(statement)
    db.execute(
        "INSERT INTO log_session VALUES (1, 'ses_1', '', 'a', 'v', 'cold', 0, 0, 1, 'n', 1e12, '', 0, '', 0, 0, 0, 0, '{}', '{}', '[]')"
    )
    body = json.dumps(BODY)
    count, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        count += 1
        db.execute("BEGIN IMMEDIATE")
        db.execute(
            "INSERT INTO log_entry VALUES ('ses_1', ?, 'note', 1, '', ?, 1, 'v', ?, 1, NULL, ?, '', ?)",
            (count, f"k{count}", time.time(), len(body), body),
        )
        db.execute("INSERT INTO log_key VALUES ('ses_1', ?, ?, ?)", (f"k{count}", count, b"0" * 16))
        db.execute("UPDATE log_session SET head = ? WHERE id = 'ses_1'", (count,))
        db.execute("COMMIT")
    db.close()
    return count / seconds


def _fresh(path: Path) -> Path:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    return path


async def log_rate(folder: Path, seconds: float, writers: int) -> float:
    """Return appends a second of the log, this many sessions at once."""
    db = Database.open(_fresh(folder / f"log{writers}.db"), [SCHEMA])
    log = SqlLog(db, DirectoryBodies(folder / "bodies"))
    count, end = 0, time.perf_counter() + seconds

    async def write(name: int) -> None:
        nonlocal count
        row = await log.create(agent="a", code_version="v")
        row = await log.claim(row.id, f"n{name}", 1e12, now=0.0)
        i = 0
        while time.perf_counter() < end:
            i += 1
            await log.append(row.id, row.epoch, [Draft("note", BODY, turn=1, key=f"k{i}")])
            count += 1

    await asyncio.gather(*(write(n) for n in range(writers)))
    await db.close()
    return count / seconds


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


async def make_long(folder: Path, turns: int) -> tuple[str, int]:
    """Make a session of many turns, compacted every 1,000 (the last 10 turns before each are kept); return id and head."""
    db = Database.open(folder / "long.db", [SCHEMA])
    log = SqlLog(db, DirectoryBodies(folder / "bodies"))
    row = await log.create(agent="a", code_version="v")
    row = await log.claim(row.id, "n", 1e12, now=0.0)
    await log.append(row.id, row.epoch, [Draft("system", {"text": "be kind"})])
    position = 1
    for first in range(1, turns + 1, 100):

        def some(tx: Tx, first: int = first, position: int = position) -> int:
            for turn in range(first, min(first + 100, turns + 1)):
                position = one_turn(tx, row.id, row.epoch, turn, position)
            return position

        position = await db.write(some)
    await db.close()
    return row.id, position


async def open_long(folder: Path, turns: int) -> dict[str, Any]:
    """Time the opening of a long session (database just opened): its row, its tail, its transcript."""
    session, head = await make_long(folder, turns)
    figures: dict[str, Any] = {"turns": turns, "entries": head, "bytes": (folder / "long.db").stat().st_size}
    took, cpu = [], []
    for _ in range(9):
        db = Database.open(folder / "long.db", [SCHEMA])
        log = SqlLog(db, DirectoryBodies(folder / "bodies"))
        begin, busy = time.perf_counter(), time.process_time()
        tail = await log.tail((await log.get(session)).id)
        transcript = messages(tail)
        took.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - busy)
        await db.close()
        figures.update(tail_entries=len(tail), messages=len(transcript))
    db = Database.open(folder / "long.db", [SCHEMA])
    log = SqlLog(db, DirectoryBodies(folder / "bodies"))
    begin, after, everything = time.perf_counter(), 0, 0
    while page := await log.read(session, after=after, limit=10_000):
        after, everything = page[-1].position, everything + len(page)
    figures["read_all_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    child = await log.fork(session, at=head // 2)
    figures["fork_s"] = time.perf_counter() - begin
    if (everything, child.head) != (head, head // 2):
        raise RuntimeError(f"the log is not whole: {everything} of {head} entries, fork at {child.head}")
    await db.close()
    figures |= {
        "open_p50_s": statistics.median(took),
        "open_max_s": max(took),
        "open_cpu_p50_s": statistics.median(cpu),
    }
    return figures


def main() -> None:
    """Run all and print a table (and JSON)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--turns", type=int, default=20_000)
    args = parser.parse_args()
    sides: dict[str, list[float]] = {"raw": [], "log_1": [], "log_32": []}
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        for _ in range(ROUNDS):
            sides["raw"].append(raw_rate(folder, args.seconds))
            sides["log_1"].append(asyncio.run(log_rate(folder, args.seconds, 1)))
            sides["log_32"].append(asyncio.run(log_rate(folder, args.seconds, 32)))
        result: dict[str, Any] = {f"{k}_per_s": statistics.median(v) for k, v in sides.items()}
        for side in ("log_1", "log_32"):
            result[f"{side}_ratio"] = statistics.median(a / b for a, b in zip(sides[side], sides["raw"], strict=True))
        result |= asyncio.run(open_long(folder, args.turns))
    for key, value in result.items():
        print(f"{key:16} {value:,.4f}" if isinstance(value, float) else f"{key:16} {value:,}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
