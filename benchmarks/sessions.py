"""Long sessions, killed: Recess beside DBOS and LangGraph (SQLite), one model server and one payment provider for all, the same loop
in each system's own style (`benchmarks.session_worker`).

    python -m benchmarks.sessions [--turns 50,200] [--kills 5] [--out DIR] [--peers PYTHON]     (make bench-sessions)

    length   seconds from the start of a new process to its next model call, after SIGKILL at turn N of everything
    card     turns that were charged twice, when the process is killed after the provider counted and before it answered
    deploy   whether a run that was killed in mid-turn goes on under code with one line more

The provider counts each POST and lets itself be asked by key, but does not itself refuse a repeated key: with one that does, none
of the systems charges twice. Peers are measured under `--peers`, a Python that has their packages (`tools/bench_peers.sh`); without it
Recess alone. Sides take turns. Writes sessions.csv, sessions.md and sessions.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from benchmarks.figures import quantile
from benchmarks.plots import plot_panels

PEERS = ("dbos", "langgraph")
PATIENCE_S = 60.0
DEPLOY_S = 20.0
STRENGTHS = {
    "recess": "files, processes and memory come along; here only a plain process, so its memory is not",
    "dbos": "no second process; durable steps in any program; changed code is a new version by design, and what an old version "
    "began waits for a process of that version",
    "langgraph": "state is a plain value at each node: cheap to inspect, to branch and to change code around",
}


class World:
    """The model and the provider. A turn in `hold_model` or `hold_pay` is counted and not answered until `release`."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, float]] = []
        self.charges: Counter[int] = Counter()
        self.keys: dict[str, int] = {}
        self.hold_model = self.hold_pay = 0
        self.reached = threading.Event()
        self.free = threading.Event()
        world = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                key = parse_qs(urlsplit(self.path).query).get("key", [""])[0]
                self._answer({"turn": world.keys[key]} if key in world.keys else {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                turn = int(body["turn"])
                if self.path == "/reply":
                    world.asked.append((turn, time.monotonic()))
                    held = turn == world.hold_model
                else:
                    world.charges[turn] += 1
                    world.keys[str(body["key"])] = turn
                    held = turn == world.hold_pay
                if held:
                    world.reached.set()
                    world.free.wait(PATIENCE_S)
                self._answer({"text": "words " * 40})

            def _answer(self, data: Any) -> None:
                raw = json.dumps(data).encode()
                try:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError:
                    pass  # its client was killed

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def arm(self, *, model: int = 0, pay: int = 0) -> None:
        """Hold the answer for a turn."""
        self.hold_model, self.hold_pay = model, pay
        self.reached.clear()
        self.free.clear()

    def release(self) -> None:
        """Hold nothing any more."""
        self.hold_model = self.hold_pay = 0
        self.free.set()

    def close(self) -> None:
        """End."""
        self.release()
        self._server.shutdown()
        self._server.server_close()


class Side:
    """One system's worker over a folder."""

    def __init__(self, name: str, python: str, folder: Path, world: World) -> None:
        self.name = name
        self._command = [python, str(Path(__file__).with_name("session_worker.py")), name, str(folder)]
        self._folder = folder
        self._world = world
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, turns: int, *, line: int = 0) -> float:
        """Start it; returns when."""
        env = {**os.environ, "MODEL": self._world.url, "PAY": self._world.url}
        log = (self._folder / "worker.log").open("ab")
        began = time.monotonic()
        self._process = subprocess.Popen([*self._command, str(turns), str(line)], env=env, stdout=log, stderr=log)
        log.close()
        return began

    def kill(self) -> None:
        """SIGKILL to it and to all that it started: processes that have the folder in their command line."""
        mine = str(self._folder).encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if mine in (entry / "cmdline").read_bytes():
                        os.kill(int(entry.name), signal.SIGKILL)
                except OSError:
                    continue
        if self._process is not None:
            self._process.wait()

    def running(self) -> bool:
        """Tell whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    def tail(self) -> str:
        """Return the end of what it printed."""
        return (self._folder / "worker.log").read_text(errors="replace")[-1500:]


@contextmanager
def side_of(name: str, python: str) -> Iterator[tuple[Side, World]]:
    """A fresh side with a world of its own; everything is ended and removed."""
    world = World()
    with tempfile.TemporaryDirectory(prefix="bs") as folder:
        side = Side(name, python, Path(folder), world)
        try:
            yield side, world
        finally:
            side.kill()
            world.close()


def length(name: str, python: str, turns: int) -> float:
    """Return how long a new process takes to its next model call, after SIGKILL at that turn."""
    with side_of(name, python) as (side, world):
        world.arm(model=turns + 1)
        side.start(turns + 1)
        if not world.reached.wait(PATIENCE_S + turns * 0.5):
            raise RuntimeError(f"{name} did not get to turn {turns + 1}:\n{side.tail()}")
        side.kill()
        before = len(world.asked)
        world.arm(model=turns + 1)
        began = side.start(turns + 1)
        if not world.reached.wait(PATIENCE_S + turns * 0.05):
            raise RuntimeError(f"{name} did not recover at turn {turns}:\n{side.tail()}")
        return world.asked[before][1] - began


def card(name: str, python: str, kills: int) -> int:
    """Return how many of so many turns were charged twice."""
    with side_of(name, python) as (side, world):
        for turn in range(1, kills + 1):
            world.arm(pay=turn)
            side.start(kills)
            if not world.reached.wait(PATIENCE_S):
                raise RuntimeError(f"{name} did not get to the charge of turn {turn}:\n{side.tail()}")
            side.kill()
            world.release()
        world.arm(pay=-1)
        side.start(kills)
        deadline = time.monotonic() + PATIENCE_S
        while world.charges[kills] == 0 or side.running():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not end:\n{side.tail()}")
            time.sleep(0.05)
        return sum(world.charges[turn] > 1 for turn in range(1, kills + 1))


def deploy(name: str, python: str) -> bool:
    """Tell whether a run that was killed in turn 3 goes on to its next model call under newer code."""
    with side_of(name, python) as (side, world):
        world.arm(model=3)
        side.start(5)
        if not world.reached.wait(PATIENCE_S):
            raise RuntimeError(f"{name} did not get to turn 3:\n{side.tail()}")
        side.kill()
        world.arm(model=4)
        side.start(5, line=1)
        return world.reached.wait(DEPLOY_S)


def measure(sides: dict[str, str], turns: list[int], kills: int, repeats: int) -> list[dict[str, Any]]:
    """Run everything; one row a side and figure."""
    rows: list[dict[str, Any]] = []
    for count in turns:
        took: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, python in sides.items():
                took[name].append(length(name, python, count))
                print(f"length {count} {name}: {took[name][-1]:.2f} s", flush=True)
        rows += [
            {"figure": f"length {count}", "side": name, "value": quantile(found, 0.5), "unit": "s", "n": len(found),
             "samples": found}
            for name, found in took.items()
        ]  # fmt: skip
    for name, python in sides.items():
        rows.append(
            {"figure": "card", "side": name, "value": card(name, python, kills), "unit": f"of {kills}", "n": kills}
        )
        rows.append({"figure": "deploy", "side": name, "value": int(deploy(name, python)), "unit": "goes on", "n": 1})
        print(f"card, deploy {name}: {rows[-2]['value']} of {kills}, {bool(rows[-1]['value'])}", flush=True)
    return rows


def write(rows: list[dict[str, Any]], sides: dict[str, str], out: Path) -> str:
    """Write CSV, Markdown and PNG; return what to print."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "sessions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["figure", "side", "value", "unit", "n"])
        writer.writerows([[row[key] for key in ("figure", "side", "value", "unit", "n")] for row in rows])
    figures = list(dict.fromkeys(row["figure"] for row in rows))
    lines = ["| | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for figure in figures:
        found = {row["side"]: row for row in rows if row["figure"] == figure}
        cells = [f"{found[name]['value']:.3g} {found[name]['unit']}" for name in sides]
        lines.append(f"| {figure} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name}: {STRENGTHS[name]}" for name in sides), ""]
    (out / "sessions.md").write_text("\n".join(lines))
    lengths = [figure for figure in figures if figure.startswith("length")]
    samples = {
        name: {row["figure"]: row["samples"] for row in rows if row["side"] == name and "samples" in row}
        for name in sides
    }
    panels = [(figure, f"{figure} turns: to the next model call, s", 1.0) for figure in lengths]
    plotted = (
        plot_panels(samples, out / "sessions.png", panels, columns=2) if len(panels) > 1 else "no plots: one length"
    )
    return "\n".join([*lines, plotted])


def main(argv: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--turns", default="50,200")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--peers", default="", help="a Python that has dbos, langgraph and langgraph-checkpoint-sqlite")
    given = parser.parse_args(argv)
    sides = {"recess": sys.executable, **(dict.fromkeys(PEERS, given.peers) if given.peers else {})}
    rows = measure(sides, [int(one) for one in given.turns.split(",")], given.kills, given.repeats)
    print(write(rows, sides, given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
