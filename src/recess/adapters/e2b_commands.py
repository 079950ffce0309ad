"""Commands of a machine with the shape of E2B's `commands`. A process outlives its handle, a thaw and a fork."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, overload

from recess.adapters.e2b_types import (
    CommandExitException,
    CommandResult,
    NotFoundException,
    ProcessInfo,
    SandboxException,
    told,
)
from recess.errors import IllegalState, NotFound
from recess.sdk.machine import Machine
from recess.sdk.processes import STDOUT, Output, Process

OnText = Callable[[str], object]
TIMEOUT_S = 60.0


class CommandHandle:
    """A command at work. Iterating gives (stdout, stderr, None), one of the two first set."""

    def __init__(self, process: Process, timeout: float | None = None) -> None:
        self._process = process
        self._timeout = timeout or None
        self._output = Output()

    @property
    def pid(self) -> int:
        """The process id in the machine."""
        return self._process.pid

    @property
    def stdout(self) -> str:
        """Standard output so far, as far as it was read."""
        return self._output.result(0).stdout

    @property
    def stderr(self) -> str:
        """Standard error so far, as far as it was read."""
        return self._output.result(0).stderr

    @property
    def exit_code(self) -> int | None:
        """How it ended, None while it runs or was not read to its end."""
        return self._process.exit_code

    @property
    def error(self) -> str | None:
        """Why it could not run; always None: that raises."""
        return None

    def __iter__(self) -> Iterator[tuple[str | None, str | None, bytes | None]]:
        """Yield output as it comes."""
        with told():
            for stream, data in self._process.pieces(self._timeout):
                self._output.add(stream, data)
                text = data.decode(errors="replace")
                yield (text, None, None) if stream == STDOUT else (None, text, None)

    def wait(
        self, on_pty: object = None, on_stdout: OnText | None = None, on_stderr: OnText | None = None
    ) -> CommandResult:
        """Return how it ended. Raises CommandExitException unless with code 0, TimeoutException."""
        for out, err, _ in self:
            if out is not None and on_stdout is not None:
                on_stdout(out)
            if err is not None and on_stderr is not None:
                on_stderr(err)
        if self.exit_code is None:
            raise SandboxException("the command's stream ended before the command")
        done = CommandResult(stdout=self.stdout, stderr=self.stderr, exit_code=self.exit_code)
        if done.exit_code:
            raise CommandExitException(stdout=done.stdout, stderr=done.stderr, exit_code=done.exit_code)
        return done

    def kill(self) -> bool:
        """End it; False if it has ended."""
        return _kill(self._process)

    def send_stdin(self, data: str | bytes, request_timeout: float | None = None) -> None:
        """Write to its stdin."""
        self._process.write(data)

    def close_stdin(self, request_timeout: float | None = None) -> None:
        """Send end of file."""
        self._process.close_stdin()

    def disconnect(self) -> None:
        """Stop listening; the command goes on, `commands.connect(pid)` finds it."""
        self._process.detach()


def _kill(process: Process) -> bool:
    try:
        process.kill()
    except (IllegalState, NotFound):
        return False
    return True


class Commands:
    """The commands of one machine."""

    def __init__(self, machine: Machine, envs: dict[str, str]) -> None:
        self._machine = machine
        self._envs = envs

    @overload
    def run(
        self, cmd: str, background: Literal[False] | None = None, envs: dict[str, str] | None = None,
        user: str | None = None, cwd: str | None = None, on_stdout: OnText | None = None, on_stderr: OnText | None = None,
        stdin: bool | None = None, timeout: float | None = TIMEOUT_S, request_timeout: float | None = None,
    ) -> CommandResult: ...  # fmt: skip

    @overload
    def run(
        self, cmd: str, background: Literal[True], envs: dict[str, str] | None = None,
        user: str | None = None, cwd: str | None = None, on_stdout: OnText | None = None, on_stderr: OnText | None = None,
        stdin: bool | None = None, timeout: float | None = TIMEOUT_S, request_timeout: float | None = None,
    ) -> CommandHandle: ...  # fmt: skip

    def run(
        self, cmd: str, background: bool | None = None, envs: dict[str, str] | None = None,
        user: str | None = None, cwd: str | None = None, on_stdout: OnText | None = None, on_stderr: OnText | None = None,
        stdin: bool | None = None, timeout: float | None = TIMEOUT_S, request_timeout: float | None = None,
    ) -> CommandResult | CommandHandle:  # fmt: skip
        """Run a command with the machine's shell. In the foreground it is ended after `timeout` seconds (0 or None: never)
        and another code than 0 raises CommandExitException; in the background you get its handle at once."""
        with told():
            process = self._machine.start(
                cmd, env={**self._envs, **(envs or {})}, user=user or "", cwd=cwd or "", stdin=bool(stdin)
            )  # fmt: skip
        handle = CommandHandle(process, timeout)
        if background:
            return handle
        try:
            return handle.wait(on_stdout=on_stdout, on_stderr=on_stderr)
        finally:
            if handle.exit_code is None:
                _kill(process)
            process.detach()

    def list(self, request_timeout: float | None = None) -> list[ProcessInfo]:
        """Return the commands that run."""
        with told():
            jobs = self._machine.jobs()
        return [
            ProcessInfo(
                int(one["pid"]), str(one["label"]) or None, str(one["argv"][0]), [str(a) for a in one["argv"][1:]]
            )
            for one in jobs
            if one["exit_code"] is None
        ]

    def connect(
        self, pid: int, timeout: float | None = TIMEOUT_S, request_timeout: float | None = None
    ) -> CommandHandle:
        """Return the handle of a command that runs."""
        with told(NotFoundException):
            return CommandHandle(self._machine.attach(self._job(pid)), timeout)

    def kill(self, pid: int, request_timeout: float | None = None) -> bool:
        """End a command; False if there is none with this pid."""
        try:
            with told(NotFoundException), self._machine.attach(self._job(pid)) as process:
                return _kill(process)
        except NotFoundException:
            return False

    def send_stdin(self, pid: int, data: str | bytes, request_timeout: float | None = None) -> None:
        """Write to a command's stdin."""
        with told(NotFoundException), self._machine.attach(self._job(pid)) as process:
            process.write(data)

    def close_stdin(self, pid: int, request_timeout: float | None = None) -> None:
        """Send end of file to a command."""
        with told(NotFoundException), self._machine.attach(self._job(pid)) as process:
            process.close_stdin()

    def _job(self, pid: int) -> str:
        for one in self._machine.jobs():
            if one["pid"] == pid and one["exit_code"] is None:
                return str(one["job_id"])
        raise NotFound(f"no command with pid {pid} runs in {self._machine.id}")
