"""Secrets on the host, by name: read here, put on the wire by the broker, never sent to a guest, never logged.

One file a secret below one folder (0700; files 0600, written by temp name and rename): NAME holds a value, NAME.from
says where the value is kept instead; plus values the composition root hands in. This module must know nothing of
machines, policies or the environment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from recess.broker.sources import check_source, read_source
from recess.errors import BadInput, OutOfSpace, Refused

VALUE_BYTES_MAX = 16 * 1024
SOURCE_FRESH_S = 60.0  # a value kept elsewhere is asked for again after this long
_SOURCE = ".from"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}\Z")


class Secret:
    """A value that does not show itself: `repr`, `str` and formatting give only its name."""

    __slots__ = ("_value", "name")

    def __init__(self, name: str, value: str) -> None:
        self.name = name
        self._value = value

    def reveal(self) -> str:
        """Return the value; only the code that writes it to an upstream's socket calls this."""
        return self._value

    def __repr__(self) -> str:
        return f"<secret {self.name}>"


def check_value(name: str, value: str) -> str:
    """Return the value without a final newline, fit to be an HTTP header. Raises BadInput, never showing the value."""
    if not _NAME.match(name):
        raise BadInput(f"not a secret's name: {name[:80]!r}", hint="letters, digits, - and _")
    stripped = value.strip()
    if not stripped or len(stripped) > VALUE_BYTES_MAX or not all(" " <= c <= "~" for c in stripped):
        raise BadInput(f"secret {name}: a value is one line of printable ASCII, at most {VALUE_BYTES_MAX} bytes")
    return stripped


class SecretStore:
    """Secrets by name. `extra` wins over files; a file that others may read is refused, not used."""

    def __init__(self, directory: Path | None = None, extra: Mapping[str, str] | None = None) -> None:
        self._directory = directory
        self._extra = {name: check_value(name, value) for name, value in (extra or {}).items()}
        self._fresh: dict[str, tuple[str, float, str]] = {}  # name -> source, when, value

    def get(self, name: str) -> Secret | None:
        """Return the secret, read afresh (so a rotated key needs no restart); None if there is none. May block: one kept
        elsewhere is asked for there, at most once a minute.

        Raises Refused if its file is open to others or cannot be read (a link is not followed), BadInput if its content is
        no secret; Unavailable, NotFound when it is kept elsewhere and not to be had.
        """
        if name in self._extra:
            return Secret(name, self._extra[name])
        if self._directory is None or not _NAME.match(name):
            return None
        raw = _read_private(self._directory / name, name)
        if raw is not None:
            return Secret(name, check_value(name, raw))
        source = _read_private(self._directory / f"{name}{_SOURCE}", name)
        return None if source is None else Secret(name, self._elsewhere(name, check_source(source)))

    def _elsewhere(self, name: str, source: str) -> str:
        known, now = self._fresh.get(name), time.monotonic()
        if known is not None and known[0] == source and now - known[1] < SOURCE_FRESH_S:
            return known[2]
        value = check_value(name, read_source(source))
        self._fresh[name] = (source, now, value)
        return value

    def put(self, name: str, value: str) -> None:
        """Keep a secret in its file (replacing an older one). A crash leaves the old value or the new, never half.

        Raises BadInput, OutOfSpace, Refused (the folder cannot be written to).
        """
        self._keep(name, name, check_value(name, value))

    def put_source(self, name: str, source: str) -> None:
        """Keep where a secret's value is to be read from; it is read once now. Raises as `put` and `get`."""
        check_value(name, read_source(check_source(source)))
        self._keep(f"{name}{_SOURCE}", name, check_source(source))

    def _keep(self, filename: str, name: str, line: str) -> None:
        if self._directory is None:
            raise Refused("this secret store has no folder to write to")
        temporary = self._directory / f".{filename}.{os.getpid()}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write_private(temporary, line + "\n")
            temporary.replace(self._directory / filename)
            # The other kind goes last: in between both are there, and a value wins over a source.
            other = name if filename.endswith(_SOURCE) else f"{name}{_SOURCE}"
            (self._directory / other).unlink(missing_ok=True)
            _sync_folder(self._directory)
        except OSError as exc:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutOfSpace(f"secret {name}: the disk is full", hint="free some space") from exc
            raise Refused(f"secret {name}: it cannot be kept in {self._directory}: {exc.strerror}") from exc
        self._fresh.pop(name, None)

    def remove(self, name: str) -> bool:
        """Forget a secret; tell whether there was one."""
        if self._directory is None or not _NAME.match(name):
            return False
        existed = False
        for path in (self._directory / name, self._directory / f"{name}{_SOURCE}"):
            existed = existed or path.exists()
            path.unlink(missing_ok=True)
        self._fresh.pop(name, None)
        return existed

    def names(self) -> list[str]:
        """Return the names of all secrets, sorted; never values."""
        found = set(self._extra)
        if self._directory is not None and self._directory.is_dir():
            names = (p.name.removesuffix(_SOURCE) for p in self._directory.iterdir())
            found.update(name for name in names if _NAME.match(name))
        return sorted(found)

    def describe(self) -> list[dict[str, str]]:
        """Return each secret's name and where its value is kept ("here" or a source); never values."""
        out = []
        for name in self.names():
            at = None if self._directory is None else self._directory / name
            here = name in self._extra or (at is not None and at.exists())
            source = None if here or at is None else _read_private(at.with_name(name + _SOURCE), name)
            out.append({"name": name, "kept": (source or "here").strip()})
        return out


def _read_private(path: Path, name: str) -> str | None:
    """Return a private file's text, None if there is none. Raises Refused: open to others, a link, not readable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as exc:  # said, not let through: the broker's caller must learn why its call did not go out
        raise Refused(f"secret {name}: its file cannot be read: {exc.strerror}", hint=f"look at {path}") from exc
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_mode & 0o077:
            raise Refused(f"secret {name}: its file is open to others", hint=f"chmod 600 {path}")
        try:
            return file.read(VALUE_BYTES_MAX + 2).decode("latin-1")
        except OSError as exc:
            raise Refused(f"secret {name}: its file cannot be read: {exc.strerror}", hint=f"look at {path}") from exc


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
