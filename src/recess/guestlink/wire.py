"""Bodies of the guest protocol as typed records, and what guestd's error words mean here.

Everything decoded here was written by a guest: types are checked, unknown fields ignored, any misfit is `GuestFailed`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from recess.errors import (
    BadInput,
    GuestFailed,
    IllegalState,
    NotFound,
    OutOfSpace,
    RecessError,
    Refused,
    Timeout,
    Unavailable,
    Unsupported,
)
from recess.guestlink.frames import MAX_PAYLOAD
from recess.guestlink.link import ExecRequest, FileStat, JobInfo, Thaw

PROTO = 1
_HELLO_ROOM = 256  # what stands around the thaw, and longer numbers in the next one

T = TypeVar("T")


class Hello(msgspec.Struct):
    """guestd's side of the hello. `mode` is "machine" or "process"; `takes`: what it knows besides what every
    version of guestd does: "token" in a thaw, a thaw in the "hello" and the request "clock", "sparse" files in an archive. A snapshot holds the guestd of its time, so this is asked of each anew."""

    proto: int
    nonce: str
    guestd: str = ""
    boot_id: str = ""
    mode: str = ""
    frozen: bool = False
    takes: list[str] = []


class Fault(msgspec.Struct):
    """An error as it crosses the wire."""

    kind: str
    message: str


class Reply(msgspec.Struct):
    """The answer to a request: exactly one of the two."""

    ok: msgspec.Raw = msgspec.Raw(b"")
    error: Fault | None = None


class Opened(msgspec.Struct):
    """A stream that the guest opened."""

    service: str
    meta: dict[str, int | str] = {}


class Exited(msgspec.Struct):
    """The end of a job."""

    exit_code: int


class JobRow(msgspec.Struct):
    """One row of the job table."""

    job_id: str
    pid: int
    argv: list[str]
    label: str
    started_s: float
    exit_code: int | None
    stdin: bool = False
    tty: bool = False

    def to_info(self) -> JobInfo:
        """Return the public record."""
        return JobInfo(self.job_id, self.pid, tuple(self.argv), self.label, self.started_s, self.exit_code)


class Sealed(msgspec.Struct):
    """A place that the workload cannot write; `behind` is where the host does, a path of the guest's as it was told one."""

    behind: str


class StatRow(msgspec.Struct):
    """One file."""

    path: str
    kind: str
    size: int
    mode: int
    mtime_s: float

    def to_stat(self) -> FileStat:
        """Return the public record."""
        return FileStat(self.path, self.kind, self.size, self.mode, self.mtime_s)


def decode(data: bytes | msgspec.Raw, kind: type[T], what: str) -> T:
    """Parse JSON into a record of this type. Raises GuestFailed."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise GuestFailed(f"the guest sent a malformed {what}: {exc}") from exc


_MEANING: Mapping[str, type[RecessError]] = {
    "bad_input": BadInput,
    "too_large": BadInput,
    "not_executable": BadInput,
    "not_found": NotFound,
    "no_job": NotFound,
    "no_program": NotFound,
    "frozen": IllegalState,
    "running": IllegalState,
    "ended": IllegalState,
    "unsupported": Unsupported,
    "no_space": OutOfSpace,
    "refused": Refused,
    "unreachable": Unavailable,
    "busy": Unavailable,
    "timeout": Timeout,
}
_EXIT_CODES = {"no_program": 127, "not_executable": 126}


def to_error(fault: Fault) -> RecessError:
    """Return the typed error for guestd's word; an unknown word is a plain GuestFailed. One line, bounded."""
    message = " ".join(fault.message[:2000].split())
    error = _MEANING.get(fault.kind, GuestFailed)(message)
    error.details["guest_kind"] = fault.kind[:40]
    if fault.kind in _EXIT_CODES:
        error.details["exit_code"] = _EXIT_CODES[fault.kind]
    return error


def exec_body(request: ExecRequest, stream: int) -> dict[str, Any]:
    """Return the body that starts this process with its streams attached to `stream`."""
    return {
        "op": "exec",
        "stream": stream,
        "argv": list(request.argv),
        "env": dict(request.env),
        "cwd": request.cwd,
        "user": request.user,
        "tty": request.tty,
        "rows": request.rows,
        "cols": request.cols,
        "stdin": request.stdin,
        "job_id": request.job_id,
        "label": request.label,
    }


def thaw_body(thaw: Thaw) -> dict[str, Any]:
    """Return the thaw request. A machine id of ours becomes the 32 hex digits that /etc/machine-id must hold."""
    if len(thaw.entropy) != 32:
        raise BadInput(f"thaw: entropy is {len(thaw.entropy)} bytes, not 32")
    body: dict[str, Any] = {
        "op": "thaw",
        "wall_ns": thaw.wall_ns,
        "entropy": thaw.entropy.hex(),
        "generation": thaw.generation,
        "epoch": thaw.epoch,
        "hostname": thaw.hostname,
        "machine_id": linux_machine_id(thaw.machine_id),
        "env": dict(thaw.env),
    }
    return {**body, "token": thaw.token} if thaw.token else body


def hello_body(nonce: str, thaw: Mapping[str, Any] | None) -> bytes:
    """Return the host's hello, and the thaw that it brings along."""
    plain: dict[str, Any] = {"proto": PROTO, "nonce": nonce}
    return msgspec.json.encode(plain if thaw is None else {**plain, "thaw": thaw})


def fits_in_hello(thaw: Mapping[str, Any]) -> bool:
    """Tell whether such a thaw fits into a hello, which is one frame."""
    return len(msgspec.json.encode(thaw)) <= MAX_PAYLOAD - _HELLO_ROOM


def linux_machine_id(machine_id: str) -> str:
    """Return 32 lower-case hex digits: the id itself if it has that form, else a hash of it."""
    if re.fullmatch(r"[0-9a-f]{32}", machine_id):
        return machine_id
    return hashlib.blake2b(machine_id.encode(), digest_size=16, person=b"recess-mid").hexdigest()
