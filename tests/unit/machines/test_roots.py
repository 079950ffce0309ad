"""Which root images are needed: by templates, machines, and snapshots that stand on no template; in doubt, all."""

from __future__ import annotations

import pytest

from recess.errors import Corrupt
from recess.machines.roots import roots_in_use, roots_of
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
