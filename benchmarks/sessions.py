"""Long sessions, killed: Recess beside DBOS, LangGraph (SQLite), Restate and Temporal's Replayer, one model server and one payment
provider for all, the same loop in each system's own style (`benchmarks.session_worker`, `benchmarks.session_peers`).

    python -m benchmarks.sessions [--peers PYTHON] [--out DIR] [--only length,card] [--turns 100,1000,5000,20000] [--kills 200]
                                  [--orphans 1000] [--repeats 3] [--cap-s 3600] [--wall-s 600] [--entries 1,64,1024] ...
                                  (make bench-sessions)

What is measured is said in `benchmarks.session_cells` and `benchmarks.session_own`. Peers are measured under `--peers`, a Python that
has their packages (`tools/bench_peers.sh`); without it Recess alone. A cell that was not measured says why. Sides take turns.
Writes sessions.csv, sessions.md and sessions.png. The defaults are small, for some ten minutes of a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import session_cells as cells
from benchmarks import session_own
from benchmarks.figures import quantile
from benchmarks.plots import plot_panels
from benchmarks.session_world import ROOT
from recess.errors import RecessError
from recess.testing.postgres_server import PostgresServer

WORKERS = ("dbos", "langgraph", "restate")
FIGURES = ("length", "wall", "card", "deploy", "lunch", "orphan", "race", "reconnect", "fork")
SERVER = ROOT / "build/restate/node_modules/@restatedev/restate-server-linux-x64/bin/restate-server"
STRENGTHS = {
    "recess": "files, processes and memory come along (in `lunch`; elsewhere here a plain process, so its memory is not); its own "
    "process is a whole server, so it starts slower than a library",
    "dbos": "no second process; durable steps in any program; its step outputs are the whole state, at any size; changed code is a "
    "new version by design, and what an old version began waits for a process of that version",
    "langgraph": "state is a plain value at each node: cheap to inspect, to change code around, and to branch: as fast as Recess "
    "or faster, in the runs of SPECIFICATION.md",
    "restate": "its replay is fast, from a server in Rust that streams the journal; a server that stays up while only the service dies "
    "recovers without the server's start, which is in `length` here and not in `replay`; newer code is a further deployment by "
    "design, beside the old one, which here is gone",
    "temporal": "the Replayer alone, on a synthetic history and in Python: no server, no network, no cache of workflows",
}
# Of one side: the others keep their figures.
FAILURES = (RuntimeError, OSError, subprocess.SubprocessError, RecessError)
NO_SERVER = "the Replayer has no server, so nothing is recorded, charged or stored"
REASONS = {
    **{(figure, "temporal"): NO_SERVER for figure in FIGURES if figure not in ("length", "deploy")},
    ("wall", "temporal"): "documented, not measured: 51,200 events or 50 MB a history (some 4,260 turns of this loop)",
    (
        "race",
        "restate",
    ): "its one server is the writer; a service that stands still is its server's to time out, by minutes",
    ("fork", "restate"): "a running invocation cannot be forked",
    ("reconnect", "dbos"): "a library: no stream over HTTP to cut off",
    ("reconnect", "langgraph"): "a library: no stream over HTTP to cut off",
    ("reconnect", "restate"): "no stream of a reply to cut off",
}


@dataclass(frozen=True)
class Row:
    """One figure of one side. `value` is None where it was not measured, and `why` says why not."""

    figure: str
    side: str
    value: float | None
    unit: str = ""
    n: int = 1
    samples: tuple[float, ...] = ()
    why: str = ""

    def cell(self) -> str:
        """Return it as a cell of a table."""
        if self.value is None:
            return "-"
        number = f"{self.value:.0f}" if float(self.value).is_integer() else f"{self.value:.3g}"  # counts stay counts
        return f"{number} {self.unit}".replace("inf", "> all")


@dataclass
class Run:
    """What is measured, how often, and on which sides (name to Python)."""

    given: argparse.Namespace
    sides: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    def samples(self, figure: str, side: str, unit: str, found: Sequence[float]) -> None:
        """Keep and print the median of some samples."""
        self.keep(Row(figure, side, quantile(list(found), 0.5), unit, len(found), tuple(found)))

    def keep(self, row: Row) -> None:
        """Keep and print a row."""
        self.rows.append(row)
        print(f"{row.figure:24} {row.side:10} {row.cell()} {row.why}", flush=True)

    def each(self, figure: str, measure: Callable[[str, str], None], *also: str) -> None:
        """Measure a figure on every side (`also`: the names of its rows); a side that cannot says why."""
        for name, python in self.sides.items():
            why = REASONS.get((figure, name), "")
            if not why:
                try:
                    measure(name, python)
                    continue
                except FAILURES as failed:
                    why = f"failed: {failed}"
            for one in also or (figure,):
                self.keep(Row(one, name, None, why=" ".join(why.split())[:300]))

    # --- the figures --------------------------------------------------------------------------------------------------

    def length(self) -> None:
        """One life of each side, brought to each length in turn."""
        lengths = sorted(map(int, self.given.turns.split(",")))
        longest = lengths[-1] + self.given.repeats + 1  # each recovery is a turn farther
        lives: dict[str, cells.Life] = {}
        failed: dict[str, str] = {}
        with ExitStack() as stack:
            for name, python in self.sides.items():
                if name == "recess" or (name != "temporal" and not self.given.past):
                    life = cells.life_of(name, python, longest, self.given.past)
                    lives[name] = stack.enter_context(life)
            for turns in lengths:
                self._lives_at(turns, lives, failed)
                if "temporal" in self.sides and not self.given.past:
                    try:
                        self._replayer(turns)
                    except FAILURES as exc:
                        self.keep(Row(f"replay {turns}", "temporal", None, why=" ".join(str(exc).split())[:300]))

    def _lives_at(self, turns: int, lives: dict[str, cells.Life], failed: dict[str, str]) -> None:
        """Measure one length. All grow to it at once, which is not measured; then the sides take turns, so that what else the host
        does meets all alike. One that failed before is out."""
        cap = cells.Cap(self.given.cap_s, self.given.cap_gb * 1e9)
        found: dict[str, list[cells.Recovered]] = {name: [] for name in lives}

        def attempt(name: str, work: Callable[[cells.Life], object]) -> None:
            if name not in failed:
                try:
                    work(lives[name])
                except FAILURES as exc:
                    failed[name] = " ".join(str(exc).split())[:300]

        with ThreadPoolExecutor(len(lives)) as pool:
            list(pool.map(lambda name: attempt(name, lambda life: life.grow(turns, cap)), lives))
        for _ in range(self.given.repeats):
            for name, several in found.items():
                attempt(name, lambda life, several=several: several.append(life.recover()))  # type: ignore[misc]
        for name, several in found.items():
            if name in failed:
                self.keep(Row(f"length {turns}", name, None, why=failed[name]))
            else:
                self.samples(f"length {turns}", name, "s", [one.whole for one in several])
                self.samples(f"replay {turns}", name, "s", [one.replay for one in several])

    def _replayer(self, turns: int) -> None:
        found = temporal(self.sides["temporal"], turns, self.given.repeats)
        self.keep(Row(f"length {turns}", "temporal", None, why="no process is recovered: see replay"))
        self.samples(f"replay {turns}", "temporal", "s", found["replay"])

    def wall(self) -> None:
        """How far it goes in a while; how large a result it takes."""

        def turns(name: str, python: str) -> None:
            seconds = self.given.wall_s
            self.keep(Row(f"turns in {seconds:g} s", name, cells.turns_in(name, python, seconds), "turns"))

        def entry(name: str, python: str) -> None:
            taken = 0
            for mib in map(int, self.given.entries.split(",")):
                if not cells.takes(name, python, mib << 20):
                    break
                taken = mib
            self.keep(Row("largest result taken", name, taken, f"of {self.given.entries} MiB"))

        self.each("wall", turns, f"turns in {self.given.wall_s:g} s")
        self.each("wall", entry, "largest result taken")

    def card(self) -> None:
        """Double charges."""
        kills = self.given.kills
        self.each("card", lambda n, p: self.keep(Row("card", n, cells.card(n, p, kills), f"of {kills}", kills)))

    def deploy(self) -> None:
        """What goes on under newer code."""
        runs = self.given.deploys

        def share(name: str, python: str) -> None:
            if name == "temporal":
                survived = 0 if temporal(python, 3, 1)["deploy"] else runs
            else:
                survived = sum(cells.deploy(name, python) for _ in range(runs))
            self.keep(Row("deploy", name, survived, f"of {runs} go on", runs))

        self.each("deploy", share)

    def lunch(self) -> None:
        """What a user waits for after lunch."""
        entries, repeats = self.given.lunch, self.given.repeats

        def back(name: str, python: str) -> None:
            if name != "recess":
                self.samples("lunch", name, "s", [cells.lunch(name, python, entries) for _ in range(repeats)])
                return
            found = asyncio.run(session_own.lunch(entries, repeats))
            self.samples("lunch", name, "s", found["back"])
            self.keep(Row(f"lunch: the work itself, once, in the guest ({found['driver']})", name, found["work"], "s"))
            self.keep(Row("lunch: kept while away", name, found["bytes"] / 1e6, "MB"))

        self.each("lunch", back)

    def orphan(self) -> None:
        """Valid transcripts after kills."""
        kills = self.given.orphans

        def valid(name: str, python: str) -> None:
            good, faults = cells.orphan(name, python, kills, self.given.orphans_at_once)
            self.keep(Row("orphan", name, good, f"of {kills} valid", kills, why="; ".join(faults[:1])))

        self.each("orphan", valid)

    def race(self) -> None:
        """Two workers on one run."""
        races = self.given.races

        def one(name: str, python: str) -> tuple[int, int]:
            if name == "langgraph":
                return cells.race(name, python, "")
            # A server for each: DBOS keeps its tables in a schema of its own, so that in a database that another race has used it
            # finds that race's workflow, and it has ended.
            with PostgresServer() as server:
                return cells.race(name, python, server.database())

        def both(name: str, python: str) -> None:
            found = [one(name, python) for _ in range(races)]
            wrong = sum(doubled + lost for doubled, lost in found)
            self.keep(Row("race", name, wrong, f"doubled or lost in {races}", races))

        self.each("race", both)

    def reconnect(self) -> None:
        """A client that is cut off."""

        def cut(name: str, _python: str) -> None:
            found = asyncio.run(session_own.reconnect())
            self.keep(Row("reconnect", name, found["wrong"], f"wrong in {found['drops']} drops", found["drops"]))
            self.keep(Row("reconnect, a client without ids", name, found["plain_wrong"], "pieces doubled or missing"))

        self.each("reconnect", cut)

    def fork(self) -> None:
        """Many forks."""
        turns, forks = self.given.fork_turns, self.given.forks
        head = f"fork x{forks} at turn {turns}"

        def all_of_them(name: str, python: str) -> None:
            found = cells.fork(name, python, turns, forks)
            self.keep(Row(head, name, found["s"], "s", forks))
            self.keep(Row(f"{head}: bytes", name, found["bytes"] / 1e3, "kB", forks))

        self.each("fork", all_of_them, head, f"{head}: bytes")


def temporal(python: str, turns: int, repeats: int) -> dict[str, Any]:
    """Return what the Replayer's program found. Raises RuntimeError with its last words."""
    command = [python, "-m", "benchmarks.session_temporal", str(turns), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write(rows: Sequence[Row], sides: Sequence[str], out: Path) -> str:
    """Write CSV, Markdown and PNG; return what to print."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "sessions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["figure", "side", "value", "unit", "n", "not_measured"])
        for row in rows:
            writer.writerow([row.figure, row.side, row.value, row.unit, row.n, row.why if row.value is None else ""])
    figures = list(dict.fromkeys(row.figure for row in rows))
    lines = ["| | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for figure in figures:
        found = {row.side: row for row in rows if row.figure == figure}
        lines.append(f"| {figure} | " + " | ".join(found[n].cell() if n in found else "-" for n in sides) + " |")
    lines += ["", *(f"- {name}: {STRENGTHS[name]}" for name in sides), "", "Not measured:", ""]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.value is None:
            reasons.setdefault((row.side, row.why), []).append(row.figure)
    lines += [f"- {side}, {'; '.join(names)}: {why}" for (side, why), names in reasons.items()] or ["- nothing"]
    (out / "sessions.md").write_text("\n".join([*lines, ""]))
    return "\n".join([*lines, "", plot(rows, sides, out / "sessions.png")])


def plot(rows: Sequence[Row], sides: Sequence[str], target: Path) -> str:
    """Write a panel for each figure that has seconds, bytes or turns of at least two sides; return what became of it."""
    found = [row for row in rows if row.value is not None and row.unit in ("s", "kB", "turns")]
    several = Counter(row.figure for row in found)
    shown = [row for row in found if several[row.figure] > 1]
    panels = [(name, f"{name}, {unit}", 1.0) for name, unit in dict.fromkeys((row.figure, row.unit) for row in shown)]
    samples = {
        side: {row.figure: row.samples or (float(row.value or 0),) for row in shown if row.side == side}
        for side in sides
    }
    full = {side: {name: own.get(name, ()) for name, _, _ in panels} for side, own in samples.items()}
    return plot_panels(full, target, panels, columns=2) if len(panels) > 2 else "no plots: too few figures"


def the_sides(peers: str) -> Iterator[tuple[str, str]]:
    """Yield each side and the Python that runs it."""
    yield "recess", sys.executable
    if peers:
        yield from ((name, peers) for name in WORKERS if name != "restate" or "RESTATE_SERVER" in os.environ)
        yield "temporal", peers


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--turns", default="50,200", help="of `length`")
    parser.add_argument(
        "--cap-s", type=float, default=600.0, help="of `length`: longest work of a side from one to the next"
    )
    parser.add_argument("--cap-gb", type=float, default=8.0, help="of `length`: most that a side may keep")
    parser.add_argument(
        "--past", type=int, default=0, help="of `length`: turns that Recess, alone then, writes straight into its log"
    )
    parser.add_argument("--kills", type=int, default=3, help="of `card`")
    parser.add_argument("--deploys", type=int, default=1)
    parser.add_argument("--orphans", type=int, default=8, help="kills of `orphan`")
    parser.add_argument("--orphans-at-once", type=int, default=1, help="lives of 100 kills of `orphan` side by side")
    parser.add_argument("--races", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="of `length` and `lunch`")
    parser.add_argument("--wall-s", type=float, default=6.0)
    parser.add_argument("--entries", default="1,16", help="MiB of a tool's result, rising")
    parser.add_argument("--lunch", type=int, default=100_000, help="entries of the dict")
    parser.add_argument("--fork-turns", type=int, default=100)
    parser.add_argument("--forks", type=int, default=64)
    parser.add_argument("--only", default=",".join(FIGURES))
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--peers", default="", help="a Python that has the peers' packages: tools/bench_peers.sh")
    given = parser.parse_args(argv)
    if unknown := set(given.only.split(",")) - set(FIGURES):
        parser.error(f"no such figure: {', '.join(sorted(unknown))}")
    return given


def main(argv: list[str] | None = None) -> int:
    """Measure and write."""
    given = parse(argv)
    if SERVER.exists():
        os.environ.setdefault("RESTATE_SERVER", str(SERVER))
    run = Run(given, dict(the_sides(given.peers)))
    began = time.monotonic()
    for figure in FIGURES:
        if figure in given.only.split(","):
            getattr(run, figure)()
    print(write(run.rows, list(run.sides), given.out))
    print(f"{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
