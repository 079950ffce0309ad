"""The caller's terminal: raw mode, size, signals, and the loop between it and an exec stream.

Restores the terminal whatever happens. Detach keys: Ctrl-P Ctrl-Q, as Docker has them.
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

from recess.sdk.exec_stream import ExecStream

DETACH = b"\x10\x11"


def size() -> tuple[int, int]:
    """Return rows and columns."""
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
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, saved)


class _StdinPump(threading.Thread):
    """Copies stdin to the process until its end, or until stopped through a pipe."""

    def __init__(self, stream: ExecStream, *, detach_keys: bool) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self._detach_keys = detach_keys
        self._wake_r, self._wake_w = os.pipe()
        self.detached = False

    def run(self) -> None:
        fd, last = sys.stdin.fileno(), b""
        while True:
            ready, _, _ = select.select([fd, self._wake_r], [], [])
            if self._wake_r in ready:
                return
            data = os.read(fd, 65536)
            if not data:
                self._stream.eof()
                return
            if self._detach_keys and (last + data).endswith(DETACH):
                self.detached = True
                self._stream.close()
                return
            last = data[-1:]
            self._stream.write(data)

    def stop(self) -> None:
        """End the thread and wait for it."""
        os.write(self._wake_w, b"x")
        self.join(timeout=1)
        os.close(self._wake_r)
        os.close(self._wake_w)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def converse(stream: ExecStream, *, is_tty: bool, stdin: bool) -> int:
    """Join the terminal and the process until it ends; return its exit code (0 after the detach keys)."""
    interactive = is_tty and stdin and sys.stdin.isatty()

    def on_winch(_signo: int, _frame: FrameType | None) -> None:
        stream.resize(*size())

    def on_signal(signo: int, _frame: FrameType | None) -> None:
        stream.signal(signo)

    old = {}
    if is_tty:
        old[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, on_winch)
    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, on_signal)
    pump = _StdinPump(stream, detach_keys=interactive) if stdin else None
    try:
        with raw_mode(interactive):
            if pump is not None:
                pump.start()
            try:
                return stream.run(lambda number, data: _write_all(number if number else 2, data))
            except Exception:
                if pump is not None and pump.detached:
                    return 0
                raise
            finally:
                if pump is not None:
                    pump.stop()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
