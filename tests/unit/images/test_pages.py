import threading

import numpy as np
import pytest

from recess.errors import BadInput, Corrupt
from recess.images.files import hash_bytes
from recess.images.pages import FilePages, page_hashes

RNG = np.random.default_rng(7)


@pytest.fixture
def source(tmp_path):
    """A file of 600 blocks: random ones, some zero, some twice, and a partial block at the end."""
    blocks = RNG.integers(0, 256, (600, 4096), dtype=np.uint8)
    blocks[10:20] = 0
    blocks[400] = blocks[3]
    path = tmp_path / "root.erofs"
    path.write_bytes(blocks.tobytes() + b"tail")
    return path, hash_bytes(path.read_bytes()), blocks


def test_every_block_is_found_and_equal(source):
    path, digest, blocks = source
    pages = FilePages.open(path, digest)
    found = pages.lookup_many(blocks)
    assert (found[10:20] == -1).all()
    where = np.nonzero(found >= 0)[0]
    assert len(where) == 590
    assert found[400] == 3
    assert all(bytes(pages.read_block(int(found[i]))) == blocks[i].tobytes() for i in where)
    assert (pages.source_hash, pages.block_count) == (digest, 600)


def test_other_pages_are_not_found(source):
    path, digest, blocks = source
    changed = blocks.copy()
    changed[:, 4095] ^= 1
    changed[10:20] = RNG.integers(0, 256, (10, 4096), dtype=np.uint8)
    assert (FilePages.open(path, digest).lookup_many(changed) == -1).all()


def test_equality_is_of_bytes_not_of_hashes(source, monkeypatch):
    path, digest, blocks = source
    monkeypatch.setattr("recess.images.pages.page_hashes", lambda words: np.ones(len(words), dtype=np.uint64))
    pages = FilePages.open(path, digest)
    found = pages.lookup_many(blocks)
    assert found[0] == 0
    assert (found[1:10] == -1).all()


def test_nothing_is_found_in_nothing(source):
    path, digest, _blocks = source
    assert len(FilePages.open(path, digest).lookup_many(np.empty((0, 4096), dtype=np.uint8))) == 0


def test_a_page_view_with_strides_is_understood(source):
    path, digest, blocks = source
    assert FilePages.open(path, digest).lookup_many(blocks[:8:2]).tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("damage", ["missing", "cut", "flip", "other source", "old version"])
def test_an_index_that_is_not_right_is_made_again(source, damage, tmp_path):
    path, digest, blocks = source
    index = path.with_name("root.erofs.pages")
    FilePages.open(path, digest)
    good = index.read_bytes()
    bad = bytearray(good)
    if damage == "flip":
        bad[200] ^= 1
    index.write_bytes(bytes(bad) if damage != "cut" else good[:-100])
    if damage == "missing":
        index.unlink()
    if damage == "other source":
        path.write_bytes(np.roll(blocks, 1, axis=0).tobytes())
        digest = hash_bytes(path.read_bytes())
    if damage == "old version":
        bad[8] = 99
        index.write_bytes(bytes(bad))
    pages = FilePages.open(path, digest)
    assert pages.lookup_many(blocks)[1] == (2 if damage == "other source" else 1)
    assert (index.read_bytes() == good) is (damage != "other source")


def test_an_index_that_cannot_be_stored_serves_from_memory(source, monkeypatch):
    path, digest, blocks = source
    monkeypatch.setattr("recess.images.pages.Path.replace", _refuse)
    assert FilePages.open(path, digest).lookup_many(blocks[:2]).tolist() == [0, 1]
    assert not path.with_name("root.erofs.pages").exists()
    assert [p.name for p in path.parent.iterdir()] == ["root.erofs"]


def _refuse(*_args):
    raise OSError("read-only")


@pytest.mark.parametrize("block", [-1, 600, 1 << 40])
def test_a_block_outside_is_corrupt(source, block):
    path, digest, _blocks = source
    with pytest.raises(Corrupt, match="outside"):
        FilePages.open(path, digest).read_block(block)


def test_an_empty_file_is_no_source(tmp_path):
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(BadInput):
        FilePages.open(tmp_path / "f", hash_bytes(b""))


def test_a_block_outlives_its_source(source):
    path, digest, blocks = source
    pages = FilePages.open(path, digest)
    view = pages.read_block(5)
    pages.close()
    pages.close()
    assert bytes(view) == blocks[5].tobytes()


def test_threads_share_one_source(source):
    path, digest, blocks = source
    pages = FilePages.open(path, digest)
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda: results.append(pages.lookup_many(blocks).tolist())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(r == results[0] for r in results)


def test_the_page_hash_is_the_same_forever():
    words = np.arange(1024, dtype=np.uint64).reshape(2, 512)
    assert page_hashes(words).tolist() == PINNED


PINNED = [6145285514624276790, 4154399259747975478]
