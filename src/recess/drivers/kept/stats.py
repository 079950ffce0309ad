"""What processes take of the host, as /proc tells. It must know no VMM and no keeper."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from recess.drivers.kept.keeper import Process
from recess.machines.contract import VmStats

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def process_stats(processes: Iterable[Process]) -> VmStats:
    """Return what these processes use together; those that are gone count nothing."""
    pss = private = 0
    cpu_s = 0.0
    for process in processes:
        with contextlib.suppress(OSError):
            if not process.alive():
                continue
            sizes = parse_smaps(Path(f"/proc/{process.pid}/smaps_rollup").read_text())
            pss += sizes.get("Pss", 0)
            private += sizes.get("Private_Clean", 0) + sizes.get("Private_Dirty", 0)
            fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            cpu_s += (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return VmStats(pss_bytes=pss, cpu_s=cpu_s, private_bytes=private)


def parse_smaps(text: str) -> dict[str, int]:
    """Return the sizes of /proc/PID/smaps_rollup in bytes, by name."""
    words = (line.split() for line in text.splitlines())
    return {w[0].rstrip(":"): int(w[1]) * 1024 for w in words if len(w) == 3 and w[2] == "kB"}
