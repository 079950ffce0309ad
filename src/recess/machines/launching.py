"""From a row to a served machine: claim a name, start the VM, open its ports, start or find its main process.

The row comes first (state "creating", which claims the name) and says "running" last, so that a crash in between
leaves something that the next start recognises and cleans up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from recess.catalog.machines import MachineRecord
from recess.catalog.once import Once
from recess.crashpoints import crash_point
from recess.errors import NameInUse, NotFound
from recess.ids import new_id
from recess.machines import keptdisk
from recess.machines.fleet import Fleet
from recess.machines.identity import new_name
from recess.machines.live import Live
from recess.machines.parts import UNDO, Parts
from recess.machines.records import spec_to_json
from recess.machines.service import Changes, MachineSpec
from recess.machines.starting import Origin, finish
from recess.machines.states import CREATING, RUNNING
from recess.machines.templates import vm_json

_NAME_TRIES = 8
BEFORE = "it was made from a machine of that driver"


def child_spec(spec: MachineSpec, changes: Changes | None = None) -> MachineSpec:
    """Return the spec of a new machine made from an older one: published ports move to free host ports; a Unix socket of
    the host stays the parent's, as there is no other one to move to."""
    changes = changes or Changes()
    ports = tuple((ip, 0, guest) for ip, _, guest in spec.ports if not ip.startswith("/"))
    moved = ports if changes.ports is None else changes.ports
    held = tuple(replace(mount, held=True) for mount in spec.volumes)  # the parent's: a child's copy is its own
    return replace(
        spec, ports=moved, env={**spec.env, **changes.env}, labels={**spec.labels, **changes.labels}, volumes=held
    )


CARD_CUT = "connections of its network card from before are gone"
CARD_NOTE = (
    "a network card of its own, past the broker: no rules, no journal, not fenced by a lost lease; "
    "its connections end at a suspend, restore, rewind and in a fork"
)


class Launcher:
    """Starts machines that have a row."""

    def __init__(self, parts: Parts, fleet: Fleet) -> None:
        self._parts = parts
        self._fleet = fleet

    async def claim(
        self, spec: MachineSpec, *, name: str, session: str, driver: str = "", driver_why: str = BEFORE,
        template: str = "", meta: Mapping[str, Any] | None = None, state: str = CREATING, once: Once | None = None,
    ) -> MachineRecord:  # fmt: skip
        """Insert a row in state "creating" (or `state`), with the key of the call. Raises NameInUse, BadInput, KeyReused;
        without a name one is made up."""
        record = MachineRecord(
            id=new_id("mch"), name=name or new_name(), state=state, spec=spec_to_json(spec),
            driver=driver or self._parts.driver.name, created=self._parts.clock.wall_s(), template=template,
            session=session, meta={"driver_why": driver_why} | dict(meta or {}),
        )  # fmt: skip
        for last in (n == _NAME_TRIES - 1 for n in range(_NAME_TRIES)):
            try:
                record = await self._parts.catalog.machines.insert(record, once)
                self._parts.tell("create", record.id, record.name, image=spec.image)
                return record
            except asyncio.CancelledError:
                await self.abandon(record)  # it may have been inserted all the same
                raise
            except NameInUse:
                if name or last:
                    raise
                record = replace(record, name=new_name())
        raise AssertionError("unreachable")

    async def abandon(self, record: MachineRecord) -> None:
        """Forget a claimed machine that was never started, and give its call's key back: it may be tried again."""
        await finish(self._forget(record.id))

    async def _forget(self, machine_id: str) -> None:
        await self._parts.catalog.once.release(machine_id)
        await self._fleet.forget(machine_id)

    async def launch(
        self,
        record: MachineRecord,
        origin: Origin,
        *,
        epoch: int,
        fresh: bool = False,
        skip: Mapping[int, int] | None = None,
        status: str = "",
        strict_ports: bool = False,
        note: Mapping[str, Any] | None = None,
    ) -> tuple[MachineRecord, Live, dict[str, float]]:
        """Start the VM of a row and serve it; returns the row in state "running".

        `fresh`: a new machine, whose main process is started, as it is after a cold boot; else it is looked for
        (`skip`: output that is logged already). The disk that an earlier VM left goes once the row says "running". `note` goes into the row's meta. `strict_ports`: a host port that is taken is a
        Conflict, as it is for a fresh machine; else another one is found. On any error, cancellation too, no VM is left; the row is the
        caller's.
        """
        live, timings = await self._fleet.starter.start(record, origin, epoch=epoch)
        try:
            ports = await self._fleet.starter.open_ports(live, fall_back=not (fresh or strict_ports))
            crash_point("machines.started")
            self._fleet.admit(live)
            meta = {**record.meta, "epoch": epoch, "parent": origin.parent, "ports": [list(p) for p in ports]}
            meta.pop("napping", None)
            meta["token"] = live.token_mark
            meta |= {"vm": vm_json(origin.template.spec)} | dict(note or {})  # what a cold boot needs of it
            if live.spec.network == "full":
                meta["network"] = CARD_NOTE
            if fresh:
                said = await self._fleet.mounting.lay(live, record)
                status = "; ".join(word for word in (status, said) if word)
            else:
                said = await self._fleet.mounting.meet(live, record, cold=origin.cold)
                cut = CARD_CUT if live.spec.network == "full" and not origin.cold else ""
                status = "; ".join(word for word in (status, said, cut) if word)
            if fresh or origin.cold:
                await self._fleet.starter.open_sockets(live)
                await self._fleet.starter.start_main(live)
            record = await self._parts.catalog.machines.update(
                record.id, state=RUNNING, exit_code=None, status=status, template=origin.template.id, meta=meta,
                driver=origin.template.spec.driver or self._parts.driver.name,
            )  # fmt: skip
            crash_point("machines.running")
            keptdisk.drop(self._parts.directory(record.id))
            self._parts.tell("start", record.id, record.name, status=status)
            if not fresh and not origin.cold:
                await self._fleet.starter.attach_main(live, skip)
        except UNDO:
            await finish(self._undo(live))
            raise
        return record, live, timings

    async def _undo(self, live: Live) -> None:
        if self._fleet.find(live.id) is live:
            await self._fleet.end(live.id, "its start failed")
            return
        await live.let_go()
        with contextlib.suppress(NotFound):
            await live.vm.kill()
