"""Secrets on the host, by name: read here, put on the wire by the broker, never sent to a guest, never logged.

One file a secret below one folder (0700; files 0600, written by temp name and rename), plus values the composition
root hands in. This module must know nothing of machines, policies or the environment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from recess.errors import BadInput, OutOfSpace, Refused

VALUE_BYTES_MAX = 16 * 1024
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

    def get(self, name: str) -> Secret | None:
        """Return the secret, read afresh (so a rotated key needs no restart); None if there is none.

        Raises Refused if its file is open to others or cannot be read (a link is not followed), BadInput if its content is
        no secret.
        """
        if name in self._extra:
            return Secret(name, self._extra[name])
        if self._directory is None or not _NAME.match(name):
            return None
        path = self._directory / name
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
                raw = file.read(VALUE_BYTES_MAX + 2)
            except OSError as exc:
                raise Refused(
                    f"secret {name}: its file cannot be read: {exc.strerror}", hint=f"look at {path}"
                ) from exc
        return Secret(name, check_value(name, raw.decode("latin-1")))

    def put(self, name: str, value: str) -> None:
        """Keep a secret in its file (replacing an older one). A crash leaves the old value or the new, never half.

        Raises BadInput, OutOfSpace, Refused (the folder cannot be written to).
        """
        if self._directory is None:
            raise Refused("this secret store has no folder to write to")
        checked = check_value(name, value)
        temporary = self._directory / f".{name}.{os.getpid()}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write_private(temporary, checked + "\n")
            temporary.replace(self._directory / name)
            _sync_folder(self._directory)
        except OSError as exc:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutOfSpace(f"secret {name}: the disk is full", hint="free some space") from exc
            raise Refused(f"secret {name}: it cannot be kept in {self._directory}: {exc.strerror}") from exc

    def remove(self, name: str) -> bool:
        """Forget a secret's file; tell whether there was one."""
        if self._directory is None or not _NAME.match(name):
            return False
        path = self._directory / name
        existed = path.exists()
        path.unlink(missing_ok=True)
        return existed

    def names(self) -> list[str]:
        """Return the names of all secrets, sorted; never values."""
        found = set(self._extra)
        if self._directory is not None and self._directory.is_dir():
            found.update(p.name for p in self._directory.iterdir() if _NAME.match(p.name))
        return sorted(found)


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
