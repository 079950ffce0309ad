"""Postgres' errors as Recess's own: pure functions from SQLSTATE to typed error, and what may simply be tried again.

It must know no table and no room. Codes: https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

from __future__ import annotations

import psycopg

from recess.db.errors import UniqueViolation
from recess.errors import BadInput, Conflict, Corrupt, OutOfSpace, RecessError, Refused, Unavailable

_AGAIN = {"40001", "40P01"}  # serialization failure, deadlock: undone whole, by no fault of the writer
_CORRUPT = {"XX001", "XX002"}  # a damaged page, a damaged index
_FULL = {"53100", "53200"}
_LOGIN = {"28000", "28P01"}
_MISSING = {"3D000"}


def worth_repeating(exc: BaseException) -> bool:
    """Tell whether the transaction was undone for a reason that does not concern it."""
    return isinstance(exc, psycopg.Error) and exc.sqlstate in _AGAIN


def translate(exc: BaseException, name: str) -> BaseException:
    """Return the typed error for a failure of the database `name`; anything that is not the database's as it is."""
    if isinstance(exc, UniqueViolation):
        return Conflict(f"database: {exc}")
    if isinstance(exc, RecessError) or not isinstance(exc, psycopg.Error):
        return exc
    state, text = exc.sqlstate or "", one_line(exc)
    if state in _FULL:
        return OutOfSpace(f"database {name}: {text}; nothing was changed", hint="free some space on its host and retry")
    if state in _CORRUPT:
        return Corrupt(f"database {name} is damaged: {text}", hint="stop all nodes and restore a backup")
    if state in _LOGIN or (not state and "authentication failed" in text):
        return Refused(f"database {name}: {text}", hint="see RECESS_DATABASE_URL, or ~/.pgpass")
    if state in _MISSING or (not state and 'FATAL:  database "' in str(exc)):  # a refused connection carries no state
        return BadInput(f"database {name}: {text}", hint="make it first: createdb NAME")
    if state.startswith("23"):
        return Conflict(f"database: {text}")
    if state.startswith("22") or (isinstance(exc, psycopg.DataError) and not state):  # a text with a NUL, for one
        return BadInput(f"database: {text}")
    return Unavailable(f"database {name}: {text}", hint="is the server up? it is tried again", retryable=True)


def one_line(exc: BaseException) -> str:
    """Return what the server said, on one line."""
    return " ".join(str(exc).split()) or type(exc).__name__
