"""Signs of a machine that has come to its end during a tool call: memory used up, disk full. They become part of the output, so
that the model knows why a build was killed. It must know nothing of tools.
"""

from __future__ import annotations

import errno
from pathlib import Path

VMSTAT = "/proc/vmstat"
IN_MACHINE = "/run/recess"  # guestd's folder: elsewhere the kernel's counters are of a whole host and say nothing of us
DISK_FULL = " (the disk of this machine is full: remove something before you go on)"


def oom_kills() -> int:
    """Return how many processes this machine's kernel has ended for want of memory, 0 where that cannot be told."""
    if not Path(IN_MACHINE).is_dir():
        return 0
    try:
        with open(VMSTAT, encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    except (OSError, ValueError, IndexError):
        return 0


class Watch:
    """What happens from here on."""

    def __init__(self) -> None:
        self._before = oom_kills()

    def told(self) -> str:
        """Return what is to be said of it, "" for nothing."""
        killed = oom_kills() - self._before
        if killed <= 0:
            return ""
        what = "a process" if killed == 1 else f"{killed} processes"
        return f"\n[recess] this machine ran out of memory during the call: its kernel ended {what}"


def disk_full(error: BaseException) -> str:
    """Return what is to be said beside an error that means a full disk, "" for any other."""
    return DISK_FULL if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
