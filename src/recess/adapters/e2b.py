"""A machine with the shape of E2B's SDK: `from recess.adapters.e2b import Sandbox` in place of `from e2b import Sandbox`.

    with Sandbox.create() as sandbox:
        sandbox.files.write("hello.txt", "hi")
        print(sandbox.commands.run("cat hello.txt").stdout)

What differs is written in docs/adapters.md: no time limit of its own, ports are named at creation, no pty, no signed URLs.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from recess.adapters.e2b_code import TIMEOUT_S, Context, Execution, Listeners, run_code
from recess.adapters.e2b_commands import CommandHandle, Commands
from recess.adapters.e2b_files import Filesystem, WatchHandle
from recess.adapters.e2b_types import (
    AuthenticationException,
    CommandExitException,
    CommandResult,
    FileNotFoundException,
    InvalidArgumentException,
    NotFoundException,
    SandboxException,
    SandboxInfo,
    SandboxNotFoundException,
    SandboxState,
    SnapshotInfo,
    TimeoutException,
    label,
    told,
)
from recess.errors import NotFound
from recess.sdk.client import Client
from recess.sdk.machine import Machine

__all__ = [
    "AuthenticationException",
    "CommandExitException",
    "CommandHandle",
    "CommandResult",
    "Execution",
    "FileNotFoundException",
    "InvalidArgumentException",
    "NotFoundException",
    "Sandbox",
    "SandboxException",
    "SandboxInfo",
    "SandboxNotFoundException",
    "TimeoutException",
    "WatchHandle",
]

TEMPLATE = "base"
PAGE = 100
MARK = "adapter"  # the label that tells these machines from others
ENV = "env."  # labels that hold the environment of `create`, for `connect`


class _Both:
    """A method that may be called on the class as well, with the id first: `sandbox.kill()`, `Sandbox.kill(ident)`."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: Sandbox | None, owner: type[Sandbox]) -> Callable[..., Any]:
        if instance is not None:
            return functools.partial(self._method, instance)

        @functools.wraps(self._method)
        def by_id(sandbox_id: str, *args: Any, client: Client | None = None, **kwargs: Any) -> Any:
            return self._method(owner.find(sandbox_id, client=client), *args, **kwargs)

        return by_id


class Sandbox:
    """One machine. `machine` is the same as a `recess.Machine`, for all that this shape has no word for."""

    def __init__(self, machine: Machine, envs: dict[str, str] | None = None) -> None:
        self.machine = machine
        self.sandbox_id = machine.id
        self._envs = dict(envs or {})
        self.commands = Commands(machine, self._envs)
        self.files = Filesystem(machine)

    @classmethod
    def create(
        cls, template: str | None = None, timeout: int | None = None, metadata: dict[str, str] | None = None,
        envs: dict[str, str] | None = None, secure: bool | None = None, allow_internet_access: bool | None = None,
        *, ports: Sequence[int] = (), client: Client | None = None, **opts: Any,
    ) -> Sandbox:  # fmt: skip
        """Start a machine of an image, or restore a snapshot (`template` is a snapshot's name or id, else an image's name).

        `ports`: guest ports that `get_host` is to reach. `timeout` and `secure` are accepted and mean nothing here. The
        machine may call any public name, as there, unless `allow_internet_access` is False. Raises SandboxException.
        """
        labels = {MARK: "e2b", **label(metadata or {}), **{ENV + k: v for k, v in (envs or {}).items()}}
        wanted, alone = template or TEMPLATE, allow_internet_access is False
        with told():
            machine = _restored(wanted, client)
            if machine is None:
                machine = Machine.run(
                    wanted, labels=labels, ports=ports, client=client, network="none" if alone else None,
                    allow=() if alone else ("*",),
                )  # fmt: skip
        return cls(machine, envs)

    @classmethod
    def find(cls, sandbox_id: str, *, client: Client | None = None) -> Sandbox:
        """Return the machine with this id as it is, running or not. Raises SandboxNotFoundException."""
        with told():
            machine = Machine.get(sandbox_id, client=client)
            labels = machine.info()["spec"]["labels"]
        return cls(machine, {name.removeprefix(ENV): value for name, value in labels.items() if name.startswith(ENV)})

    @_Both
    def connect(self, timeout: int | None = None, **opts: Any) -> Sandbox:
        """Return the machine, brought back if it was put away."""
        with told():
            state = self.machine.state
            if state == "paused":
                self.machine.unpause()
            elif state != "running":
                self.machine.resume()
        return self

    @_Both
    def resume(self, timeout: int | None = None, **opts: Any) -> Sandbox:
        """The same as `connect`."""
        return self.connect(timeout)  # type: ignore[no-any-return]

    @_Both
    def pause(self, **opts: Any) -> bool:
        """Put it away, memory and all; `connect` brings it back. False if it was put away."""
        with told():
            if self.machine.state == "suspended":
                return False
            self.machine.suspend()
        return True

    @_Both
    def kill(self, **opts: Any) -> bool:
        """End and forget it; False if there is none."""
        with told():
            try:
                self.machine.info()
            except NotFound:
                return False
            self.machine.remove()
        return True

    @_Both
    def get_info(self, **opts: Any) -> SandboxInfo:
        """Return what it is."""
        with told():
            return _info(self.machine.info())

    @_Both
    def set_timeout(self, timeout: int, **opts: Any) -> None:
        """Accepted; a machine has no end of its own here."""

    @_Both
    def create_snapshot(self, name: str | None = None, **opts: Any) -> SnapshotInfo:
        """Store it as it is; it goes on. The id is a template for `create`."""
        with told():
            made = self.machine.snapshot(name or "")
        return SnapshotInfo(made.id, [name] if name else [])

    beta_pause = pause

    def fork(self, timeout: int | None = None, count: int | None = None, **opts: Any) -> list[Sandbox]:
        """Return running copies, memory and processes and all."""
        with told():
            return [Sandbox(one, self._envs) for one in self.machine.fork(count or 1)]

    def is_running(self, request_timeout: float | None = None) -> bool:
        """Tell whether it runs."""
        with told():
            try:
                return self.machine.state == "running"
            except NotFound:
                return False

    def get_host(self, port: int) -> str:
        """Return "host:port" of a port that was named at creation."""
        with told(NotFoundException):
            host, number = self.machine.port(port)
        return f"{host}:{number}"

    @classmethod
    def list(
        cls, query: dict[str, Any] | None = None, limit: int | None = None, *, client: Client | None = None, **opts: Any
    ) -> SandboxPaginator:
        """Return the machines made here, newest first; `query` may hold `metadata` and `state` (a list)."""
        with told():
            rows = [one.info() for one in Machine.list(everything=True, client=client)]
        wanted, states = dict((query or {}).get("metadata") or {}), (query or {}).get("state")
        found = [_info(one) for one in rows if one["spec"]["labels"].get(MARK) == "e2b" and one["state"] in _STATES]
        fitting = [
            one for one in found if wanted.items() <= one.metadata.items() and (not states or one.state in states)
        ]
        return SandboxPaginator(fitting, limit or PAGE)

    # -- code --------------------------------------------------------------------------------------------------------

    def create_code_context(self, cwd: str | None = None, language: str | None = None, **opts: Any) -> Context:
        """Return a context of its own: names of others are not seen in it."""

        return Context(secrets.token_hex(6), language or "python", cwd or "/root")

    def run_code(
        self, code: str, language: str | None = None, context: Context | None = None,
        on_stdout: Callable[..., object] | None = None, on_stderr: Callable[..., object] | None = None,
        on_result: Callable[..., object] | None = None, on_error: Callable[..., object] | None = None,
        envs: dict[str, str] | None = None, timeout: float | None = TIMEOUT_S, request_timeout: float | None = None,
    ) -> Execution:  # fmt: skip
        """Run Python whose names stay, in the machine's memory. What the code raises is in `error`."""
        where = context or Context("default", language or "python")
        listeners = Listeners(on_stdout, on_stderr, on_result, on_error)
        return run_code(self.machine, code, where, {**self._envs, **(envs or {})}, listeners, timeout)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class SandboxPaginator:
    """Pages of a list that was made at once."""

    def __init__(self, found: Sequence[SandboxInfo], size: int) -> None:
        self._left = list(found)
        self._size = size

    @property
    def has_next(self) -> bool:
        """Whether there is more."""
        return bool(self._left)

    def next_items(self) -> Sequence[SandboxInfo]:
        """Return the next page."""
        page, self._left = self._left[: self._size], self._left[self._size :]
        return page


_STATES = {"running": SandboxState.RUNNING, "paused": SandboxState.PAUSED, "suspended": SandboxState.PAUSED}


def _restored(template: str, client: Client | None) -> Machine | None:
    """Restore the snapshot of this name or id; None if there is none and the name may be an image's."""
    try:
        return Machine.restore(template, client=client)
    except NotFound:
        if template.startswith("snp_"):
            raise
        return None


def _info(row: dict[str, Any]) -> SandboxInfo:
    spec = row["spec"]
    metadata = {k: v for k, v in spec["labels"].items() if k != MARK and not k.startswith(ENV)}
    return SandboxInfo(
        sandbox_id=str(row["id"]), template_id=str(spec["image"]), name=str(row["name"]), metadata=metadata,
        started_at=datetime.fromtimestamp(float(row["created"]), UTC), end_at=None,
        state=_STATES.get(str(row["state"]), SandboxState.PAUSED), cpu_count=int(spec["cpus"]),
        memory_mb=int(spec["memory_bytes"]) >> 20,
    )  # fmt: skip
