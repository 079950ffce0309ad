"""A process in a machine: its output as it comes, its stdin, its signals, its end.

A handle is a view: closing it, or losing it, never ends the process, which lives in the machine and is frozen and
thawed with it. Blocking; output is read in the thread that asks for it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from recess.errors import RecessError, Timeout
from recess.sdk.exec_stream import ExecStream
from recess.sdk.transport import Transport

OUTPUT_BYTES_MAX = 64 << 20  # of one `Result`; what comes beyond is dropped and counted
STDOUT, STDERR = 1, 2
OnBytes = Callable[[bytes], None]


@dataclass(frozen=True)
class Result:
    """How a process ended: exit code (128+N for signal N) and output. `dropped`: bytes of output that are not here."""

    exit_code: int
    stdout_bytes: bytes
    stderr_bytes: bytes
    dropped: int = 0

    @property
    def stdout(self) -> str:
        """Standard output as text; what is no UTF-8 is replaced."""
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        """Standard error as text."""
        return self.stderr_bytes.decode(errors="replace")

    @property
    def ok(self) -> bool:
        """Whether it ended with code 0."""
        return self.exit_code == 0

    def check(self) -> Result:
        """Return itself. Raises CommandFailed unless it ended with code 0."""
        if not self.ok:
            raise CommandFailed(self)
        return self


class CommandFailed(RecessError):
    """A process ended with another code than 0, and its caller wanted 0; `result` has the rest."""

    def __init__(self, result: Result) -> None:
        tail = (result.stderr or result.stdout).strip()[-400:]
        super().__init__(f"exit code {result.exit_code}" + (f": {tail}" if tail else ""))
        self.result = result


class Output:
    """Collects output up to a limit."""

    def __init__(self, limit: int = OUTPUT_BYTES_MAX) -> None:
        self._kept = {STDOUT: bytearray(), STDERR: bytearray()}
        self._room = limit
        self._dropped = 0

    def add(self, stream: int, data: bytes) -> None:
        """Take a piece."""
        kept = data[: self._room]
        self._room -= len(kept)
        self._dropped += len(data) - len(kept)
        self._kept[STDERR if stream == STDERR else STDOUT] += kept

    def result(self, exit_code: int) -> Result:
        """Return what came."""
        return Result(exit_code, bytes(self._kept[STDOUT]), bytes(self._kept[STDERR]), self._dropped)


class Process:
    """An attached process. Read it by `for stream, data in process` (1 stdout, 2 stderr) or by `wait`, not both at once."""

    def __init__(self, transport: Transport, machine: str, start: Mapping[str, Any]) -> None:
        self._transport = transport
        self._machine = machine
        self._stream = ExecStream(transport, machine, start)
        self.job_id = self._stream.job_id
        self.pid = self._stream.pid
        self.exit_code: int | None = None

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yield (stream, bytes) until the process ends; `exit_code` is set then."""
        return self.pieces(None)

    def pieces(self, timeout_s: float | None) -> Iterator[tuple[int, bytes]]:
        """Yield output; raises Timeout when the process has not ended after `timeout_s` (it goes on)."""
        for item in self._stream.items(timeout_s):
            if isinstance(item, int):
                self.exit_code = item
            else:
                yield item

    def wait(
        self, timeout_s: float | None = None, *, on_stdout: OnBytes | None = None, on_stderr: OnBytes | None = None
    ) -> Result:
        """Return how it ended, with all output that was not read yet. Raises Timeout; the process goes on then."""
        output = Output()
        tell = {STDOUT: on_stdout, STDERR: on_stderr}
        for stream, data in self.pieces(timeout_s):
            output.add(stream, data)
            told = tell.get(stream)
            if told is not None:
                told(data)
        if self.exit_code is None:
            raise Timeout(f"job {self.job_id}: its stream ended before the process")
        return output.result(self.exit_code)

    def write(self, data: bytes | str) -> None:
        """Send to stdin (a process started with `stdin=True`), from any thread."""
        self._stream.write(data.encode() if isinstance(data, str) else data)

    def close_stdin(self) -> None:
        """Send end of file."""
        self._stream.eof()

    def signal(self, number: int) -> None:
        """Send a signal to the process group. Raises IllegalState when it has ended."""
        path = f"/v1/machines/{self._machine}/jobs/{self.job_id}/signal"
        self._transport.call("POST", path, {"number": number})

    def kill(self) -> None:
        """Send SIGKILL."""
        self.signal(signal.SIGKILL)

    def resize(self, rows: int, cols: int) -> None:
        """Tell a pty its size."""
        self._stream.resize(rows, cols)

    def detach(self) -> None:
        """Close this view; the process goes on, and `Machine.attach(job_id)` finds it."""
        self._stream.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def argv_of(command: str | Sequence[str]) -> list[str]:
    """Return a command's words: a text goes to the machine's shell, words are run as they are."""
    return ["sh", "-c", command] if isinstance(command, str) else [str(one) for one in command]
