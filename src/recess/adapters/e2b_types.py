"""Data and errors with the names that E2B's SDK gives them. No behaviour beyond translating our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, StrEnum
from typing import Any

from recess import errors


class SandboxException(Exception):
    """Root of all errors here."""


class TimeoutException(SandboxException):
    """A bounded wait ended."""


class InvalidArgumentException(SandboxException):
    """The caller's words are wrong."""


class NotEnoughSpaceException(SandboxException):
    """A disk is full."""


class NotFoundException(SandboxException):
    """There is no such thing."""


class FileNotFoundException(NotFoundException):
    """There is no such file."""


class SandboxNotFoundException(NotFoundException):
    """There is no such machine."""


class AuthenticationException(Exception):
    """The server refuses this token."""


@dataclass
class CommandResult:
    """How a command ended."""

    stderr: str
    stdout: str
    exit_code: int
    error: str | None = None


@dataclass
class CommandExitException(SandboxException, CommandResult):
    """A command ended with another code than 0."""

    def __str__(self) -> str:
        return f"Command exited with code {self.exit_code} and error:\n{self.stderr}"


@dataclass
class ProcessInfo:
    """One process of the job table."""

    pid: int
    tag: str | None
    cmd: str
    args: list[str]
    envs: dict[str, str] = field(default_factory=dict)
    cwd: str | None = None


class FileType(Enum):
    """What a path is."""

    FILE = "file"
    DIR = "dir"
    SYMLINK = "symlink"


@dataclass
class WriteInfo:
    """A file that was written."""

    name: str
    type: FileType | None
    path: str


@dataclass
class EntryInfo(WriteInfo):
    """A file as it is. Owner and group are not known here."""

    size: int
    mode: int
    permissions: str
    modified_time: datetime
    owner: str = ""
    group: str = ""
    symlink_target: str | None = None


class FilesystemEventType(Enum):
    """What became of a file. Mode changes and renames are seen as what they come to: a write, a removal and a creation."""

    CHMOD = "chmod"
    CREATE = "create"
    REMOVE = "remove"
    RENAME = "rename"
    WRITE = "write"


@dataclass
class FilesystemEvent:
    """One change; `name` is relative to the watched folder."""

    name: str
    type: FilesystemEventType


class SandboxState(StrEnum):
    """Whether it runs."""

    RUNNING = "running"
    PAUSED = "paused"


@dataclass
class SandboxInfo:
    """One machine in a list. Machines here have no end of their own: `end_at` is None."""

    sandbox_id: str
    template_id: str
    name: str | None
    metadata: dict[str, str]
    started_at: datetime
    end_at: datetime | None
    state: SandboxState
    cpu_count: int
    memory_mb: int


@dataclass
class SnapshotInfo:
    """A stored snapshot; its id is a template for `create`."""

    snapshot_id: str
    names: list[str] = field(default_factory=list)


@contextmanager
def told(what: type[NotFoundException] = SandboxNotFoundException) -> Iterator[None]:
    """Raise our errors by their names; `what` is the kind of thing that was looked for."""
    try:
        yield
    except errors.NotFound as exc:
        raise what(str(exc)) from exc
    except errors.Timeout as exc:
        raise TimeoutException(str(exc)) from exc
    except errors.BadInput as exc:
        raise InvalidArgumentException(str(exc)) from exc
    except errors.OutOfSpace as exc:
        raise NotEnoughSpaceException(str(exc)) from exc
    except errors.Refused as exc:
        raise AuthenticationException(str(exc)) from exc
    except errors.RecessError as exc:
        raise SandboxException(f"{exc}" + (f" ({exc.hint})" if exc.hint else "")) from exc


def label(metadata: dict[str, Any]) -> dict[str, str]:
    """Return metadata as machine labels."""
    return {str(name): str(value) for name, value in metadata.items()}
