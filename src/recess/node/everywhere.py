"""Machines as people see them, wherever they are: VMs, and the plain processes of agents with `backend="process"`.

What both can do is asked here: list, show, reach (exec, files), output, pause, end, remove. Everything else is a VM's and is asked of
the manager, which does not know the plain ones. It must not decide how either does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from recess.errors import Unsupported
from recess.guestlink.link import GuestLink
from recess.machines.loglines import Wanted, select
from recess.machines.outputlog import Said
from recess.machines.service import MachineRow

if TYPE_CHECKING:
    from recess.node.local import LocalNode
    from recess.plain import PlainMachines


def plain_of(node: LocalNode, ref: str) -> tuple[PlainMachines, str] | None:
    """Return the plain machines and the id that `ref` means among them, None if it means none."""
    plain = node.plain
    found = plain.resolve(ref) if plain is not None else ""
    return (plain, found) if plain is not None and found else None


async def list_machines(node: LocalNode, *, everything: bool) -> list[MachineRow]:
    """Return all, newest first within each kind: VMs, then plain ones."""
    plain = await node.plain.list_machines(everything=everything) if node.plain is not None else []
    return [*await node.machines.list_machines(everything=everything), *plain]


async def get_machine(node: LocalNode, ref: str) -> MachineRow:
    """Return one. Raises NotFound."""
    found = plain_of(node, ref)
    return await (found[0].get(found[1]) if found else node.machines.get(ref))


@asynccontextmanager
async def reach(
    node: LocalNode, ref: str, why: str, *, wake: bool = True
) -> AsyncIterator[tuple[MachineRow, GuestLink]]:
    """A machine's row and link: it is neither frozen nor put away meanwhile. `wake`: one that sleeps because nobody used it is
    woken. Raises NotFound, IllegalState."""
    row = await get_machine(node, ref)
    with node.sessions.activity(row.session, why):
        found = plain_of(node, row.id)
        if found is not None:
            yield row, await found[0].link(row.id)
            return
        async with node.machines.idling.using(row.id, wake=wake) as link:
            yield row, link


async def output_of(node: LocalNode, ref: str, wanted: Wanted) -> Said:
    """Return what the main process said; of a plain machine, its agent's newest process. Raises Unsupported (a plain machine's
    output is kept without times)."""
    found = plain_of(node, ref)
    if found is not None and wanted.needs_times:
        raise Unsupported("a plain process's output is kept without times", hint="recess logs -n 20")
    said = await (found[0].output(found[1]) if found else node.machines.output(ref))
    return await asyncio.to_thread(select, said, wanted)


async def remove(node: LocalNode, ref: str, *, force: bool) -> str:
    """Forget one; see `Machines.remove`."""
    found = plain_of(node, ref)
    return await (found[0].remove(found[1], force=force) if found else node.machines.remove(ref, force=force))


async def act_on_plain(node: LocalNode, ref: str, verb: str) -> MachineRow | None:
    """Do one of stop, kill, pause, unpause to a plain machine and return it; None if `ref` is none. Raises Unsupported."""
    found = plain_of(node, ref)
    if found is None:
        return None
    plain, ident = found
    match verb:
        case "stop":
            await plain.stop(ident)
        case "kill":
            await plain.kill(ident, why="killed by the user")
        case "pause":
            await plain.pause(ident)
        case "unpause":
            await plain.unpause(ident)
        case _:
            raise Unsupported(f"a plain process cannot {verb}", hint="its session can be forked, suspended, rewound")
    return await plain.get(ident)
