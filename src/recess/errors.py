"""Every error that Recess raises on purpose: one root, typed by meaning, never by cause.

    RecessError
      BadInput            the caller's words are wrong                 HTTP 400  exit 2
        InvalidSpec
      NotFound            unknown machine, image, snapshot, session    HTTP 404  exit 1
      Conflict            the name or key is taken, the state forbids  HTTP 409  exit 1
        NameInUse  IllegalState  KeyReused  HasDependents  HomeLocked
      Fenced              a newer lease exists: stop at once           HTTP 409  exit 1
      Unsupported         the driver lacks this capability             HTTP 422  exit 1
      Incompatible        this snapshot cannot run here                HTTP 409  exit 1
      Corrupt             stored bytes are not what was written        HTTP 500  exit 1
      OutOfSpace          a disk or a quota is full                    HTTP 507  exit 1
      Unavailable         a part that is needed is missing or silent   HTTP 503  exit 1
        MissingTool  DriverFailed  GuestFailed  ServerUnavailable
      Timeout             a bounded wait ended                         HTTP 504  exit 124
      Refused             policy forbids it                            HTTP 403  exit 1

Rules: raise, don't log and go on. `message` is one line that says what happened to what; `hint` says what to do.
This module must know nothing of any other room.
"""

from __future__ import annotations

from typing import Any, ClassVar


class RecessError(Exception):
    """Root of all errors. `message`: one line. `hint`: what the reader can do, or ''. `details`: plain JSON data."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details: dict[str, Any] = details

    def to_dict(self) -> dict[str, Any]:
        """Return the error as plain JSON data: the same shape in the API, in `--json` and in logs."""
        out: dict[str, Any] = {"code": self.code, "message": self.message, "hint": self.hint}
        if self.details:
            out["details"] = self.details
        return out


class BadInput(RecessError):
    """The caller's words are wrong; nothing was changed."""

    code = "bad_input"
    http_status = 400
    exit_code = 2


class InvalidSpec(BadInput):
    """A machine, image or agent specification contradicts itself or exceeds a cap."""

    code = "invalid_spec"


class NotFound(RecessError):
    """There is no such thing; `details` holds kind and ref."""

    code = "not_found"
    http_status = 404


class Conflict(RecessError):
    """The present state forbids it."""

    code = "conflict"
    http_status = 409


class NameInUse(Conflict):
    """The name belongs to another object."""

    code = "name_in_use"


class IllegalState(Conflict):
    """The state machine has no such move; the message names the state and the move."""

    code = "illegal_state"


class KeyReused(Conflict):
    """An idempotency key came again with other content."""

    code = "key_reused"


class HasDependents(Conflict):
    """Something else is built on it; `details["dependents"]` names them."""

    code = "has_dependents"


class HomeLocked(Conflict):
    """Another server owns this home."""

    code = "home_locked"


class Fenced(RecessError):
    """A newer epoch exists for this session: the holder must stop its machine at once and never retry."""

    code = "fenced"
    http_status = 409


class Unsupported(RecessError):
    """The driver, image or guest lacks this capability."""

    code = "unsupported"
    http_status = 422


class Incompatible(RecessError):
    """A snapshot cannot be restored on this node; `details["reasons"]` says why, one string each."""

    code = "incompatible"
    http_status = 409


class Corrupt(RecessError):
    """Stored or received bytes are not what was written: bad hash, bad magic, a count over its cap."""

    code = "corrupt"


class OutOfSpace(RecessError):
    """A disk or a quota is full; what existed before is untouched."""

    code = "out_of_space"
    http_status = 507


class Unavailable(RecessError):
    """Something that is needed is missing or silent; trying again later may help."""

    code = "unavailable"
    http_status = 503


class MissingTool(Unavailable):
    """A program or file that should be installed is not; the hint says how to get it."""

    code = "missing_tool"


class DriverFailed(Unavailable):
    """The VMM died or refused a command; `details["log"]` holds the tail of its output."""

    code = "driver_failed"


class GuestFailed(Unavailable):
    """guestd reported a failure or broke the protocol; the machine is not served."""

    code = "guest_failed"


class ServerUnavailable(Unavailable):
    """The local server cannot be reached or started."""

    code = "server_unavailable"


class Timeout(RecessError):
    """A bounded wait ended; the message says what was awaited and for how long."""

    code = "timeout"
    http_status = 504
    exit_code = 124


class Refused(RecessError):
    """A policy forbids it."""

    code = "refused"
    http_status = 403


def all_errors() -> list[type[RecessError]]:
    """Return every error class of this module, root first. A room's own subclass keeps the code of its parent here."""
    found: list[type[RecessError]] = []

    def walk(cls: type[RecessError]) -> None:
        if cls.__module__ == __name__:
            found.append(cls)
        for sub in cls.__subclasses__():
            walk(sub)

    walk(RecessError)
    return found
