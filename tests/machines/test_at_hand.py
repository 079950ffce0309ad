"""Memories kept uncompressed on a node, with real guests: a resume maps them; damaged, evicted or removed, it does not."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from recess.config import Config, load_config
from recess.guestlink.link import ExecRequest
from recess.machines.service import MachineSpec
from recess.node.local import LocalNode
from tests.conftest import left_processes

SPEC = MachineSpec(memory_bytes=256 << 20, disk_bytes=1 << 30)
FILL = "head -c 12000000 /dev/urandom > /dev/shm/big; sha256sum /dev/shm/big > /dev/shm/sum; echo 0 > /dev/shm/n"
NAP = "sha256sum -c /dev/shm/sum > /dev/null && n=$(cat /dev/shm/n) && echo $((n + 1)) > /dev/shm/n && cat /dev/shm/n"
pytestmark = [pytest.mark.machines, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, images_dir: Path) -> Iterator[Config]:
    """One home for all, and so one template."""
    home = tmp_path_factory.mktemp("at-hand") / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images_dir)
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    run_dir = base / f"recess-h-{secrets.token_hex(4)}"
    yield load_config({}, home=str(home), run_dir=str(run_dir), driver="qemu")
    left = left_processes(run_dir, home)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(run_dir, ignore_errors=True)
    assert not left


@pytest.fixture
async def node(config: Config) -> AsyncIterator[LocalNode]:
    opened = await LocalNode.open(config)
    yield opened
    for row in await opened.machines.list_machines(everything=True):
        await opened.machines.remove(row.id, force=True)
    await opened.close()


async def sh(node: LocalNode, ref: str, script: str) -> str:
    row = await node.machines.get(ref)
    job = await (await node.machines.link(row.id)).exec(ExecRequest(argv=["sh", "-c", script], cwd="/root"))
    out = b"".join([data async for _, data in job.output()])
    assert await job.wait() == 0, out
    return out.decode().strip()


async def kept(node: LocalNode) -> Path:
    """Return the folder of kept memories, once all is written."""
    assert node.machines._parts.at_hand is not None
    await node.machines._parts.at_hand.settled()
    return node.config.home / "pages"


async def nap(node: LocalNode, how: str) -> str:
    """Put the machine away and bring it back; return its snapshot. `how`: how its memory must have come."""
    snapshot = await node.machines.suspend("dev")
    await kept(node)
    await node.machines.resume("dev")
    assert (await node.machines.stats("dev"))["paging"]["memory"].startswith(how)
    return snapshot.id


async def test_naps_map_their_memory_unless_it_was_damaged_or_removed(node: LocalNode) -> None:
    machines = node.machines
    await machines.create(SPEC, name="dev")
    await sh(node, "dev", FILL)
    first = await nap(node, "remap: ")
    assert await sh(node, "dev", NAP) == "1"
    folder = await kept(node)
    before = sum(path.stat().st_size for path in folder.glob("*.pages"))
    second = await nap(node, "remap: ")  # what changed over what was mapped
    assert await sh(node, "dev", NAP) == "2"
    after = sum(path.stat().st_size for path in folder.glob("*.pages"))
    assert after - before < before / 2

    # damaged: never served; read from the store, and kept from there
    await machines.suspend("dev")
    await kept(node)
    for path in folder.glob("*.pages"):
        stamp = path.stat().st_ctime_ns
        path.chmod(0o600)
        while path.stat().st_ctime_ns == stamp or path.stat().st_size % 4096 == 0:
            os.truncate(path, path.stat().st_size - 1)
    await machines.resume("dev")
    assert (await machines.stats("dev"))["paging"]["memory"].startswith("inject: only ")
    assert await sh(node, "dev", NAP) == "3"
    await kept(node)
    await machines.restore((await machines.get("dev")).snapshot, name="sibling")
    assert (await machines.stats("sibling"))["paging"]["memory"].startswith("remap: ")
    assert await sh(node, "sibling", NAP) == "3"

    # removed with its snapshot
    await machines.remove("sibling", force=True)
    for snapshot in (first, second):
        if any(row.id == snapshot for row in await machines.list_snapshots()):
            await machines.keeping.remove(snapshot, force=True)
    await kept(node)
    assert not {path.stem for path in folder.glob("*.map")} & {first, second}
    assert await sh(node, "dev", NAP) == "4"


async def test_all_children_of_a_machine_and_of_its_snapshot_map_the_same_pages(node: LocalNode) -> None:
    machines = node.machines
    await machines.create(SPEC, name="dev")
    await sh(node, "dev", FILL)
    living = await machines.fork("dev", 2)
    await kept(node)
    await sh(node, "dev", "echo 5 > /dev/shm/n")
    (late,) = await machines.fork("dev")  # what changed since the first fork's snapshot, over that
    snapshots = {row.id: row.figures for row in await machines.list_snapshots()}
    first, second = (snapshots[str(child.meta["parent"])] for child in (living[0], late))
    assert second["counts_from"] == living[0].meta["parent"]
    assert second["pages_captured"]["memory"] < first["pages_captured"]["memory"] / 2
    assert await sh(node, late.name, NAP) == "6"
    await machines.suspend("dev")
    await kept(node)
    stored = await machines.fork("dev", 2)
    for child, why in [
        *((row, "its parent's pages") for row in living),
        *((row, "keeps uncompressed") for row in stored),
    ]:
        assert why in (await machines.stats(child.name))["paging"]["memory"]
        assert await sh(node, child.name, NAP) == ("1" if child in living else "6")
    assert len(await asyncio.gather(*(machines.suspend(row.name) for row in (*living, *stored)))) == 4
