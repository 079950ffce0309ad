"""The caller's terminal: raw mode, size, signals, and the loop between it and an exec stream.

Restores the terminal whatever happens. Detach keys: Ctrl-P Ctrl-Q, as Docker has them, or others of the user's choice.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from types import FrameType

from recess.cli.common import Invocation
from recess.errors import BadInput, Conflict, NotFound, RecessError, Unavailable
from recess.sdk.exec_stream import ExecStream, OnOutput
from recess.sdk.transport import Json

DETACH = b"\x10\x11"
KILLED = 137
_POLL_S = 25


def parse_keys(text: str) -> bytes:
    """Return Docker's --detach-keys, like "ctrl-p,ctrl-q" or "a,b"; "" means the usual ones. Raises BadInput."""
    if not text:
        return DETACH
    out = bytearray()
    for word in text.split(","):
        if len(word) == 1 and word.isascii():
            out += word.encode()
        elif word.startswith("ctrl-") and len(word) == 6 and (word[5].isalpha() or word[5] in "@[\\]^_"):
            out.append(ord(word[5].upper()) & 0x1F)
        else:
            raise BadInput(f"--detach-keys: {word!r} is no key", hint="write them like ctrl-p,ctrl-q")
    return bytes(out)


class KeyMatcher:
    """Finds a sequence of keys in what is typed, and holds back what may become it."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Return (what is not part of the keys, whether they were typed); what follows them is dropped."""
        text = self._held + data
        at = text.find(self._keys)
        if at >= 0:
            return text[:at], True
        length = next((n for n in range(len(self._keys) - 1, 0, -1) if text.endswith(self._keys[:n])), 0)
        self._held = text[len(text) - length :]
        return text[: len(text) - length], False


def size() -> tuple[int, int]:
    """Return rows and columns: the terminal's as it is now, whatever LINES and COLUMNS were when this program started."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            columns, rows = os.get_terminal_size(stream.fileno())
            if rows and columns:
                return rows, columns
    columns, rows = shutil.get_terminal_size()
    return rows, columns


@contextlib.contextmanager
def raw_mode(enabled: bool) -> Iterator[None]:
    """Put stdin into raw mode for the time of the block."""
    if not enabled:
        yield
        return
    fd = sys.stdin.fileno()
    saved = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)  # not TCSAFLUSH: what was typed ahead is the process's
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, saved)


class _StdinPump(threading.Thread):
    """Copies stdin to the process until its end, or until stopped through a pipe."""

    def __init__(self, stream: ExecStream, *, keys: bytes) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self._matcher = KeyMatcher(keys) if keys else None
        self._wake_r, self._wake_w = os.pipe()
        self.detached = False

    def run(self) -> None:
        fd = sys.stdin.fileno()
        while True:
            ready, _, _ = select.select([fd, self._wake_r], [], [])
            if self._wake_r in ready:
                return
            data = os.read(fd, 65536)
            if not data:
                self._stream.eof()
                return
            if self._matcher is not None:
                data, self.detached = self._matcher.feed(data)
            if data:
                self._stream.write(data)
            if self.detached:
                self._stream.close()
                return

    def stop(self) -> None:
        """End the thread and wait for it."""
        os.write(self._wake_w, b"x")
        self.join(timeout=1)
        os.close(self._wake_r)
        os.close(self._wake_w)


def show(number: int, data: bytes) -> None:
    """Write output of the process to our own."""
    _write_all(number if number else 2, data)


class Seen:
    """Shows a process's output, and after attaching again only what has not been shown."""

    def __init__(self, shown: tuple[int, int] = (0, 0), write: OnOutput = show) -> None:
        self._write = write
        self._shown = {1: shown[0], 2: shown[1]}
        self._skip = dict(self._shown)

    def again(self) -> None:
        """The next output is the process's from the beginning of the guest's ring."""
        self._skip = dict(self._shown)

    def __call__(self, number: int, data: bytes) -> None:
        """Take a piece. Number 0: the ring has lost its beginning, so better a repetition than a gap."""
        if number not in self._shown:
            self._skip = {1: 0, 2: 0}
            return
        dropped = min(self._skip[number], len(data))
        self._skip[number] -= dropped
        self._shown[number] += len(data) - dropped
        if dropped < len(data):
            self._write(number, data[dropped:])


def follow_main(
    inv: Invocation, row: Json, *, stdin: bool, keys: str = "", proxy: bool = True, seen: Seen | None = None
) -> int | None:
    """Attach to a machine's main process until it ends, through suspends and resumes of the machine; return its exit
    code (None after the detach keys). `seen`: what was shown of its output already."""
    is_tty, seen, wanted = bool(row["spec"]["tty"]), seen or Seen(), parse_keys(keys)
    while True:
        try:
            stream = ExecStream(inv.server, row["id"], {"attach": "main"})
            if is_tty:
                stream.resize(*size())
            return converse(stream, is_tty=is_tty, stdin=stdin, keys=wanted, proxy=proxy, on_output=seen)
        except (Conflict, Unavailable) as error:
            code = _until_back(inv, row, error)
            if code is not None:
                return code
            seen.again()


def _until_back(inv: Invocation, row: Json, error: RecessError) -> int | None:
    """After the stream has broken: wait while the machine is put away, return the exit code of one that has ended. Raises
    the stream's error when it runs."""
    told = False
    after = inv.server.call("GET", "/v1/events", query={"after": "now", "wait": 0})["next"]
    while True:
        try:
            now = inv.server.call("GET", f"/v1/machines/{row['id']}")
        except NotFound:
            return KILLED
        if now["state"] in ("exited", "dead"):
            return KILLED if now["exit_code"] is None else int(now["exit_code"])
        if now["state"] == "running" and told:
            return None
        if now["state"] != "suspended":
            raise error
        if not told:
            behind = "\n" if row["spec"]["tty"] and sys.stderr.isatty() else ""  # the shell's prompt, most likely
            inv.out.progress(
                f"{behind}{now['name'] or now['id']} is suspended; going on when it is resumed (Ctrl-C to leave)"
            )
            told = True
        answer = inv.server.call("GET", "/v1/events", query={"after": after, "wait": _POLL_S})
        after = answer["next"]


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def converse(
    stream: ExecStream, *, is_tty: bool, stdin: bool, keys: bytes = DETACH, proxy: bool = True,
    on_output: OnOutput | None = None,
) -> int | None:  # fmt: skip
    """Join the terminal and the process until it ends; return its exit code (None after the detach keys). `proxy`: hand
    on the signals that this process gets."""
    interactive = is_tty and stdin and sys.stdin.isatty()

    def on_winch(_signo: int, _frame: FrameType | None) -> None:
        stream.resize(*size())

    def on_signal(signo: int, _frame: FrameType | None) -> None:
        stream.signal(signo)

    old = {}
    if is_tty:
        old[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, on_winch)
    for number in (signal.SIGINT, signal.SIGTERM) if proxy else ():
        old[number] = signal.signal(number, on_signal)
    pump = _StdinPump(stream, keys=keys if interactive else b"") if stdin else None
    try:
        with raw_mode(interactive):
            if pump is not None:
                pump.start()
            try:
                return stream.run(on_output or show)
            except Exception:
                if pump is not None and pump.detached:
                    _write_all(2, b"\r\n")  # the caller's prompt does not go behind the machine's
                    return None
                raise
            finally:
                if pump is not None:
                    pump.stop()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
