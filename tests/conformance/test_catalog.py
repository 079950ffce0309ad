"""The catalog's tables: names, refs, updates in one transaction, rows that are damaged."""

import asyncio

import pytest

from recess.catalog import (
    SCHEMA,
    Catalog,
    MachineRecord,
    NodeRecord,
    SnapshotRecord,
    TemplateRecord,
    TokenRecord,
    agent_version,
)
from recess.catalog import machines as machine_rows
from recess.catalog import snapshots as snapshot_rows
from recess.db import Database, RoomSchema
from recess.errors import BadInput, Conflict, Corrupt, IllegalState, NameInUse, NotFound

TABLES = ("machine", "snapshot", "snapshot_ref", "template", "agent", "node", "token")


@pytest.fixture(scope="module")
def shared(postgres):
    """One database for all tests here: making one takes longer than most of them."""
    opened = Database.open(postgres.database(), [SCHEMA])
    yield opened
    asyncio.run(opened.close())


@pytest.fixture(params=["sqlite", "postgres"])
async def catalog(request, tmp_path):
    if request.param == "postgres":
        opened = request.getfixturevalue("shared")
        await opened.write(lambda tx: [tx.execute(f"DELETE FROM catalog_{table}") for table in TABLES])
        yield Catalog(opened)
        return
    opened = Database.open(tmp_path / "x.db", [SCHEMA])
    yield Catalog(opened)
    await opened.close()


@pytest.fixture
async def sqlite_catalog(tmp_path):
    """Of the engine that lets anything into any column."""
    db = Database.open(tmp_path / "x.db", [SCHEMA])
    yield Catalog(db)
    await db.close()


def machine(number, name="", state="running", **more):
    return MachineRecord(f"mch_{number}", name, state, {"cpus": 1}, "fake", float(number), **more)


def snapshot(number, name="", **more):
    return SnapshotRecord(f"snp_{number}", name, "mch_1", float(number), **more)


async def test_a_row_comes_back_as_it_was(catalog):
    full = machine(1, "dev", template="tpl_1", snapshot="snp_1", session="ses_1", exit_code=3, status="ok",
                   meta={"a": [1, {"b": None}]})  # fmt: skip
    assert await catalog.machines.insert(full) == full
    assert await catalog.machines.get("mch_1") == full
    assert await catalog.machines.find("mch_1") == full
    assert await catalog.machines.find("dev") is None
    snap = snapshot(1, "base:v1", log_position=7, epoch=2, figures={"standstill_s": 0.02})
    await catalog.snapshots.insert(snap)
    assert await catalog.snapshots.get("base:v1") == snap
    template = TemplateRecord("tpl_1", "base", "key", "snp_1", 1.0)
    await catalog.templates.insert(template)
    assert await catalog.templates.by_key("key") == template
    node = NodeRecord("nod_1", "n1", "unix", "up", 1.0, 2.0, {"memory_bytes": 1 << 40})
    await catalog.nodes.insert(node)
    assert await catalog.nodes.list_all() == [node]


async def test_refs_are_ids_names_or_unambiguous_prefixes(catalog):
    await catalog.machines.insert(MachineRecord("mch_ab1", "dev", "running", {}, "f", 1.0))
    await catalog.machines.insert(MachineRecord("mch_ab2", "ab1x", "running", {}, "f", 2.0))
    assert (await catalog.machines.get("mch_ab1")).name == "dev"
    assert (await catalog.machines.get("ab1")).name == "dev"
    assert (await catalog.machines.get("ab1x")).id == "mch_ab2"
    with pytest.raises(BadInput, match="ambiguous"):
        await catalog.machines.get("ab")
    for ref in ("", "zz", "%", "mch_ab_", "\u00e9", "x" * 5000):
        with pytest.raises(NotFound):
            await catalog.machines.get(ref)


async def test_a_name_belongs_to_one_machine_until_it_is_dead(catalog):
    await catalog.machines.insert(machine(1, "dev"))
    with pytest.raises(NameInUse, match="mch_1"):
        await catalog.machines.insert(machine(2, "dev"))
    assert await catalog.machines.find("mch_2") is None
    await catalog.machines.update("mch_1", state="exited")
    with pytest.raises(NameInUse):
        await catalog.machines.insert(machine(2, "dev"))
    await catalog.machines.update("mch_1", state="dead")
    await catalog.machines.insert(machine(2, "dev"))
    assert (await catalog.machines.get("dev")).id == "mch_2"
    with pytest.raises(NameInUse, match="mch_2"):
        await catalog.machines.update("mch_1", state="running")
    assert (await catalog.machines.get("mch_1")).state == "dead"
    with pytest.raises(NameInUse):
        await catalog.machines.update("mch_1", state="running", name="dev")
    with pytest.raises(Conflict, match="exists"):
        await catalog.machines.insert(machine(2, "other"))


async def test_each_node_sees_its_own_machines(catalog):
    one, two = (Catalog(catalog.db, node=name).machines for name in ("n1", "n2"))
    await one.insert(machine(1, "dev", session="ses_1"))
    await two.insert(machine(2, session="ses_1"))
    await catalog.machines.insert(machine(3))
    for rows, number in ((one, 1), (two, 2), (catalog.machines, 3)):
        own = [f"mch_{number}"]
        assert [m.id for m in await rows.list_all()] == own
        assert [m.id for m in (await rows.survey())[0]] == own
        assert [m.id for m in (await rows.survey_vms(["dead"]))[0]] == own
        assert [m.id for m in (await rows.survey_in_states(["running"]))[0]] == own
        assert [m.id for m in await rows.list_of_session("ses_1")] == (own if number < 3 else [])
        assert sorted(await rows.all_ids()) == ["mch_1", "mch_2", "mch_3"]
    assert (await one.get("dev")).node == "n1"
    with pytest.raises(NotFound, match="another node"):
        await two.get("dev")
    assert await two.find("mch_1") is None
    with pytest.raises(NameInUse):
        await two.insert(machine(4, "dev"))


@pytest.mark.parametrize("name", ["a b", "-x", "x", "mch_abc", "ses_1", "x" * 129, "a/b", "a:b", "\n", "é1", "a\x00"])
async def test_illegal_names_are_refused(catalog, name):
    with pytest.raises(BadInput):
        await catalog.machines.insert(machine(1, name))
    await catalog.machines.insert(machine(2, "fine"))
    with pytest.raises(BadInput):
        await catalog.machines.update("mch_2", name=name)


@pytest.mark.parametrize(
    ("name", "ok"), [("base:v1", True), ("base", True), ("a:b:c", False), (":v1", False), ("a:", False)]
)
async def test_snapshot_names_may_be_tagged(catalog, name, ok):
    if ok:
        assert (await catalog.snapshots.insert(snapshot(1, name))).name == name
    else:
        with pytest.raises(BadInput):
            await catalog.snapshots.insert(snapshot(1, name))


async def names_of(catalog):
    """All names, by id number; and check that what lists show is one of them."""
    names = await catalog.snapshots.names()
    for row in await catalog.snapshots.list_all():
        assert row.name == (names[row.id][0] if row.id in names else "")
        for name in names.get(row.id, []):
            assert (await catalog.snapshots.get(name)).id == row.id
    return {int(ref[4:]): found for ref, found in names.items()}


async def test_a_snapshots_name_moves_and_its_id_does_not(catalog):
    rows = catalog.snapshots
    await rows.insert(snapshot(1, "base:v1"))
    assert await names_of(catalog) == {1: ["base:v1", "base"]}
    await rows.insert(snapshot(2, "base:v2"))
    assert await names_of(catalog) == {1: ["base:v1"], 2: ["base:v2", "base"]}
    await rows.insert(snapshot(3, "base:v1"))
    assert await names_of(catalog) == {2: ["base:v2"], 3: ["base:v1", "base"]}
    assert (await rows.get("snp_1")).name == ""
    assert (await rows.get("base:latest")).id == "snp_3"
    await rows.insert(snapshot(4, "base"))
    assert await names_of(catalog) == {2: ["base:v2"], 3: ["base:v1"], 4: ["base"]}
    with pytest.raises(NotFound):
        await rows.get("base:v9")


async def test_tags_are_given_and_taken(catalog):
    rows, write = catalog.snapshots, catalog.db.write
    await rows.insert(snapshot(1, "base:v1"))
    await rows.insert(snapshot(2, "base:v2"))
    assert await write(lambda tx: snapshot_rows.tag_in(tx, "snp_1", "base:stable", now=9.0)) == ""
    assert await names_of(catalog) == {1: ["base:stable", "base:v1"], 2: ["base:v2", "base"]}
    assert await write(lambda tx: snapshot_rows.tag_in(tx, "snp_1", "base", now=9.0)) == "snp_2"  # back to the old one
    assert await write(lambda tx: snapshot_rows.tag_in(tx, "snp_2", "other:x", now=9.0)) == ""
    assert await names_of(catalog) == {1: ["base:stable", "base:v1", "base"], 2: ["other:x", "base:v2", "other"]}
    assert await write(lambda tx: snapshot_rows.untag_in(tx, "base:v2"))
    assert not await write(lambda tx: snapshot_rows.untag_in(tx, "base:v2"))
    assert await names_of(catalog) == {1: ["base:stable", "base:v1", "base"], 2: ["other:x", "other"]}
    with pytest.raises(BadInput):
        await write(lambda tx: snapshot_rows.tag_in(tx, "snp_1", "snp_9", now=9.0))


async def test_a_deleted_snapshot_leaves_its_name_and_its_children_to_others(catalog):
    rows = catalog.snapshots
    for number, name, parent in ((1, "base:v1", ""), (2, "base:v2", "snp_1"), (3, "base:v3", "snp_2")):
        await rows.insert(snapshot(number, name, parent=parent))
    await rows.delete("snp_2")
    assert (await rows.get("snp_3")).parent == "snp_1"
    await rows.delete("snp_3")
    assert await names_of(catalog) == {1: ["base:v1", "base"]}
    await rows.delete("snp_1")
    assert await names_of(catalog) == {}
    assert not await rows.delete("snp_1")


async def test_all_ids_are_told_however_damaged_the_rows(catalog):
    for number in range(1, 4):
        await catalog.snapshots.insert(snapshot(number))
    await catalog.db.write(lambda tx: tx.execute("UPDATE catalog_snapshot SET figures = '{' WHERE id = 'snp_2'"))
    assert sorted(await catalog.snapshots.all_ids()) == ["snp_1", "snp_2", "snp_3"]
    assert [row.id for row in await catalog.snapshots.readable()] == ["snp_3", "snp_1"]
    with pytest.raises(Corrupt):
        await catalog.snapshots.list_all()


async def test_names_of_an_older_database_are_taken_over(tmp_path):
    old = RoomSchema("catalog", SCHEMA.migrations[:1])
    db = Database.open(tmp_path / "old.db", [old])
    columns = "(id, name, machine, session, log_position, epoch, why, created, template, parent, figures)"
    for number, name in enumerate(["base:v1", "base:v2", "plain", "", "plain2:x"]):
        values = (f"snp_{number}", name, "mch_1", "", 0, 0, "manual", float(number), "", "", "{}")
        marks = ", ".join("?" * len(values))
        await db.write(
            lambda tx, v=values, m=marks: tx.execute(f"INSERT INTO catalog_snapshot {columns} VALUES ({m})", v)
        )
    await db.close()
    catalog = Catalog(Database.open(tmp_path / "old.db", [SCHEMA]))
    assert await names_of(catalog) == {
        0: ["base:v1"], 1: ["base:v2", "base"], 2: ["plain"], 4: ["plain2:x", "plain2"],
    }  # fmt: skip
    assert all(row.expires == 0.0 for row in await catalog.snapshots.list_all())
    await catalog.db.close()


async def test_updates(catalog):
    await catalog.machines.insert(machine(1, "dev"))
    row = await catalog.machines.update("mch_1", status="busy", meta={"x": 1}, exit_code=0)
    assert (row.status, row.meta, row.exit_code, row.name) == ("busy", {"x": 1}, 0, "dev")
    assert await catalog.machines.update("mch_1") == row
    with pytest.raises(NotFound):
        await catalog.machines.update("mch_9", status="x")
    for changes in ({"nonsense": 1}, {"id": "mch_2"}, {"meta": {"a": object()}}):
        with pytest.raises(BadInput):
            await catalog.machines.update("mch_1", **changes)
    assert await catalog.machines.get("dev") == row


async def test_change_decides_on_the_row_it_changes(catalog):
    await catalog.machines.insert(machine(1, state="running"))

    def pause(row):
        if row.state != "running":
            raise IllegalState(f"it is {row.state}")
        return {"state": "paused"}

    assert (await catalog.machines.change("mch_1", pause)).state == "paused"
    with pytest.raises(IllegalState):
        await catalog.machines.change("mch_1", pause)
    with pytest.raises(NotFound):
        await catalog.machines.change("mch_2", pause)


async def test_lists(catalog):
    for number in range(1, 5):
        await catalog.machines.insert(
            machine(number, state="dead" if number == 2 else "running", session=f"ses_{number % 2}")
        )
    assert [m.id for m in await catalog.machines.list_all()] == ["mch_4", "mch_3", "mch_2", "mch_1"]
    readable, damaged = await catalog.machines.survey_in_states(["running"])
    assert ([m.id for m in readable], damaged) == (["mch_4", "mch_3", "mch_1"], [])
    assert await catalog.machines.survey_in_states([]) == ([], [])
    assert [m.id for m in await catalog.machines.list_of_session("ses_1")] == ["mch_3", "mch_1"]
    assert await catalog.machines.list_of_session("") == []
    assert await catalog.machines.delete("mch_4") is True
    assert await catalog.machines.delete("mch_4") is False


async def test_newest_snapshot_of_a_session_at_a_position(catalog):
    for number, position in ((1, 4), (2, 9), (3, 9)):
        await catalog.snapshots.insert(snapshot(number, session="ses_1", log_position=position))
    newest = catalog.snapshots.newest_of_session
    assert [getattr(await newest("ses_1", at=at), "id", None) for at in (3, 4, 8, 9, None)] == [
        None, "snp_1", "snp_1", "snp_3", "snp_3",
    ]  # fmt: skip
    assert await newest("") is None
    assert [s.id for s in await catalog.snapshots.list_of_machine("mch_1")] == ["snp_3", "snp_2", "snp_1"]


async def test_rows_of_two_tables_change_together_or_not_at_all(catalog):
    await catalog.machines.insert(machine(1))
    await catalog.snapshots.insert(snapshot(1))

    def both(number):
        def run(tx):
            machine_rows.update_in(tx, "mch_1", snapshot="snp_2", state="suspended")
            snapshot_rows.insert_in(tx, snapshot(number, "free"))

        return run

    with pytest.raises(Conflict):
        await catalog.db.write(both(1))
    assert (await catalog.machines.get("mch_1")).state == "running"
    await catalog.db.write(both(2))
    assert (await catalog.machines.get("mch_1")).snapshot == (await catalog.snapshots.get("free")).id


async def test_templates_are_one_a_key(catalog):
    await catalog.templates.put(TemplateRecord("tpl_1", "base", "k", "snp_1", 1.0))
    with pytest.raises(Conflict):
        await catalog.templates.insert(TemplateRecord("tpl_2", "base", "k", "snp_2", 2.0))
    await catalog.templates.put(TemplateRecord("tpl_2", "base", "k", "snp_2", 2.0))
    assert [t.id for t in await catalog.templates.list_all()] == ["tpl_2"]
    await catalog.templates.touch("tpl_2", now=9.0)
    assert (await catalog.templates.by_key("k")).last_used == 9.0
    assert await catalog.templates.by_key("other") is None


async def test_tokens_expire(catalog):
    await catalog.tokens.insert(TokenRecord("tok_1", "ci", "h1", 1.0, expires=10.0))
    await catalog.tokens.insert(TokenRecord("tok_2", "dev", "h2", 1.0))
    assert (await catalog.tokens.by_hash("h1", now=9.9)).name == "ci"
    assert await catalog.tokens.by_hash("h1", now=10.0) is None
    assert (await catalog.tokens.by_hash("h2", now=1e12)).name == "dev"


@pytest.mark.parametrize("damage", ["state = x'ff00'", "exit_code = 'three'", "created = 'then'"])
async def test_a_column_of_another_type_is_named(sqlite_catalog, damage):
    await check_damage(sqlite_catalog, damage)


@pytest.mark.parametrize("damage", ["spec = '{'", "spec = '[1]'"])
async def test_a_damaged_row_is_named(catalog, damage):
    await check_damage(catalog, damage)


async def check_damage(catalog, damage):
    await catalog.machines.insert(machine(1, "dev"))
    await catalog.machines.insert(machine(2, "fine"))
    await catalog.db.write(lambda tx: tx.execute(f"UPDATE catalog_machine SET {damage} WHERE id = 'mch_1'"))
    with pytest.raises(Corrupt, match="mch_1") as caught:
        await catalog.machines.get("mch_1")
    assert caught.value.details["ref"] == "mch_1"
    assert (await catalog.machines.get("fine")).id == "mch_2"


# --- agents


FILES = {"agent.py": b"print('\xff')", "lib/util.py": b""}


async def test_the_same_code_is_the_same_version(catalog):
    one = await catalog.agents.deploy("coder", FILES, {"image": "base"}, now=1.0)
    two = await catalog.agents.deploy("coder", {**FILES, "agent.py": b"v2"}, {"image": "base"}, now=2.0)
    assert one.version == agent_version(FILES, {"image": "base"}) != two.version
    assert (await catalog.agents.current("coder")).version == two.version
    back = await catalog.agents.deploy("coder", FILES, {"image": "base"}, now=3.0)
    assert (back.version, back.created) == (one.version, 1.0)
    assert (await catalog.agents.current("coder")).version == one.version
    assert [v.version for v in await catalog.agents.versions("coder")] == [one.version, two.version]
    assert await catalog.agents.files("coder", one.version) == FILES
    assert (await catalog.agents.get("coder", two.version[:6])).config == {"image": "base"}
    other = await catalog.agents.deploy("helper", FILES, {}, now=4.0)
    assert [v.agent for v in await catalog.agents.list_current()] == ["helper", "coder"]
    assert other.size == len(FILES["agent.py"])


async def test_an_old_version_is_found_however_many_came_after(catalog):
    first = await catalog.agents.deploy("coder", FILES, {"n": 0}, now=1.0)
    await asyncio.gather(*(catalog.agents.deploy("coder", FILES, {"n": n}, now=2.0) for n in range(1, 1002)))
    assert (await catalog.agents.get("coder", first.version)).config == {"n": 0}
    assert (await catalog.agents.get("coder", first.version[:12])).version == first.version
    with pytest.raises(BadInput, match="ambiguous"):
        await catalog.agents.get("coder", first.version[:1])


async def test_unknown_agents(catalog):
    for call in (
        catalog.agents.current("none"),
        catalog.agents.get("none", "abc"),
        catalog.agents.files("none", "abc"),
        catalog.agents.get("none", ""),
    ):
        with pytest.raises(NotFound):
            await call


@pytest.mark.parametrize(
    "files",
    [{}, {"/etc/passwd": b""}, {"../x": b""}, {"a/../b": b""}, {"": b""}, {"a//b": b""}, {"./a": b""}, {"a\x00": b""}],
)
async def test_files_outside_the_agents_folder_are_refused(catalog, files):
    with pytest.raises(BadInput):
        await catalog.agents.deploy("coder", files, {}, now=1.0)
    assert await catalog.agents.versions("coder") == []


async def test_a_damaged_agent_is_not_run(catalog):
    one = await catalog.agents.deploy("coder", FILES, {}, now=1.0)
    for damage in ('files = \'{"agent.py":"ZXZpbA=="}\'', "files = '[]'", "files = 'x'"):
        await catalog.db.write(lambda tx, damage=damage: tx.execute(f"UPDATE catalog_agent SET {damage}"))
        with pytest.raises(Corrupt, match="coder"):
            await catalog.agents.files("coder", one.version)
    await catalog.db.write(lambda tx: tx.execute("UPDATE catalog_agent SET config = '{'"))
    with pytest.raises(Corrupt):
        await catalog.agents.current("coder")
