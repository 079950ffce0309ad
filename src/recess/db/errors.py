"""SQLite's errors as Recess's own: one pure function from result code to typed error. (Postgres': `postgres_errors`.)

It must know no table and no room. Codes: https://www.sqlite.org/rescode.html (primary code = low byte).
"""

from __future__ import annotations

import errno
import sqlite3

from recess.errors import Conflict, Corrupt, OutOfSpace, RecessError, Unavailable

_CORRUPT = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


class UniqueViolation(Exception):
    """A statement would have broken a unique index and did nothing; the transaction goes on. Rooms say what it means."""


def primary_code(exc: BaseException) -> int:
    """Return SQLite's primary result code, 0 if the exception carries none."""
    return int(getattr(exc, "sqlite_errorcode", 0) or 0) & 0xFF


def translate(exc: BaseException, path: str) -> BaseException:
    """Return the typed error for a failure of the database at `path`; anything that is not SQLite's as it is."""
    if isinstance(exc, UniqueViolation):
        return Conflict(f"database: {exc}")
    if isinstance(exc, RecessError) or not isinstance(exc, sqlite3.Error | OSError):
        return exc
    code = primary_code(exc)
    if code == sqlite3.SQLITE_FULL or (isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)):
        return OutOfSpace(f"database {path}: the disk is full; nothing was changed", hint="free some space and retry")
    if code in _CORRUPT:
        return Corrupt(
            f"database {path} is damaged: {exc}",
            hint="stop the server, move the file away (keep it), and restore a backup or start with an empty home",
        )
    if code in _BUSY:
        return Unavailable(f"database {path} is locked by another program", hint="end the program that holds it")
    if code == sqlite3.SQLITE_CONSTRAINT:
        return Conflict(f"database: {exc}")
    return Unavailable(f"database {path}: {exc}", hint="check that the file and its folder are writable")
