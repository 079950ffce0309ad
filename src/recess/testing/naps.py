"""A real machine that is put away and brought back again and again, with work in between: does it stay as it was?

After each nap the guest's own sums must hold. Now and then, while it is frozen, all of its memory is taken out of the VMM
(QEMU's `pmemsave`) and held against what the snapshot unpacks to. What is kept by the store must stay bounded, and so must
the time a restore takes: that of the last nap's snapshot beside that of the first, in turn, so that both meet the same load.
Used in a short form by `tests/machines`, in full by `tools/naps.py`.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from blake3 import blake3

from recess.guestlink.link import ExecRequest
from recess.machines.mapped import MEMORY
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from recess.snapshots.contract import SnapshotStore
from recess.units import MIB

NAP = MachineSpec(memory_bytes=256 * MIB, disk_bytes=1024 * MIB)
_NONCE = "/dev/shm/nonce"
_BEGIN = f"head -c 4000000 /dev/urandom > /dev/shm/work; head -c 16 /dev/urandom | sha256sum | cut -c1-32 > {_NONCE}"
_SUMS = f"cat {_NONCE} /dev/shm/work /root/log | sha256sum"
_FIRST, _LAST = "napper:first", "napper:last"


@dataclass
class Naps:
    """What was seen. `resumes_s`: of each nap; `first_s`, `last_s`: restores of the first and of the last snapshot;
    `stored_bytes`, `layers`: of the store and of the newest snapshot, after each nap; `compared`: the cycles at which the
    whole memory was."""

    resumes_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    last_s: list[float] = field(default_factory=list)
    stored_bytes: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)

    @property
    def slower(self) -> float:
        """How much longer a restore of the last snapshot took than one of the first, by medians."""
        return median(self.last_s) / median(self.first_s)

    @property
    def growth(self) -> float:
        """How many times as much the store held at most in the second half as in the first."""
        half = len(self.stored_bytes) // 2
        return max(self.stored_bytes[half:]) / max(self.stored_bytes[:half])


async def take_naps(node: LocalNode, cycles: int, *, compare_every: int, restores: int) -> Naps:
    """Let one machine nap this often, then restore the first and the last snapshot this often each; the node's policy must
    keep one unnamed snapshot. Raises AssertionError."""
    machines, naps = node.machines, Naps()
    row = await machines.create(NAP, name="napper")
    await _shell(node, row.id, _BEGIN)
    for cycle in range(1, cycles + 1):
        await _shell(node, row.id, _work(cycle))
        sums = await _shell(node, row.id, _SUMS)
        snapshot = await machines.snapshot(row.id, why="suspend", resume=False)
        if cycle % compare_every == 0:
            await _compare_memory(node, row.id, snapshot.id)
            naps.compared.append(cycle)
        if cycle == 1:
            await machines.keeping.tag(snapshot.id, _FIRST)
        await machines.evict(row.id, snapshot=snapshot.id)
        await machines.keeping.prune()
        await machines.collect(grace_s=0.0)
        naps.stored_bytes.append(await asyncio.to_thread(_store(node).used_bytes))
        naps.layers.append(len(_store(node).manifest(snapshot.id)["layers"]))
        naps.resumes_s.append((await machines.resume(row.id)).seconds)
        found = await _shell(node, row.id, _SUMS)
        assert found == sums, f"after nap {cycle} the guest's sums are {found}, not {sums}"
    await machines.snapshot(row.id, name=_LAST)
    await machines.remove(row.id, force=True)
    for _ in range(restores):
        for name, seconds in ((_FIRST, naps.first_s), (_LAST, naps.last_s)):
            child, report = await machines.restore(name, name="again")
            seconds.append(report.seconds)
            await machines.remove(child.id, force=True)
    return naps


def _store(node: LocalNode) -> SnapshotStore:
    return node.machines._parts.store


def _work(cycle: int) -> str:
    """Change a twentieth of the work, and a file on the disk."""
    place = cycle * 7 % 40
    return (
        f"dd if=/dev/urandom of=/dev/shm/work bs=100k seek={place} count=2 conv=notrunc 2>/dev/null; "
        f"echo nap {cycle} >> /root/log"
    )


async def _shell(node: LocalNode, machine_id: str, script: str) -> str:
    job = await (await node.machines.link(machine_id)).exec(ExecRequest(argv=["sh", "-c", script], cwd="/root"))
    out = b"".join([data async for _, data in job.output()])
    assert await job.wait() == 0, out
    return out.decode().strip()


async def _compare_memory(node: LocalNode, machine_id: str, snapshot_id: str) -> None:
    """Hold all memory of a machine that stands still against its snapshot. Raises AssertionError."""
    live = node.machines.fleet.need(machine_id)
    with tempfile.TemporaryDirectory(dir=node.config.home) as folder:
        dump, unpacked = Path(folder, "dump"), Path(folder, "unpacked")
        vm: Any = live.vm  # QEMU's: no driver promises a dump
        saved = {"val": 0, "size": NAP.memory_bytes, "filename": str(dump)}
        await vm._handles.qmp.execute("pmemsave", saved, timeout_s=120.0)
        await asyncio.to_thread(
            _store(node).materialise, snapshot_id, MEMORY, unpacked, template=live.template.pages,
            sources=live.template.sources,
        )  # fmt: skip
        sums = [await asyncio.to_thread(_hash, path) for path in (dump, unpacked)]
        assert sums[0] == sums[1], f"snapshot {snapshot_id[:16]} is not the memory that the machine has"


def _hash(path: Path) -> str:
    hasher = blake3()
    with path.open("rb") as file:
        while piece := file.read(4 * MIB):
            hasher.update(piece)
    return hasher.hexdigest()
