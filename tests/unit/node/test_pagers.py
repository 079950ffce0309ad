"""The server's side of pagers: the nursery's life, what is remembered, and errors that come at once."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from recess.config import load_config
from recess.errors import DriverFailed
from recess.node.pager import TOUCHED_MAX
from recess.node.pagers import SNAPSHOTS_MAX, Pagers, WorkingSet


def test_what_was_touched_is_remembered_in_its_order(tmp_path: Path):
    known = WorkingSet(tmp_path / "touched" / "snp_a.memory")
    assert known.read() == []
    known.add([7, 3, 9])
    known.add([3, 1])
    assert WorkingSet(tmp_path / "touched" / "snp_a.memory").read() == [7, 3, 9, 1]
    known.add(range(10, 2 * TOUCHED_MAX))
    assert len(known.read()) == TOUCHED_MAX


def test_a_damaged_hint_is_no_error(tmp_path: Path):
    path = tmp_path / "snp_a.memory"
    path.write_bytes(b"\x01\0\0\0\x02\0")
    assert WorkingSet(path).read() == [1]
    (tmp_path / "file").write_bytes(b"")
    WorkingSet(tmp_path / "file" / "snp_b.memory").add([1])  # its folder is a file


def test_the_oldest_are_forgotten(tmp_path: Path):
    folder = tmp_path / "touched"
    for number in range(SNAPSHOTS_MAX + 5):
        WorkingSet(folder / f"snp_{number}").add([1])
        os.utime(folder / f"snp_{number}", (number, number))
    WorkingSet(folder / "snp_last").add([1])
    names = {path.name for path in folder.iterdir()}
    assert len(names) == SNAPSHOTS_MAX
    assert "snp_last" in names
    assert "snp_0" not in names


async def nothing():
    raise AssertionError("nobody wants everything")


@pytest.fixture
def pagers(tmp_path: Path):
    pagers = Pagers(load_config({}, home=str(tmp_path), run_dir=str(tmp_path)))
    yield pagers
    pagers.close()


async def test_a_snapshot_that_is_not_there_is_told(pagers: Pagers, tmp_path: Path):
    pager = await pagers.make("snp_" + "1" * 64, "memory", tmp_path / "ram", {}, nothing)
    with pytest.raises(DriverFailed, match="no such snapshot"):
        await pager.ranges()
    await pager.close()
    await pager.close()


async def test_a_nursery_that_died_is_replaced(pagers: Pagers, tmp_path: Path):
    await pagers.warm()
    first = pagers._process
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    await asyncio.to_thread(first.wait)
    pager = await pagers.make("snp_" + "1" * 64, "memory", tmp_path / "ram", {}, nothing)
    assert pagers._process is not first
    await pager.close()


async def test_the_nursery_ends_with_the_server(pagers: Pagers):
    await pagers.warm()
    process = pagers._process
    assert process is not None
    pagers.close()
    assert process.returncode == 0
