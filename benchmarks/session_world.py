"""What every side of the session benchmark meets: one model and one payment provider, and its own worker as a process that is
killed. It must never know how a side keeps what it keeps.

The provider counts each POST and lets itself be asked by key, but does not itself refuse a repeated key: with one that does, none
of the systems charges twice.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from benchmarks.session_worker import REPLY

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 60.0


def transcript_faults(messages: list[Mapping[str, Any]], turn: int) -> list[str]:
    """Return what is wrong with the transcript that a model is asked with in a turn: a tool call without its one result, a result
    without its call, the user's messages not 1 to `turn` in order. Notes of the runtime (`[recess] ...`) may stand anywhere."""
    faults: list[str] = []
    said: list[str] = []
    open_calls: list[str] = []
    for message in messages:
        role, text = message["role"], str(message.get("content", ""))
        if role == "tool":
            if message.get("tool_call_id") in open_calls:
                open_calls.remove(message["tool_call_id"])
            else:
                faults.append(f"a result without its call: {message.get('tool_call_id')}")
            continue
        if open_calls and not text.startswith("[recess]"):
            faults.append(f"calls without results: {open_calls}")
            open_calls = []
        if role == "assistant":
            open_calls = [str(call["id"]) for call in message.get("tool_calls") or ()]
        elif role == "user" and not text.startswith("[recess]"):
            said.append(text)
    if open_calls:
        faults.append(f"calls without results: {open_calls}")
    if said != [str(number) for number in range(1, turn + 1)]:
        faults.append(f"asked in turn {turn} with the user's messages {said[-5:]} ({len(said)} of them)")
    return faults


class World:
    """The model and the provider. A turn in `hold_model` or `hold_pay` is counted and not answered until `release`."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, float]] = []
        self.transcripts: list[tuple[int, list[Mapping[str, Any]]]] = []
        self.marks: list[tuple[str, float, Any]] = []
        self.charges: Counter[int] = Counter()
        self.keys: dict[str, int] = {}
        self.result = "paid"
        self.hold_model = self.hold_pay = 0
        self.reached = threading.Event()
        self.free = threading.Event()
        self._seen = 0
        self._changed = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _handler(world) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                key = parse_qs(urlsplit(self.path).query).get("key", [""])[0]
                self._answer({"turn": world.keys[key]} if key in world.keys else {})

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                try:
                    body = json.loads(raw)
                except ValueError:
                    return  # its client was killed while it asked
                self._answer(world._take(self.path, body))

            def _answer(self, data: Any) -> None:
                raw = json.dumps(data).encode()
                try:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError:
                    pass  # its client was killed

        return Handler

    def _take(self, path: str, body: Any) -> Any:
        """Count a request; hold it if it is to be held; return its answer."""
        if path == "/mark":
            with self._changed:
                self.marks.append((str(body["name"]), time.monotonic(), body.get("value")))
                self._changed.notify_all()
            return {}
        turn = int(body["turn"])
        with self._changed:
            if path == "/reply":
                self.asked.append((turn, time.monotonic()))
                if isinstance(body["messages"], list):
                    self.transcripts.append((turn, body["messages"]))
                held = turn == self.hold_model
            else:
                self.charges[turn] += 1
                self.keys[str(body["key"])] = turn
                held = turn == self.hold_pay
            free = self.free
            self._seen += 1
            self._changed.notify_all()
        if held:
            self.reached.set()
            free.wait(PATIENCE_S)
        return {"text": REPLY if path == "/reply" else self.result}

    def arm(self, *, model: int = 0, pay: int = 0) -> None:
        """Hold the answer for a turn. What is held already waits on for a `release` of its own."""
        with self._changed:
            self.hold_model, self.hold_pay = model, pay
            self.reached.clear()
            self.free = threading.Event()

    def move_on(self, *, model: int) -> None:
        """Hold the answer for another turn, and answer the one that is held."""
        held = self.free
        self.arm(model=model)
        held.set()

    def release(self) -> None:
        """Hold nothing any more."""
        with self._changed:
            self.hold_model = self.hold_pay = 0
            self.free.set()

    def seen(self) -> int:
        """Return how many requests came."""
        return self._seen

    def wait(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until `done` holds, looking again after each request; tell whether it does."""
        with self._changed:
            return self._changed.wait_for(done, timeout_s)

    def mark(self, name: str, after: float = 0.0) -> float:
        """Return when a worker last told of reaching this point. Raises RuntimeError if it has not since `after`."""
        found = [at for told, at, _ in self.marks if told == name and at >= after]
        if not found:
            raise RuntimeError(f"the worker never told of {name!r}")
        return found[-1]

    def close(self) -> None:
        """End."""
        self.release()
        self._server.shutdown()
        self._server.server_close()


class Side:
    """One system's worker over a folder. `which` tells apart two that share it, as two nodes would."""

    def __init__(self, name: str, python: str, folder: Path, world: World, *, which: str = "one") -> None:
        self.name = name
        self.shared = folder
        self._own = folder / which
        self._own.mkdir(exist_ok=True)
        self._command = [python, "-m", "benchmarks.session_worker", name, str(self._own)]
        self._world = world
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, turns: int, *, line: int = 0, **more: str) -> float:
        """Start it (`more`: its environment); returns when."""
        env = {**os.environ, "MODEL": self._world.url, "PAY": self._world.url, "PYTHONPATH": str(ROOT), **more}
        log = (self._own / "worker.log").open("ab")
        began = time.monotonic()
        self._process = subprocess.Popen(
            [*self._command, str(turns), str(line)], env=env, stdout=log, stderr=log, cwd=ROOT
        )
        log.close()
        return began

    def signal(self, number: int) -> None:
        """Send a signal to it and to all that it started: processes that have the folder in their command line."""
        mine = str(self._own).encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if mine in (entry / "cmdline").read_bytes():
                        os.kill(int(entry.name), number)
                except OSError:
                    continue

    def kill(self) -> None:
        """SIGKILL to it and to all that it started."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def running(self) -> bool:
        """Tell whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    def stored(self) -> int:
        """Return the bytes of its folder, what it is just removing left out."""
        total = 0
        for folder, _, names in os.walk(self._own):
            for name in names:
                with suppress(OSError):
                    total += Path(folder, name).lstat().st_size
        return total

    def end(self, timeout_s: float) -> bool:
        """Wait for its end; tell whether it came and was a good one."""
        try:
            return self._process is not None and self._process.wait(timeout_s) == 0
        except subprocess.TimeoutExpired:
            return False

    def tail(self) -> str:
        """Return the end of what it printed."""
        return (self._own / "worker.log").read_text(errors="replace")[-1500:]


@contextmanager
def side_of(name: str, python: str) -> Iterator[tuple[Side, World]]:
    """A fresh side with a world of its own; everything is ended and removed."""
    with sides_of(name, python, "one") as (sides, world):
        yield sides[0], world


@contextmanager
def sides_of(name: str, python: str, *which: str) -> Iterator[tuple[list[Side], World]]:
    """Several workers of one side over one folder, with a world of their own; everything is ended and removed."""
    world = World()
    with tempfile.TemporaryDirectory(prefix="bs") as folder:
        sides = [Side(name, python, Path(folder), world, which=one) for one in which]
        try:
            yield sides, world
        finally:
            for side in sides:
                side.kill()
            world.close()
