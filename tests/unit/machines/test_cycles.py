"""Two hundred naps with work in between: what is stored and what a restore has to open stay bounded."""

import random
from dataclasses import replace

import pytest

from recess.drivers.fake.pages import POKE_FIRST
from recess.snapshots.rewrite import FILES_MAX, LIVE_FRACTION_LATE, LIVE_FRACTION_MIN
from recess.snapshots.writer import PACKS_MAX
from recess.testing.machine_room import SMALL
from recess.units import MIB

CYCLES = 200
WINDOW = 400  # pages that the work is about
PER_CYCLE = 12


@pytest.mark.timeout(240)
async def test_the_two_hundredth_snapshot_is_as_small_and_as_flat_as_the_tenth(room):
    object.__setattr__(room.parts, "keeping", replace(room.parts.keeping, keep_last=1, retention_s=0.0))
    row = await room.manager.create(replace(SMALL, memory_bytes=256 * MIB), name="nap")
    rng, pages = random.Random(7), {}
    for number in range(WINDOW):
        pages[POKE_FIRST + number] = rng.randbytes(4096)
    sizes, most_files = [], 0
    least = {"layers": LIVE_FRACTION_LATE, "pagemaps": LIVE_FRACTION_MIN}
    for cycle in range(1, CYCLES + 1):
        for _ in range(PER_CYCLE):
            pages[POKE_FIRST + rng.randrange(WINDOW)] = rng.randbytes(4096)
        vm = room.host.vms[row.id]
        for number, data in pages.items():
            vm.poke(number, data)
        snapshot = await room.manager.suspend("nap")
        manifest = room.parts.store.manifest(snapshot.id)
        for kind, most in (
            ("layers", FILES_MAX + 1),
            ("pagemaps", PACKS_MAX),
        ):  # a sweep of all forgets what was joined
            assert len(manifest[kind]) <= most
            for file in manifest[kind]:
                assert file["live"] >= least[kind] * file["entries"]
        room.parts.store.settle()  # a machine sleeps longer than that
        most_files = max(most_files, len(manifest["layers"]))
        await room.manager.keeping.prune()
        if cycle % 20 == 0:
            await room.manager.collect(grace_s=-3600.0)
            await room.manager.verify_snapshot(snapshot.id)
            sizes.append(room.parts.store.used_bytes())
        await room.manager.resume("nap")
        if cycle % 20 == 0:
            assert room.host.vms[row.id].poked == pages  # every byte, through layers written at any time before
    whole = WINDOW * 4096  # random bytes do not compress
    template = room.parts.store.shapes([snapshot.template])[snapshot.template]
    assert most_files > 2  # it did refer to older layers, else there was nothing to bound
    assert max(sizes) <= whole / LIVE_FRACTION_MIN + sum(template.files.values()) + 200_000
    assert max(sizes[5:]) <= 1.2 * max(sizes[:5])
