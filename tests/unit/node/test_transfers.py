"""Snapshots between homes, on the fake driver: names, strangers, what is refused, what goes on after a failure."""

from __future__ import annotations

import io
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from recess.blobs import LocalBlobs
from recess.config import load_config
from recess.errors import BadInput, Corrupt, NotFound, Refused, Unavailable
from recess.guestlink.link import ExecRequest
from recess.node.local import LocalNode
from recess.snapshots.archive import announce, archive_pieces
from recess.snapshots.archive_v1 import Announcement
from recess.snapshots.keys import key_of
from recess.snapshots.manifest_v1 import decode_manifest, encode_manifest
from recess.testing.machine_room import SMALL


@asynccontextmanager
async def home(tmp_path, name, **overrides):
    node = await LocalNode.open(
        load_config({}, home=tmp_path / name, run_dir=tmp_path / f"{name}-run", driver="fake", **overrides)
    )
    try:
        yield node
    finally:
        for row in await node.machines.list_machines(everything=True):
            await node.machines.remove(row.id, force=True)
        await node.close(detach=False)


async def sh(node, ref, script):
    row = await node.machines.get(ref)
    job = await (await node.machines.link(row.id)).exec(ExecRequest(argv=["sh", "-c", script]))
    return b"".join([data async for _, data in job.output()])


async def made(node, name="base:v1", spec=SMALL, text="hello"):
    await node.machines.create(spec, name="dev")
    await sh(node, "dev", f"echo {text} > /root/f")
    row = await node.machines.snapshot("dev", name=name)
    await node.machines.remove("dev", force=True)
    return row


async def exported(node, ref):
    head, size, _ = await node.transfers.announce(ref)
    data = b"".join(node.transfers.pieces(head, 0))
    assert len(data) == size
    return data


def take_in(node, data, *, name="", trust=False):
    return node.transfers.take_in(io.BytesIO(data).read, name=name, trust=trust)


async def test_a_snapshot_goes_to_another_home_and_runs_there(tmp_path):
    async with home(tmp_path, "a") as a, home(tmp_path, "b") as b:
        row = await made(a)
        done = await take_in(b, await exported(a, "base:v1"))
        assert (done["snapshot"], done["name"]) == (row.id, "base:v1")
        assert done["asks_for"] == []
        machine, report = await b.machines.restore("base:v1")
        assert report.rung == 2
        assert await sh(b, machine.id, "cat /root/f") == b"hello\n"
        again = await take_in(b, await exported(a, "base:v1"))
        assert (again["blobs_sent"], again["name"]) == (0, "base:v1")
        assert len(await b.machines.list_snapshots()) == 1


async def test_a_stranger_takes_nobodys_name_machine_or_session(tmp_path):
    async with home(tmp_path, "a") as a, home(tmp_path, "b") as b:
        theirs = await made(a, text="theirs")
        own = await made(b, text="own")
        done = await take_in(b, await exported(a, theirs.id))
        assert done["name"] == ""
        assert (await b.machines.get_snapshot("base:v1")).id == own.id
        row = await b.machines.get_snapshot(theirs.id)
        assert (row.machine, row.session, row.why) == ("", "", "imported")
        assert row.figures["from"]["machine"] == theirs.machine
        named = await take_in(b, await exported(a, theirs.id), name="base:v1")  # asked for: it moves
        assert named["name"] == "base:v1"
        assert (await b.machines.get_snapshot("base:v1")).id == theirs.id


async def test_who_may_reach_out_must_be_trusted(tmp_path):
    spec = replace(
        SMALL, allow=("example.org",), routes={"llm": "https://llm.example"},
        ports=(("0.0.0.0", 0, 80), ("127.0.0.1", 0, 81)),
    )  # fmt: skip
    async with home(tmp_path, "a") as a, home(tmp_path, "b") as b:
        row = await made(a, spec=spec)
        data = await exported(a, row.id)
        with pytest.raises(Refused) as caught:
            await take_in(b, data)
        assert caught.value.details["asks_for"] == [
            "reach example.org", "use the secret 'llm' at https://llm.example", "listen on 0.0.0.0",
        ]  # fmt: skip
        assert await b.machines.list_snapshots() == []
        assert not LocalBlobs(tmp_path / "b" / "blobs").exists(key_of(row.id))
        done = await take_in(b, data, trust=True)
        assert len(done["asks_for"]) == 3
        await b.machines.restore(row.id)


async def test_a_refused_import_does_not_take_what_was_there(tmp_path):
    spec = replace(SMALL, allow=("example.org",))
    async with home(tmp_path, "a") as a:
        row = await made(a, spec=spec)
        with pytest.raises(Refused):
            await take_in(a, await exported(a, row.id))
        assert (await a.machines.verify_snapshot(row.id))["manifests"] >= 1


async def test_a_manifest_that_lies_is_not_kept(tmp_path):
    """Every blob is what its name says, and still it makes no sense: it says so, and nothing stays visible."""
    async with home(tmp_path, "a") as a, home(tmp_path, "b") as b:
        row = await made(a)
        blobs = LocalBlobs(tmp_path / "a" / "blobs")
        manifest = decode_manifest(row.id, blobs.get(key_of(row.id), max_bytes=1 << 22))
        memory = manifest.parts["memory"]
        lie = {"memory": type(memory)(memory.pages, memory.listed, 0, 0, memory.root)}  # they are zeros, it says
        fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
        liar, data = encode_manifest(type(manifest)(**{**fields, "parts": manifest.parts | lie}))
        assert liar != row.id
        blobs.put(key_of(liar), data)
        archive = b"".join(archive_pieces(blobs, announce(blobs, liar, "")))
        with pytest.raises(Corrupt):
            await take_in(b, archive)
        assert await b.machines.list_snapshots() == []
        assert not LocalBlobs(tmp_path / "b" / "blobs").exists(key_of(liar))


async def test_a_folder_is_a_remote_store(tmp_path):
    there = str(tmp_path / "there")
    async with home(tmp_path, "a", remote=there) as a, home(tmp_path, "b") as b:
        row = await made(a)
        pushed = await a.transfers.push("base:v1", "", check=True)
        assert pushed["checked_bytes"] == pushed["bytes_sent"] > 0
        again = await a.transfers.push("base:v1", "", check=False)
        assert again["blobs_sent"] == 0
        pulled = await b.transfers.pull("base:v1", there, name="")
        assert (pulled["snapshot"], pulled["name"], pulled["bytes_sent"]) == (row.id, "base:v1", pushed["bytes_sent"])
        machine, _ = await b.machines.restore("base:v1", name="again")
        assert await sh(b, machine.id, "cat /root/f") == b"hello\n"
        other = await b.transfers.pull(row.id[:20], there, name="mine:v9")
        assert (other["name"], other["blobs_sent"]) == ("mine:v9", 0)
        assert (await b.machines.get_snapshot("mine:v9")).id == (await b.machines.get_snapshot("base:v1")).id
        with pytest.raises(NotFound):
            await b.transfers.pull("base:v2", there, name="")
        with pytest.raises(NotFound, match="folder"):
            await b.transfers.pull("base:v1", str(tmp_path / "mistyped"), name="")
        assert not (tmp_path / "mistyped").exists()
        with pytest.raises(BadInput):
            await b.transfers.push("mine:v9", "", check=False)


async def test_names_of_strangers_that_are_no_names(tmp_path):
    async with home(tmp_path, "a") as a, home(tmp_path, "b") as b:
        row = await made(a)
        head, _, _ = await a.transfers.announce(row.id)
        bad = Announcement(head.snapshot_id, "../../x", head.items)
        done = await take_in(b, b"".join(a.transfers.pieces(bad, 0)))
        assert done["name"] == ""
        with pytest.raises(BadInput):
            await take_in(b, b"", name="../../x")


async def test_what_is_made_again_can_go_at_any_time(tmp_path):
    """An export packs; emptying the caches takes that away, and it is the same archive again."""
    async with home(tmp_path, "a") as a, home(tmp_path, "b") as b:
        row = await made(a, text="x" * 200)
        first = await exported(a, row.id)
        assert list(a.config.packed_dir.rglob("lyr_*"))
        assert "packed exports" in {kind["kind"] for kind in (await a.usage())["kinds"]}
        emptied = await a.empty_caches()
        assert emptied["packed_exports"] > 0
        assert not list(a.config.packed_dir.rglob("lyr_*"))
        assert await exported(a, row.id) == first
        assert (await take_in(b, first))["snapshot"] == row.id


async def test_an_export_goes_as_it_is_stored_if_asked(tmp_path):
    async with home(tmp_path, "a") as a:
        row = await made(a)
        head, _, _ = await a.transfers.announce(row.id, as_stored=True)
        assert not any(item.key.startswith("recoded/") for item in head.items)
        assert b"".join(a.transfers.pieces(head, 0))
        assert not a.config.packed_dir.exists()


async def test_a_server_that_ends_gives_up_packing(tmp_path):
    async with home(tmp_path, "a") as a:
        row = await made(a)
        a.transfers.stop()
        with pytest.raises(Unavailable, match="the server ends"):
            await a.transfers.announce(row.id)
