"""`recess db`: backups that can be restored into either engine, checks that find what is wrong, migrations."""

import asyncio
import tarfile
from pathlib import Path

import pytest

from recess.catalog import SCHEMA as CATALOG
from recess.catalog import Catalog, MachineRecord, SnapshotRecord
from recess.clock import SystemClock
from recess.config import load_config
from recess.contextlog import SCHEMA as LOG
from recess.contextlog import Delta, Draft, LogKeeper, Sealing
from recess.db import Database
from recess.errors import BadInput, Conflict, Corrupt, HomeLocked, Incompatible, NotFound
from recess.node import databases
from recess.node.lock import HomeLock
from recess.node.logs import SCHEMAS, open_database, open_log
from recess.testing.contextlog_blobs import put, read

BIG = "z" * 30_000
GOLDEN = Path(__file__).parents[2] / "golden" / "backup_v1.tar"


@pytest.fixture
def home(request, tmp_path):
    """Make the configuration of an empty home on an engine."""

    def make(engine, name):
        url = request.getfixturevalue("postgres").database() if engine == "postgres" else ""
        return load_config({}, home=tmp_path / name, run_dir=tmp_path / "run", database_url=url)

    return make


async def fill(config):
    """Write a log with a fork, deltas, large bodies and segments, and some of the catalog; return what is read back."""
    db = await asyncio.to_thread(open_database, config)
    log = (await open_log(config, db, SystemClock())).log
    row = await log.create(agent="a", code_version="v", name="first", labels={"k": "\u00e9"})
    row = await log.claim(row.id, "n", 1e12, now=0.0)
    drafts = [Draft("note", {"i": i, "text": BIG if i % 10 == 3 else "x"}, key=f"k{i}") for i in range(40)]
    await log.append(row.id, row.epoch, [Draft("system", {"text": "be kind"}), *drafts])
    await put(log, row, b"first piece", b"second")
    child = await log.fork(row.id, at=20)
    await log.append_inbox(child.id, Draft("user", {"text": "a\u0000b \U0001f600"}, key="m"))
    await log.put_delta(row.id, row.epoch, Delta(1, 0, 0, "half\u0000a reply"))
    keeper = LogKeeper(log, sealing=Sealing(entries=10, keep=5))
    await keeper.seal(row.id)
    keeper.close()
    catalog = Catalog(db)
    await catalog.machines.insert(MachineRecord("mch_1", "dev", "dead", {"cpus": 1}, "fake", 1.5, exit_code=3))
    await catalog.snapshots.insert(SnapshotRecord("snp_1", "base:v1", "mch_1", 2.0))
    await catalog.agents.deploy("coder", {"agent.py": b"\xff\x00"}, {"image": "base"}, now=3.0)
    found = await everything(db, log, [row.id, child.id])
    await db.close()
    return found, [row.id, child.id]


async def everything(db, log, sessions):
    catalog = Catalog(db)
    version = await catalog.agents.current("coder")
    return {
        "rows": [await log.get(s) for s in sessions],
        "entries": [await log.read(s) for s in sessions],
        "tails": [await log.tail(s) for s in sessions],
        "deltas": await log.deltas(sessions[0]),
        "blobs": [(one, await read(log, one)) for one in await log.find_blobs(sessions[0])],
        "machines": await catalog.machines.list_all(),
        "snapshots": await catalog.snapshots.names(),
        "files": await catalog.agents.files("coder", version.version),
    }


async def reopened(config, sessions):
    db = await asyncio.to_thread(open_database, config)
    log = (await open_log(config, db, SystemClock())).log
    found = await everything(db, log, sessions)
    again = await log.append_inbox(sessions[1], Draft("user", {"text": "a\u0000b \U0001f600"}, key="m"))
    new = await log.create(agent="a", code_version="v")  # numbers go on after the highest that was restored
    listed = [row.id for row in await log.list_sessions()]
    await db.close()
    assert again.replayed
    assert listed == [new.id, *reversed(sessions)]
    return found


def quiet(_line):
    return


@pytest.mark.parametrize(("old", "new"), [("sqlite", "sqlite"), ("sqlite", "postgres"), ("postgres", "sqlite")])
async def test_a_backup_restores_everything_on_either_engine(home, tmp_path, old, new):
    source, target = home(old, "old"), home(new, "new")
    before, sessions = await fill(source)
    file = tmp_path / "backup.tar"
    index = await databases.backup(source, file)
    assert index.rows["log_session"] == 2
    assert index.rows["log_segment"] == 3
    assert (await databases.check(source, deep=True, tell=quiet)).problems == []
    await databases.restore(target, file)
    assert (await databases.check(target, deep=True, tell=quiet)).problems == []
    assert await reopened(target, sessions) == before
    with pytest.raises(Conflict, match="rows already"):
        await databases.restore(target, file)
    with pytest.raises(BadInput, match="exists"):
        await databases.backup(source, file)


async def test_a_backup_of_a_running_home_is_of_one_moment(home, tmp_path):
    """Two sessions are always written together, in one go each way: the copy has as many of the one as of the other."""
    config = home("sqlite", "old")
    db = await asyncio.to_thread(open_database, config)
    log = (await open_log(config, db, SystemClock())).log
    rows = [await log.create(agent="a", code_version="v") for _ in range(2)]
    ended = asyncio.Event()

    async def write():
        i = 0
        while not ended.is_set():
            i += 1
            for row in rows:
                await log.append_inbox(row.id, Draft("user", {"text": "x"}, key=f"k{i}"))

    writer = asyncio.create_task(write())
    while (await log.get(rows[1].id)).head < 3:
        await log.wait(rows[1].id, 2, 60.0)
    await databases.backup(config, tmp_path / "b.tar")
    ended.set()
    await writer
    await db.close()
    target = home("sqlite", "new")
    await databases.restore(target, tmp_path / "b.tar")
    assert (await databases.check(target, deep=True, tell=quiet)).problems == []
    copy = await asyncio.to_thread(open_database, target)
    heads = await copy.read(lambda tx: [row["head"] for row in tx.execute("SELECT head FROM log_session ORDER BY seq")])
    assert heads[0] - heads[1] in (0, 1)
    assert heads[1] >= 3
    await copy.close()


@pytest.mark.parametrize("damage", ["cut", "flipped", "unfinished", "missing"])
async def test_a_damaged_backup_touches_nothing(home, tmp_path, damage):
    source, target = home("sqlite", "old"), home("sqlite", "new")
    await fill(source)
    file, broken = tmp_path / "backup.tar", tmp_path / "broken.tar"
    await databases.backup(source, file)
    data = file.read_bytes()
    if damage == "cut":
        broken.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        at = data.index(b"(\xb5/\xfd") + 40  # within the first table
        broken.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif damage == "unfinished":
        rewrite(file, broken, lambda name: name != "backup.json")
    else:
        rewrite(file, broken, lambda name: not name.startswith("segments/"))
    with pytest.raises(Corrupt):
        await databases.restore(target, broken)
    assert not target.database_path.exists()
    with pytest.raises(NotFound):
        await databases.restore(target, tmp_path / "nothing.tar")


def rewrite(source, target, keep):
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for info in old:
            if keep(info.name):
                new.addfile(info, old.extractfile(info))


@pytest.mark.parametrize(
    ("sql", "told"),
    [
        ("DELETE FROM log_entry WHERE position = 38", "entries are in rows"),
        ("UPDATE log_session SET head = head + 1 WHERE name = 'first'", "entries are in rows"),
        ("DELETE FROM log_segment WHERE first = 11", "do not follow each other at 11"),
        ("UPDATE log_key SET position = 99 WHERE key = 'k7'", "a key names position 99"),
        ("UPDATE log_session SET lineage = '[]' WHERE name = ''", None),
        ("UPDATE log_session SET labels = '{' WHERE name = ''", "unreadable row"),
        ("INSERT INTO log_key VALUES ('ses_gone', 'k', 1, 'x')", "which is no session"),
        ("UPDATE catalog_machine SET spec = '{'", "unreadable row"),
    ],
)
async def test_a_check_finds_what_is_wrong(home, sql, told):
    config = home("sqlite", "old")
    await fill(config)
    db = await asyncio.to_thread(open_database, config)
    await db.write(lambda tx: tx.execute(sql))
    await db.close()
    lines = []
    found = await databases.check(config, deep=False, tell=lines.append)
    assert lines == found.problems
    assert len(lines) == (0 if told is None else 1)
    assert told is None or told in lines[0]


async def test_a_deep_check_reads_segments_and_bodies(home):
    config = home("sqlite", "old")
    await fill(config)
    segment = min((config.blobs_dir / "log").rglob("11-20.*"))
    segment.chmod(0o600)
    segment.write_bytes(segment.read_bytes()[:-5])
    body = min(path for path in (config.home / "bodies").rglob("*") if path.is_file())
    body.write_bytes(b"no zstd")
    assert (await databases.check(config, deep=False, tell=quiet)).problems == []
    problems = (await databases.check(config, deep=True, tell=quiet)).problems
    assert any("entries 11 to 20" in line for line in problems)
    assert any("log body" in line for line in problems)


@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
async def test_every_older_schema_is_migrated_and_an_older_backup_restored(home, tmp_path, engine):
    config = home(engine, "old")
    config.home.mkdir()
    first = await asyncio.to_thread(Database.open, databases.where_of(config), [LOG.up_to(1), CATALOG.up_to(1)])
    await first.close()
    with pytest.raises(Incompatible) as caught:
        await databases.check(config, deep=False, tell=quiet)
    assert caught.value.hint == "recess db migrate"
    moved = await databases.migrate(config)
    assert moved == {schema.room: (1, len(schema.migrations)) for schema in SCHEMAS}
    assert (await databases.migrate(config))["catalog"] == (moved["catalog"][1],) * 2
    assert (await databases.check(config, deep=True, tell=quiet)).problems == []


@pytest.mark.parametrize("engine", ["sqlite", "postgres"])
async def test_a_backup_of_format_1_is_restored(home, engine):
    """A file made once, by log schema 3 and catalog schema 3, and never regenerated."""
    config = home(engine, "new")
    index = await databases.restore(config, GOLDEN)
    assert (index.format, index.schemas) == (1, {"catalog": 3, "contextlog": 3})
    assert (await databases.check(config, deep=True, tell=quiet)).problems == []
    db = await asyncio.to_thread(open_database, config)
    log = (await open_log(config, db, SystemClock())).log
    entries = await log.read("ses_aaa")
    assert [e.body.get("i") for e in entries] == [None, *range(1, 25)]
    assert entries[7].body == {"i": 7, "text": "spam " * 4000}
    assert entries[8].body["text"] == "h\u00e9"
    assert [e.position for e in await log.read("ses_bbb")] == list(range(1, 21))
    assert [d.text for d in await log.deltas("ses_aaa")] == ["half"]
    assert (await Catalog(db).snapshots.get("base")).id == "snp_1"
    await db.close()


async def test_what_needs_the_home_alone_is_refused_while_a_server_has_it(home, tmp_path):
    config = home("sqlite", "old")
    await fill(config)
    await databases.backup(config, tmp_path / "b.tar")
    lock = HomeLock(config.home)
    lock.acquire()
    for call in (databases.migrate(config), databases.restore(config, tmp_path / "b.tar")):
        with pytest.raises(HomeLocked):
            await call
    assert (await databases.check(config, deep=False, tell=quiet)).problems == []
    lock.release()


async def test_a_home_without_a_database_is_told(home, tmp_path):
    config = home("sqlite", "nothing")
    for call in (databases.check(config, deep=False, tell=quiet), databases.backup(config, tmp_path / "b.tar")):
        with pytest.raises(NotFound, match="no database"):
            await call
