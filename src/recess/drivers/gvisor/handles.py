"""What the driver holds of one running machine, and the moves that more than one of its procedures need."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from recess.drivers.gvisor import journal as paths
from recess.drivers.gvisor import runsc as runsc_cli
from recess.drivers.gvisor.bundle import INIT
from recess.drivers.gvisor.journal import Journal, read_journal
from recess.drivers.gvisor.pages import Known, Pages
from recess.drivers.gvisor.port import Port, StartRelay
from recess.drivers.gvisor.runsc import CONTAINER, Runsc
from recess.drivers.kept.cgroup import clear
from recess.drivers.kept.keeper import Keeper, Process, end_vm, read_pids, wait_gone
from recess.drivers.kept.layout import Layout
from recess.drivers.kept.steps import in_thread, unless_dead
from recess.errors import DriverFailed
from recess.machines.contract import Fingerprint
from recess.units import PAGE_BYTES

_END_S = 5.0
_RELAY = "/run/recess/guestd"


@dataclass
class Handles:
    """One machine: where its files are, how to talk to its keeper, its runtime and its guestd."""

    layout: Layout
    journal: Journal
    runsc: Runsc
    fingerprint: Fingerprint
    keeper: Keeper
    port: Port
    family: Sequence[Process]
    known: Known = field(default_factory=Known)
    timings_s: dict[str, float] = field(default_factory=dict)

    @property
    def pages_total(self) -> int:
        """How many pages the machine's memory has."""
        return self.journal.spec.memory_bytes // PAGE_BYTES

    def status(self) -> str:
        """Return what runsc has noted."""
        return runsc_cli.status(paths.state(self.layout))

    async def command(self, *words: str) -> None:
        """Run a command on the machine; one that died meanwhile is the error. Raises DriverFailed, Timeout."""
        verb, *rest = words
        work = runsc_cli.call(self.runsc, paths.state(self.layout), verb, *rest, CONTAINER)
        await unless_dead(self.keeper, verb, work)


def relay_starter(runsc: Runsc, layout: Layout) -> StartRelay:
    """Return what starts a relay in this machine."""

    async def start(end: socket.socket) -> asyncio.subprocess.Process:
        # A machine that has just been started may not have moved guestd into its memory yet; a restored one has it there
        # only.
        program = f"{INIT}/guestd" if (paths.init(layout) / "guestd").exists() else _RELAY
        argv = runsc.argv(paths.state(layout), "exec", CONTAINER, program, "--relay")
        return await asyncio.create_subprocess_exec(
            *argv, stdin=end.fileno(), stdout=end.fileno(), stderr=asyncio.subprocess.DEVNULL, start_new_session=True
        )

    return start


def map_ram(path: str) -> Pages | None:
    """Return a template's memory, read-only, None for none. Raises DriverFailed when its file is gone."""
    if not path:
        return None
    try:
        return np.memmap(path, np.uint8, "r").reshape(-1, PAGE_BYTES)
    except (OSError, ValueError) as exc:
        raise DriverFailed(f"the template's memory is gone: {exc}", log="") from exc


async def end_machine(
    layout: Layout, keeper: Keeper | None, family: Sequence[Process] = (), journal: Journal | None = None
) -> None:
    """End keeper, runtime, machine and gofer, whichever still lives, and remove the run folder and the control group. Never
    fails.

    `family` and `journal`: as they were known before; of one that has died by itself the run folder is gone.
    """
    family = [*family, *processes(layout)]
    journal = journal or read_journal(layout)
    await end_vm(layout, keeper)
    for process in family:  # the kernel ends them with runsc, a moment later; should it not, we do
        if process.alive() and not await wait_gone(process.pid, _END_S):
            process.kill()
            await wait_gone(process.pid, _END_S)
    layout.remove_run()  # runsc may have written into it while it died
    if journal is not None and journal.group:
        # Those that run what is inside are nobody's children here, and take their time to end when they had much memory.
        await in_thread(clear, Path(journal.group), _END_S)


def processes(layout: Layout) -> list[Process]:
    """Return the processes of this machine: everything below its keeper, keeper included, while it lives."""
    known = read_pids(layout)
    found: dict[int, Process] = {}
    pids = [process.pid for process in known.values()]
    while pids:
        pid = pids.pop()
        if pid in found:
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            found[pid] = Process(pid, int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]))
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                pids += [int(child) for child in task.read_text().split()]
    return list(found.values())
