"""A machine and its pager, each watched by its pidfd: neither outlives the other while pages are absent.

The keeper ends the machine with the pager: its pidfd, and a pipe on which the pager says when it is done. The pager ends
with the machine: it watches the VMM's pidfd. A pidfd is one process for ever, and nobody can hold it open in another's place.
Knows nothing of who takes the memory from whom: a userfaultfd comes in.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from recess.drivers.kept.keeper import Keeper
from recess.machines.contract import LazyMemory


async def serve_watched(
    keeper: Keeper,
    lazy: LazyMemory,
    uffd: int,
    vmm: int,
    segments: Sequence[tuple[int, int, int]],
    *,
    whole: bool = False,
) -> None:
    """Have the pager answer for this memory; returns when it does. `uffd` and `vmm`, a pidfd, stay the caller's.

    First the guard, then the pager: from the moment it could fail somebody looks. Raises DriverFailed, Timeout; the VM must
    then be ended.
    """
    watched, pipe = os.pipe()
    try:
        await keeper.guard(watched, lazy.process())
        await lazy.serve(uffd, pipe, vmm, segments, whole=whole)
    finally:
        os.close(watched)
        os.close(pipe)
