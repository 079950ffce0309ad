"""Sparse files and page sets: what changed is found, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recess.drivers.kept import disk
from recess.errors import DriverFailed

BLOCKS = 64
PAGE = 4096


def sparse(path: Path, blocks: dict[int, int], total: int = BLOCKS) -> Path:
    """Write a sparse file whose named blocks are filled with a byte (0: a written block of zeros)."""
    path.unlink(missing_ok=True)
    fd = disk.create_sparse(path, total * PAGE)
    for number, fill in blocks.items():
        os.pwrite(fd, bytes([fill]) * PAGE, number * PAGE)
    os.close(fd)
    return path


def changed(base: Path | None, image: Path, put_over: list[int], directory: Path) -> dict[int, bytes]:
    fd = os.open(image, os.O_RDONLY)
    try:
        packed = disk.changed_blocks(base, fd, np.array(put_over, np.uint32), directory)
    finally:
        os.close(fd)
    indices, data = disk.as_arrays(packed.pages)
    assert list(indices) == sorted(set(indices.tolist()))
    found = {int(number): page.tobytes() for number, page in zip(indices, data, strict=True)}
    del indices, data
    packed.close()
    return found


def test_a_block_that_became_zero_is_a_change(tmp_path: Path) -> None:
    base = sparse(tmp_path / "base", {1: 7, 2: 7})
    image = sparse(tmp_path / "image", {1: 7, 9: 5})
    assert changed(base, image, [], tmp_path) == {2: bytes(PAGE), 9: b"\5" * PAGE}


def test_without_a_base_zeros_cost_nothing(tmp_path: Path) -> None:
    image = sparse(tmp_path / "image", {3: 0, 4: 4})
    assert changed(None, image, [], tmp_path) == {4: b"\4" * PAGE}


def test_restored_blocks_count_even_if_equal(tmp_path: Path) -> None:
    base = sparse(tmp_path / "base", {1: 1})
    image = sparse(tmp_path / "image", {1: 1})
    assert changed(base, image, [1, 30], tmp_path) == {1: b"\1" * PAGE, 30: bytes(PAGE)}


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "machine"
    folder.mkdir()
    changed(None, sparse(tmp_path / "image", {0: 1}), [], folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("numbers", [[], [0], [3, 4, 5, 30, 63]])
def test_blocks_are_picked_by_number_whatever_is_in_them(tmp_path: Path, numbers: list[int]) -> None:
    image = sparse(tmp_path / "image", {0: 0, 3: 3, 5: 5, 30: 0, 40: 4})
    with image.open("rb") as handle:
        packed = disk.pick_blocks(handle.fileno(), np.array(numbers, np.uint32), tmp_path)
    indices, data = disk.as_arrays(packed.pages)
    assert indices.tolist() == numbers
    assert [set(page.tolist()) for page in data] == [{n if n in (3, 5) else 0} for n in numbers]
    del indices, data
    packed.close()
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_what_is_a_hole_here_and_below_is_no_change(tmp_path: Path) -> None:
    below = sparse(tmp_path / "below", {1: 1, 2: 2, 9: 0, 12: 3})
    image = sparse(tmp_path / "image", {2: 5, 3: 0, 4: 4})
    with image.open("rb") as handle:
        packed = disk.pick_blocks(handle.fileno(), np.arange(20, dtype=np.uint32), tmp_path, over=below)
    indices, data = disk.as_arrays(packed.pages)
    assert indices.tolist() == [1, 2, 3, 4, 12]  # 9 is zeros below, though no hole
    assert [page[0] for page in data] == [0, 5, 0, 4, 0]
    assert packed.zeros.tolist() == [1, 12]  # nobody has to read them; 3 was written, so somebody has to
    del indices, data
    packed.close()


def test_holes_are_not_counted(tmp_path: Path) -> None:
    os.close(disk.create_sparse(tmp_path / "disk", 1 << 30))
    assert disk.allocated_bytes(tmp_path / "disk") == 0
    with (tmp_path / "disk").open("r+b") as handle:
        handle.seek(500 << 20)
        handle.write(b"x" * 4096)
        os.fsync(handle.fileno())
    assert 4096 <= disk.allocated_bytes(tmp_path / "disk") < 1 << 20


def test_a_discarded_disk_takes_no_room(tmp_path: Path) -> None:
    """All of it has changed, to holes: as many blocks, none of them written."""
    count = 1 << 18
    image = sparse(tmp_path / "image", {7: 7}, count)
    with image.open("rb") as handle:
        packed = disk.pick_blocks(handle.fileno(), np.arange(count, dtype=np.uint32), tmp_path)
    assert packed.pages.count == count
    assert packed.zeros.tolist() == [n for n in range(count) if n != 7]
    assert os.fstat(packed.fd).st_blocks * 512 < 32 * count  # 4 MiB around the one that is there, and the numbers
    assert bytes(packed.pages.data[7 * PAGE : 8 * PAGE]) == b"\7" * PAGE
    packed.close()


fills = st.dictionaries(st.integers(0, BLOCKS - 1), st.integers(0, 2), max_size=30)


@settings(max_examples=60, deadline=None)
@given(base=fills, image=fills, put_over=st.sets(st.integers(0, BLOCKS - 1), max_size=5))
def test_base_and_changes_make_the_image(
    tmp_path_factory: pytest.TempPathFactory, base: dict[int, int], image: dict[int, int], put_over: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("disk")
    base_file, image_file = sparse(folder / "base", base), sparse(folder / "image", image)
    found = changed(base_file, image_file, sorted(put_over), folder)
    assert put_over <= set(found)
    rebuilt = sparse(folder / "rebuilt", {})
    fd = os.open(rebuilt, os.O_RDWR)
    disk.copy_data(base_file, fd)
    indices = np.array(sorted(found), np.uint32)
    data = np.frombuffer(b"".join(found[int(i)] for i in indices), np.uint8).reshape(-1, PAGE)
    disk.write_pages(fd, indices, data)
    os.close(fd)
    assert rebuilt.read_bytes() == image_file.read_bytes()


def test_packed_pages_come_back(tmp_path: Path) -> None:
    indices = np.array([0, 5, 6, 4000], np.uint32)
    data = np.arange(4 * PAGE, dtype=np.uint32).astype(np.uint8).reshape(4, PAGE)
    path = tmp_path / "packed"
    with path.open("w+b") as handle:
        disk.pack_pages(handle.fileno(), indices, data)
    packed = disk.read_packed(path)
    got_indices, got_data = disk.as_arrays(packed.pages)
    assert got_indices.tolist() == indices.tolist()
    assert np.array_equal(got_data, data)
    assert disk.read_packed(tmp_path / "absent").pages.count == 0


def test_a_short_page_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(PAGE))
    with pytest.raises(DriverFailed):
        disk.map_packed(os.open(path, os.O_RDONLY), 1)


def test_punching_keeps_the_content_and_gives_zeros_back() -> None:
    path = sparse(Path(f"/dev/shm/recess-punch-{os.getpid()}"), {i: i % 2 for i in range(BLOCKS)})
    try:
        before, allocated = path.read_bytes(), path.stat().st_blocks
        disk.punch_zero_pages(path)
        assert path.read_bytes() == before
        assert path.stat().st_blocks == allocated // 2
    finally:
        path.unlink()
