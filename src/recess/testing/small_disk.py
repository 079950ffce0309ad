"""A real file system of a few megabytes, for tests that fill a disk; and the right to mount it without being root.

Root mounts it. An ordinary user may mount inside a user namespace of its own, where it counts as root: such a test
is run there, in a child (`own_namespace`). A disk that is truly full is not to be had otherwise: a limit on file
sizes or a quota answers with another error than ENOSPC, at another call.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from recess.errors import MissingTool

_PROBE_WAIT_S = 10.0


@contextlib.contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[Path]:
    """Mount an empty file system of that size at `path`, which is made. Raises MissingTool where that is forbidden."""
    path.mkdir(parents=True)
    made = _run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(path)])
    if made.returncode:
        raise MissingTool(f"cannot mount a file system here: {made.stderr.strip()}", hint="see `own_namespace`")
    try:
        yield path
    finally:
        # Lazily: what still holds a file there has its own test failing; the mount point must go all the same.
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def own_namespace(command: Sequence[str]) -> list[str]:
    """Return the command line that runs a command as root of user and mount namespaces of its own."""
    return ["unshare", "--user", "--map-root-user", "--mount", "--", *command]


@functools.cache
def has_namespaces() -> bool:
    """Tell whether this user may make namespaces and mount in them."""
    if shutil.which("unshare") is None:
        return False
    return _run(own_namespace(["mount", "-t", "tmpfs", "tmpfs", "/tmp"])).returncode == 0


@functools.cache
def may_mount() -> bool:
    """Tell whether this very process may mount: root may, unless it is confined."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    return _run(["unshare", "--mount", "--", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]).returncode == 0


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PROBE_WAIT_S, check=False
    )
