"""Bringing a VM to life and to service: restore by the driver, thaw by guestd, ports, main process.

The thaw contract: a machine is served only after `link.thaw` succeeded; anything that goes wrong before ends its VM.
So a fork whose random numbers were not reseeded, or whose clock and name are its parent's, is never reachable.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace

from recess.catalog.machines import MachineRecord
from recess.errors import RecessError
from recess.guestlink.link import Thaw, WakeUp
from recess.machines.contract import RestoreParts
from recess.machines.forward import Forwarder, LinkOf
from recess.machines.identity import guest_env, make_thaw, mark_of, new_token
from recess.machines.incoming import Incoming
from recess.machines.live import Live
from recess.machines.mainjob import MainJob
from recess.machines.outputlog import OutputLog
from recess.machines.parts import NO_PAGES, UNDO, Parts
from recess.machines.records import spec_from_json
from recess.machines.service import Port
from recess.machines.templates import Template
from recess.machines.trust import policy_of, trust

THAW_S = 15.0


@dataclass(frozen=True)
class Origin:
    """What a VM is made from. `parent`: the snapshot whose pages these are ("" for a plain fork of the template)."""

    template: Template
    parts: RestoreParts
    parent: str = ""
    bytes_read: int = 0
    timings_s: Mapping[str, float] = field(default_factory=dict)
    fetched_bytes: int = 0  # what had to come from a remote store first
    cold: bool = False  # booted from the disk that lies in its folder: `parts` holds nothing

    async def settled(self) -> Origin:
        """Return the origin with all its parts read, and what that took."""
        whole = await self.parts.whole()
        read = whole.memory.data.nbytes + whole.disk.data.nbytes
        return replace(self, parts=whole, bytes_read=read, timings_s={**self.timings_s, "read": whole.read_s})


def template_origin(template: Template) -> Origin:
    """Return the origin of a new machine: the template, nothing over it."""
    return Origin(template, RestoreParts(template.ref, NO_PAGES, NO_PAGES, template.vmstate))


def cold_origin(ground: Template) -> Origin:
    """Return the origin of a machine that is booted from the disk in its folder; `ground` is a bare template."""
    return Origin(ground, RestoreParts(None, NO_PAGES, NO_PAGES, b""), cold=True)


class Starter:
    """Starts and re-attaches VMs. `on_exit(machine_id, code)` is told when a main process ended."""

    def __init__(
        self, parts: Parts, incoming: Incoming, link_of: Callable[[str], LinkOf],
        on_exit: Callable[[str, int], Awaitable[None]], doors: MutableMapping[str, Forwarder],
    ) -> None:  # fmt: skip
        self._parts = parts
        self._incoming = incoming
        self._link_of = link_of
        self._on_exit = on_exit
        self._doors = doors

    async def start(self, record: MachineRecord, origin: Origin, *, epoch: int) -> tuple[Live, dict[str, float]]:
        """Restore a VM and thaw it; returns it served but for ports and main process, and what took how long.

        On any error (cancellation too) the VM and its disk are gone.
        """
        spec = spec_from_json(record.spec, f"machine {record.id}")
        directory = self._parts.directory(record.id)
        policy_of(spec)  # before anything costly: raises BadInput
        began = time.monotonic()
        driver = self._parts.driver_of(origin.template.spec.driver)
        # With the thaw: no workload ever reads a token of the machine that its memory was taken from.
        token, thaw = new_token(record.id), self.thaw_maker(record, epoch)
        wake = WakeUp(lambda: replace(thaw(), token=token))
        if origin.cold:
            vm = await driver.boot(record.id, origin.template.spec, directory)
        else:
            parts = replace(origin.parts, wake=wake)
            vm = await driver.restore(record.id, origin.template.spec, parts, directory)
        restored = time.monotonic()
        try:
            live = Live(
                record.id, vm, spec, origin.template, epoch, parent=origin.parent, workload_frozen=True,
                used_s=self._parts.clock.monotonic_s(), answered_s=restored,
            )  # fmt: skip
            live.thaw, live.token_mark = thaw, mark_of(token)
            await self._thaw(live, wake)
        except UNDO as exc:
            if isinstance(exc, RecessError):
                exc.details.setdefault("console", vm.console_tail(2000).decode(errors="replace"))
            await finish(vm.kill())
            raise
        timings = {**origin.timings_s, "restore": restored - began, "thaw": time.monotonic() - restored}
        return live, timings

    def thaw_maker(self, record: MachineRecord, epoch: int) -> Callable[[], Thaw]:
        """Return what makes this machine's thaw messages, each with fresh entropy and generation."""
        spec = spec_from_json(record.spec, f"machine {record.id}")
        env = guest_env(record.id, record.name, record.session, spec)
        return lambda: make_thaw(record.id, record.name, epoch, env, self._parts.clock.wall_s())

    def change_epoch(self, live: Live, record: MachineRecord, epoch: int) -> None:
        """Put a paused VM under a new epoch: its next wake-up tells the guest, the broker knows at once."""
        live.epoch = epoch
        live.thaw = self.thaw_maker(record, epoch)
        live.drift_s = math.inf  # so that the wake-up is a thaw
        self.let_out(live)

    async def _thaw(self, live: Live, wake: WakeUp) -> None:
        # The handler and the policy come first: a workload that wakes up may call out in its first millisecond. One that a
        # thaw with the hello has woken already may, too: its connection waits in the guest until the host listens.
        self.let_out(live)
        if wake.answer is not None:
            await wake.answer(THAW_S)
        else:
            await live.link.thaw(wake.make(), timeout_s=THAW_S)
        if live.spec.secrets and self._parts.egress is not None:
            await trust(live.link, self._parts.egress.certificate(policy_of(live.spec)))
        live.workload_frozen = False

    def let_out(self, live: Live) -> None:
        """Serve the streams that the guest opens, and register it with the broker if it may go out at all."""
        egress = self._parts.egress
        if egress is not None and live.spec.network != "none":
            egress.register(live.id, live.epoch, policy_of(live.spec))
            for service in ("proxy", "socket"):
                self._incoming.set(live.id, service, egress.handler(live.id))
        live.link.serve_incoming(self._incoming.router(live.id))

    async def open_sockets(self, live: Live) -> None:
        """Put the host's sockets into a machine that has just booted; a restored one has them in its memory. Raises BadInput
        (something else is at that path), OutOfSpace, Unsupported (its guestd is too old)."""
        for _, path in live.spec.sockets:
            await live.link.open_door(path)

    async def open_ports(self, live: Live, *, fall_back: bool) -> list[Port]:
        """Listen on the machine's published ports; returns them as they are. Raises Conflict without `fall_back`."""
        live.forwarder = self._doors.pop(live.id, None)
        if live.forwarder is not None:
            return list(live.forwarder.ports)  # they stayed open while it slept
        live.forwarder = Forwarder(self._link_of(live.id))
        return await live.forwarder.start(live.spec.ports, fall_back=fall_back)

    def _main(self, live: Live) -> MainJob:
        async def ended(code: int) -> None:
            await self._on_exit(live.id, code)

        return MainJob(OutputLog(self._parts.directory(live.id)), ended, self._parts.clock.wall_s)

    async def start_main(self, live: Live) -> None:
        """Start the main process, if the spec has one. Raises NotFound (no such command), GuestFailed."""
        if live.spec.argv:
            live.main, live.main_since = self._main(live), self._parts.clock.monotonic_s()
            await live.main.start(live.link, live.spec)

    async def attach_main(self, live: Live, skip: Mapping[int, int] | None = None) -> None:
        """Find the main process again after a restore; `skip` as in MainJob.attach (None: nothing is logged yet)."""
        if live.spec.argv:
            live.main, live.main_since = self._main(live), self._parts.clock.monotonic_s()
            if not await live.main.attach(live.link, skip or {1: 0, 2: 0}):
                live.main = None

    def logged(self, machine_id: str) -> dict[int, int]:
        """Return how many bytes of each stream the machine's log holds."""
        return OutputLog(self._parts.directory(machine_id)).totals

    async def forget_files(self, machine_id: str) -> None:
        """Remove the machine's folder."""
        await asyncio.to_thread(shutil.rmtree, self._parts.directory(machine_id), ignore_errors=True)


async def finish(work: Awaitable[None]) -> None:
    """Run clean-up to its end even if the caller is cancelled meanwhile, and only then pass the cancellation on: Ctrl-C
    at any moment leaves nothing behind."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as exc:
            cancelled = exc
        except Exception:
            break  # the work's own failure: raised below
    if cancelled is not None and not task.cancelled():
        task.exception()  # looked at: the cancellation matters more
        raise cancelled
    task.result()
