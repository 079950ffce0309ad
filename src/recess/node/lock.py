"""One server per home: an advisory lock on `server.lock`, held by the kernel for as long as the process lives.

Because the kernel drops it with the process, whoever gets it knows that the former owner is dead: that is what lets
an embedded server take over sessions without waiting for their leases. It must know nothing else of the node.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from recess.errors import HomeLocked, Unavailable


class HomeLock:
    """The lock on a home folder. The file also holds the owner's process id, for people."""

    def __init__(self, home: Path) -> None:
        self._path = home / "server.lock"
        self._fd = -1

    def acquire(self) -> None:
        """Take the lock or raise HomeLocked at once, naming the owner's process id."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise Unavailable(f"cannot open {self._path}: {exc.strerror}") from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
            os.close(fd)
            raise HomeLocked(
                f"another server owns {self._path.parent}" + (f" (pid {owner})" if owner.isdigit() else ""),
                hint="use it, or stop it first: recess down",
            ) from exc
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    def release(self) -> None:
        """Give it back; may be called twice. The file stays: removing it would let two owners hold two files."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
