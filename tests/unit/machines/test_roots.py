"""Which root images are needed: by templates, machines, and snapshots that stand on no template; in doubt, all."""

from __future__ import annotations

import pytest

from recess.errors import Corrupt, HasDependents
from recess.machines.roots import release_root, roots_in_use, roots_of
from recess.testing.machine_room import SMALL


def test_roots_of_what_names_them():
    assert roots_of([{"vm": {"root": "a"}}, {"vm": None}, {}, {"vm": {"root": ""}}, {"vm": {"root": "b"}}]) == {
        "a",
        "b",
    }


async def test_templates_machines_and_snapshots_without_a_template_need_theirs(room):
    row = await room.manager.create(SMALL, name="m1")
    root = row.meta["vm"]["root"]
    (template,) = await room.parts.catalog.templates.list_all()
    await room.parts.catalog.templates.delete(template.id)
    assert await roots_in_use(room.parts) == {root}
    await room.manager.kill("m1", why="test")
    await room.manager.bring_back(row.id)
    snap = await room.manager.suspend("m1")
    assert snap.template == ""
    await room.manager.remove("m1")
    assert await roots_in_use(room.parts) == {root}
    await room.manager.remove_snapshot(snap.id)
    assert await roots_in_use(room.parts) == set()


@pytest.mark.parametrize("table", ["catalog_machine", "catalog_template"])
async def test_a_row_that_cannot_be_read_may_need_any(room, table):
    await room.manager.create(SMALL, name="m1")
    await room.parts.catalog.db.write(lambda tx: tx.execute(f"UPDATE {table} SET meta = '{{'"))
    with pytest.raises(Corrupt):
        await roots_in_use(room.parts)


async def test_a_template_that_nothing_stands_on_keeps_no_root(room):
    row = await room.manager.create(SMALL, name="m1")
    root = row.meta["vm"]["root"]
    snap = await room.manager.snapshot("m1")
    await room.manager.remove("m1", force=True)
    await release_root(room.parts, SMALL.image, root)
    assert await roots_in_use(room.parts) == {root}  # the snapshot stands on the template
    await room.manager.remove_snapshot(snap.id)
    await release_root(room.parts, SMALL.image, "")  # another name has the root, too
    await release_root(room.parts, SMALL.image, "another root")
    assert await roots_in_use(room.parts) == {root}
    await release_root(room.parts, SMALL.image, root)
    assert await roots_in_use(room.parts) == set()
    assert (await room.manager.create(SMALL, name="m2")).state == "running"  # by a template made anew


async def test_a_machine_that_waits_for_its_first_start_needs_its_image_by_name(room):
    await room.manager.acts.prepare(SMALL, name="later")
    with pytest.raises(HasDependents, match="later"):
        await release_root(room.parts, SMALL.image, "")
    await release_root(room.parts, "another", "")
