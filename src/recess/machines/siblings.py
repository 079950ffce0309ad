"""Machines that reach each other by name: which machine a name means to another one, and a connection to its port.

A project is the label `project`; machines without the label are one project, too. Nothing crosses its border, and what is
beyond it looks like what is not there. Whether a machine may call at all was decided before: this is the broker's other
side. A machine that sleeps because nobody used it is woken, as by a client of a published port, and a connection keeps it
awake. It must know nothing of rules.
"""

from __future__ import annotations

import asyncio

from recess.catalog.machines import DEAD, MachineRecord
from recess.errors import IllegalState, RecessError, Unavailable
from recess.machines.fleet import Fleet
from recess.machines.identity import hostname_of
from recess.machines.parts import Parts
from recess.machines.records import is_sound, spec_from_json

PROJECT = "project"  # the label that says which project a machine belongs to, as it does of a session


def project_of(record: MachineRecord) -> str:
    """Return the machine's project, "" for none."""
    return spec_from_json(record.spec, f"machine {record.id}").labels.get(PROJECT, "")


class Siblings:
    """Fulfils `recess.broker.Siblings` for the machines of this node."""

    def __init__(self, parts: Parts, fleet: Fleet) -> None:
        self._parts = parts
        self._fleet = fleet

    async def connect(self, machine_id: str, name: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """See `recess.broker.Siblings`."""
        caller = await self._parts.catalog.machines.find(machine_id)
        if caller is None:
            raise Unavailable("this machine is gone")
        target = await self._find(project_of(caller), name)
        try:
            await self._fleet.link_of(target.id)()  # wakes it if it sleeps
            live = self._fleet.need(target.id)
            if live.forwarder is None:
                raise IllegalState("it is on its way")
            return await live.forwarder.open(port)
        except (RecessError, OSError) as exc:
            why = exc.message if isinstance(exc, RecessError) else str(exc)
            raise Unavailable(f"machine {target.name} does not answer on port {port}: {why}") from exc

    async def _find(self, project: str, name: str) -> MachineRecord:
        """Return the machine of a project that goes by this name; names that no host name can be go by the nearest one."""
        rows, _ = await self._parts.catalog.machines.survey()
        found = [
            row
            for row in rows
            if name in (row.name, hostname_of(row.name)) and row.state != DEAD and is_sound(row)
            and project_of(row) == project and spec_from_json(row.spec, row.id).network != "none"
        ]  # fmt: skip
        exact = [row for row in found if row.name == name] or found
        if len(exact) == 1:
            return exact[0]
        where = f"project {project}" if project else "no project"
        count = "several machines go" if exact else "no machine goes"
        raise Unavailable(
            f"{count} by the name {name} in {where}",
            hint=f"recess ps --filter label={PROJECT}={project}" if project else "recess ps",
        )
