"""What a running VM with a keeper can do whichever VMM it runs under. It must know no VMM: a driver adds its own moves."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from recess.drivers.kept.keeper import Keeper, Process
from recess.drivers.kept.layout import Layout
from recess.drivers.kept.stats import process_stats
from recess.drivers.kept.steps import in_thread
from recess.errors import DriverFailed, IllegalState
from recess.guestlink.link import GuestLink
from recess.machines.contract import TemplateRef, VmStats
from recess.units import GIB

_ZEROED_BYTES = 4 * GIB


def hello_timeout_s(timeout_s: float, memory_bytes: int) -> float:
    """Return how long a VM of this size has until guestd's hello, if a small one has `timeout_s`: its kernel zeroes all of
    its memory at the start (`init_on_free`), which in software, on a busy host, takes some ten seconds a GiB. Pure."""
    return timeout_s * (1 + memory_bytes / _ZEROED_BYTES)


class LinkHolder(Protocol):
    """Where the guest channel is, while there is one."""

    @property
    def link(self) -> GuestLink:
        """The channel. Raises DriverFailed while there is none."""


class Born(Protocol):
    """What of a driver's journal matters here."""

    @property
    def for_template(self) -> bool:
        """Whether it was booted to become a template."""


class Held(Protocol):
    """What of a driver's handles matters here."""

    @property
    def layout(self) -> Layout:
        """Where its files are."""

    @property
    def journal(self) -> Born:
        """What it was started as."""

    @property
    def port(self) -> LinkHolder:
        """How its guest is reached."""

    @property
    def keeper(self) -> Keeper:
        """Its keeper."""

    @property
    def timings_s(self) -> dict[str, float]:
        """Seconds of each step of its start."""


H = TypeVar("H", bound=Held)


class KeptVm(ABC, Generic[H]):
    """A running VM; see `recess.machines.contract.Vm`, of which a driver writes the rest. Moves that change its state take
    turns (`_turn`); `kill` waits for nobody. `timings_s` says what its start took, step by step."""

    def __init__(self, handles: H) -> None:
        self.id = handles.layout.run.name
        self.timings_s = handles.timings_s
        self._handles = handles
        self._turn = asyncio.Lock()
        self._ending: asyncio.Task[None] | None = None

    @abstractmethod
    async def _end(self) -> None:
        """End the VM and remove what belongs to it. Never fails."""

    @abstractmethod
    async def _export(self, directory: Path) -> TemplateRef:
        """Leave a template's files; the VM is ended afterwards."""

    @abstractmethod
    def _processes(self) -> Iterable[Process]:
        """All processes that it costs, the keeper's included. Reads files."""

    async def _remove_disks(self) -> None:
        """Remove its disks. In a thread: a large file takes its time, and nobody else is to wait for it. Never fails."""
        with contextlib.suppress(OSError):
            await in_thread(self._handles.layout.remove_disks)

    @property
    def link(self) -> GuestLink:
        """The guest channel. Raises DriverFailed while there is none (a paused VM that was just adopted)."""
        return self._handles.port.link

    async def export_template(self, directory: Path) -> TemplateRef:
        """End this VM and leave a template's files. Raises IllegalState, DriverFailed, OutOfSpace."""
        if not self._handles.journal.for_template:
            raise IllegalState(f"VM {self.id} was not booted to become a template")
        async with self._turn:
            ref = await self._export(directory)
        await self.kill()
        return ref

    async def kill(self) -> None:
        """End it and remove what belongs to it, except the console. Never fails; goes on if the caller is cancelled."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())
        await asyncio.shield(self._ending)

    async def stalled(self) -> str:
        """Never, unless a driver knows better: no write of the guest waits for the host's disk."""
        return ""

    async def wait_stalled(self) -> str:
        """Never return but with the VM's end, as DriverFailed."""
        end = await asyncio.shield(self._handles.keeper.death)
        raise DriverFailed(f"VM {self.id} is gone: {end.line()}", log=end.log)

    async def go_on(self) -> None:
        """Nothing is ever pending."""

    async def wait_dead(self) -> str:
        """Return when the VM is gone, with the reason."""
        return (await asyncio.shield(self._handles.keeper.death)).line()

    async def set_deadline(self, seconds: float | None) -> None:
        """Have the keeper kill the VM then, whatever becomes of this process."""
        await self._handles.keeper.deadline(seconds)

    def console_tail(self, limit: int = 65536) -> bytes:
        """Return the last bytes of the console, also of a VM that is gone."""
        return self._handles.layout.console_tail(limit)

    async def stats(self) -> VmStats:
        """Return current numbers of all its processes together; zeros once they are gone."""
        return await asyncio.to_thread(lambda: process_stats(self._processes()))
