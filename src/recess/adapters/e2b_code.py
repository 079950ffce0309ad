"""`run_code` with the shape of E2B's code interpreter: one long-lived Python per context, in the machine.

Its names live in the machine's memory: they survive a pause, and a fork has them too. Needs `python3` in the image.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recess.adapters.e2b_types import InvalidArgumentException, SandboxException, TimeoutException, told
from recess.sdk.machine import Machine
from recess.sdk.processes import STDERR, Process

RUNNER = "/var/lib/recess/code_runner.py"
TIMEOUT_S = 300.0
LINE_BYTES_MAX = 64 << 20


@dataclass
class OutputMessage:
    """A piece of output; `timestamp` in nanoseconds of wall time."""

    line: str
    timestamp: int
    error: bool = False


@dataclass
class ExecutionError:
    """What the code raised."""

    name: str
    value: str
    traceback: str


@dataclass
class Result:
    """The value of the last expression, in the forms it knows of itself."""

    text: str | None = None
    html: str | None = None
    markdown: str | None = None
    svg: str | None = None
    png: str | None = None
    jpeg: str | None = None
    latex: str | None = None
    json: Any = None
    is_main_result: bool = True


@dataclass
class Logs:
    """What was printed."""

    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)


@dataclass
class Execution:
    """All that came of a piece of code."""

    results: list[Result] = field(default_factory=list)
    logs: Logs = field(default_factory=Logs)
    error: ExecutionError | None = None

    @property
    def text(self) -> str | None:
        """The main result as text."""
        return next((one.text for one in self.results), None)


@dataclass(frozen=True)
class Context:
    """A Python of its own."""

    id: str
    language: str = "python"
    cwd: str = "/root"


@dataclass(frozen=True)
class Listeners:
    """What the caller wants to be told while the code runs."""

    stdout: Callable[[OutputMessage], object] | None = None
    stderr: Callable[[OutputMessage], object] | None = None
    result: Callable[[Result], object] | None = None
    error: Callable[[ExecutionError], object] | None = None


def run_code(
    machine: Machine, code: str, context: Context, envs: dict[str, str], listeners: Listeners, timeout: float | None
) -> Execution:
    """Run a piece of Python in a context. Raises TimeoutException: the context is ended then, with its names."""
    with told():
        process = _process(machine, context)
    with process:
        asked = secrets.token_hex(8)
        process.write(json.dumps({"id": asked, "code": code, "envs": envs}) + "\n")
        execution = Execution()
        try:
            with told():
                for answer in _answers(process, asked, timeout):
                    if _take(execution, answer, listeners):
                        return execution
        except TimeoutException:
            process.kill()
            raise
    raise SandboxException(f"the Python of context {context.id!r} ended: {''.join(execution.logs.stderr)[-400:]}")


def _process(machine: Machine, context: Context) -> Process:
    if context.language not in ("python", "python3"):
        raise InvalidArgumentException(f"language: python is what there is, not {context.language!r}")
    label = f"code-{context.id}"
    for one in machine.jobs():
        if one["label"] == label and one["exit_code"] is None:
            return machine.attach(str(one["job_id"]))
    machine.files.write(RUNNER, Path(__file__).with_name("code_runner.py").read_text())
    return machine.start(["python3", "-u", RUNNER], cwd=context.cwd, stdin=True, label=label)


def _answers(process: Process, asked: str, timeout: float | None) -> Iterator[dict[str, Any]]:
    """Yield the answers to this request; answers to earlier ones, which the ring still holds, are passed over."""
    rest = bytearray()
    for stream, data in process.pieces(timeout or None):
        if stream == STDERR:
            continue
        rest += data
        if len(rest) > LINE_BYTES_MAX:
            raise SandboxException("an answer is larger than 64 MiB")
        while (end := rest.find(b"\n")) >= 0:
            line = bytes(rest[:end])
            del rest[: end + 1]
            try:
                answer = json.loads(line)
            except ValueError:
                continue  # the beginning was dropped from the ring
            if isinstance(answer, dict) and answer.get("id") == asked:
                yield answer


def _take(execution: Execution, answer: dict[str, Any], listeners: Listeners) -> bool:
    """Put an answer where it belongs; tells whether it was the last."""
    kind = answer.get("t")
    if kind in ("stdout", "stderr"):
        text, error = str(answer["text"]), kind == "stderr"
        (execution.logs.stderr if error else execution.logs.stdout).append(text)
        listen = listeners.stderr if error else listeners.stdout
        if listen is not None:
            listen(OutputMessage(text, time.time_ns(), error))
    elif kind == "result":
        known = {name: answer[name] for name in Result.__dataclass_fields__ if name in answer}
        execution.results.append(Result(**known))
        if listeners.result is not None:
            listeners.result(execution.results[-1])
    elif kind == "error":
        execution.error = ExecutionError(str(answer["name"]), str(answer["value"]), str(answer["traceback"]))
        if listeners.error is not None:
            listeners.error(execution.error)
    return kind == "end"
