"""The archive: plain tar and zstd outside, nothing trusted inside."""

import io
import json
import shutil
import subprocess
import tarfile

import pytest

from recess.blobs import MemoryBlobs
from recess.errors import Corrupt, Incompatible, OutOfSpace, Unsupported
from recess.snapshots import Store
from recess.snapshots.archive import Import, announce, archive_bytes, archive_pieces
from recess.snapshots.archive_v1 import (
    HEADER_NAME,
    MEMBER_BYTES_MAX,
    Announcement,
    ArchiveReader,
    decode_announcement,
    encode_announcement,
    member_name,
)
from recess.snapshots.keys import key_of
from recess.snapshots.transfer import Item, closure
from tests.unit.snapshots.test_transfer import World, keys, quiet

PLENTY = 1 << 40


@pytest.fixture(scope="module")
def world():
    made = World()
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def archive(world):
    return b"".join(archive_pieces(world.blobs, announce(world.blobs, world.second, "base:v1")))


def no_files(pieces, digest):
    raise AssertionError("there is no image file in it")


def take_in(data, blobs, tmp_path, *, free=PLENTY):
    work = Import(blobs, ArchiveReader(io.BytesIO(data).read), tmp_path, lambda: free, no_files)
    return work.run(tell=quiet)


def test_it_comes_back_whole(world, archive, tmp_path):
    blobs = MemoryBlobs()
    report = take_in(archive, blobs, tmp_path)
    assert keys(blobs) == {item.key for item in closure(world.blobs, world.second)}
    assert report.blobs_sent == len(keys(blobs))
    store = Store(blobs)
    assert store.verify(world.second)["manifests"] == 2
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_its_size_is_known_before(world, archive):
    head = announce(world.blobs, world.second, "base:v1")
    assert archive_bytes(head) == len(archive)
    assert len(archive) % 512 == 0


def test_what_is_there_is_skipped(world, archive, tmp_path):
    blobs = MemoryBlobs()
    take_in(archive, blobs, tmp_path)
    assert take_in(archive, blobs, tmp_path).blobs_sent == 0
    layers = [k for k in keys(blobs) if k.startswith("layers/")]
    blobs.delete(layers[0])
    blobs.delete(key_of(world.second))
    assert take_in(archive, blobs, tmp_path).blobs_sent == 2


@pytest.mark.parametrize("part", [0.01, 0.3, 0.6, 0.9])
def test_a_cut_file_commits_nothing_and_goes_on(world, archive, tmp_path, part):
    blobs = MemoryBlobs()
    with pytest.raises(Corrupt, match="cut short"):
        take_in(archive[: int(len(archive) * part)], blobs, tmp_path)
    assert not blobs.exists(key_of(world.second))
    there = len(keys(blobs))
    assert take_in(archive, blobs, tmp_path).blobs_there == there


def test_an_export_goes_on_at_any_offset(world, archive):
    head = announce(world.blobs, world.second, "base:v1")
    for start in (0, 1, 511, 512, 1000, len(archive) // 2, len(archive) - 1, len(archive), len(archive) + 5):
        assert b"".join(archive_pieces(world.blobs, head, start=start)) == archive[start:]


def test_a_damaged_blob_breaks_the_export_off(world):
    blobs = MemoryBlobs()
    for info in world.blobs.list_blobs():
        data = bytearray(world.blobs.get(info.key, max_bytes=1 << 30))
        if info.key.startswith("layers/"):
            data[5] ^= 1
        blobs.put(info.key, data)
    head = announce(blobs, world.second, "")
    out = []
    with pytest.raises(Corrupt):
        out.extend(archive_pieces(blobs, head))
    assert sum(map(len, out)) < archive_bytes(head)


def test_ordinary_tools_read_it(world, archive, tmp_path):
    (tmp_path / "s.tar").write_bytes(archive)
    subprocess.run(["tar", "xf", "s.tar"], cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "s.tar") as tar:
        names = tar.getnames()
    assert names[0] == HEADER_NAME
    assert names[-1] == f"{key_of(world.second)}.json"
    assert json.loads((tmp_path / names[-1]).read_bytes())["format"] == "recess.snapshot"
    zstd = shutil.which("zstd")
    for item in closure(world.blobs, world.second):
        path = tmp_path / member_name(item)
        assert path.read_bytes() == world.blobs.get(item.key, max_bytes=1 << 30)
        if zstd is not None and not item.is_manifest:
            subprocess.run([zstd, "-q", "-d", "-k", path], check=True)


def test_no_space_is_said_before_anything_is_taken_in(archive, tmp_path):
    blobs = MemoryBlobs()
    with pytest.raises(OutOfSpace):
        take_in(archive, blobs, tmp_path, free=10_000)
    assert keys(blobs) == set()


# --- hostile archives -------------------------------------------------------------------------------------------------


def retar(archive, change):
    """Rebuild an archive with `change(index, info, data)` -> list of (info, data) for every member."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(archive)) as old, tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as new:  # fmt: skip
        for index, info in enumerate(old.getmembers()):
            handle = old.extractfile(info)
            for changed, data in change(index, info, handle.read() if handle else b""):
                changed.size = len(data)
                new.addfile(changed, io.BytesIO(data))
    return out.getvalue()


def named(name, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.type = kind
    return info


HOSTILE = {
    "a path out of it": lambda i, info, d: [(named("../../etc/passwd"), d)] if i == 1 else [(info, d)],
    "an absolute path": lambda i, info, d: [(named("/etc/passwd"), d)] if i == 1 else [(info, d)],
    "a link": lambda i, info, d: [(named(info.name, tarfile.SYMTYPE), b"")] if i == 1 else [(info, d)],
    "a device": lambda i, info, d: [(named(info.name, tarfile.CHRTYPE), b"")] if i == 1 else [(info, d)],
    "one more file": lambda i, info, d: [(named("layers/x"), b"x"), (info, d)] if i == 2 else [(info, d)],
    "one file less": lambda i, info, d: [] if i == 2 else [(info, d)],
    "a longer file": lambda i, info, d: [(info, d + b"x")] if i == 1 else [(info, d)],
    "a shorter file": lambda i, info, d: [(info, d[:-1])] if i == 1 else [(info, d)],
    "another content": lambda i, info, d: [(info, bytes(len(d)))] if i == 1 else [(info, d)],
    "a head that is not first": lambda i, info, d: [(named("x"), b""), (info, d)] if i == 0 else [(info, d)],
}


@pytest.mark.parametrize("trick", HOSTILE)
def test_hostile_members_are_refused(world, archive, tmp_path, trick):
    bad = retar(archive, HOSTILE[trick])
    blobs = MemoryBlobs()
    with pytest.raises(Corrupt):
        take_in(bad, blobs, tmp_path)
    assert not blobs.exists(key_of(world.second))
    assert all(blobs.get(k, max_bytes=1 << 30) == world.blobs.get(k, max_bytes=1 << 30) for k in keys(blobs))


def test_something_after_the_manifest_is_refused(world, archive, tmp_path):
    with pytest.raises(Corrupt, match="goes on"):
        take_in(archive[:-1024] + b"x" * 1024, MemoryBlobs(), tmp_path)


def test_a_needless_or_missing_file_undoes_the_manifest(world, tmp_path):
    extra = closure(world.blobs, world.first)
    items = closure(world.blobs, world.second)
    more = tuple(dict.fromkeys([*extra, *items]))
    less = tuple(item for item in items if not item.key.startswith("vmstates/"))
    no_template = tuple(items[[i.key for i in items].index(key_of(world.template)) + 1 :])
    for members in (more, less, no_template):
        head = Announcement(world.second, "", members)
        data = b"".join(archive_pieces(world.blobs, head))
        blobs = MemoryBlobs()
        with pytest.raises(Corrupt, match="does not hold what"):
            take_in(data, blobs, tmp_path)
        assert not blobs.exists(key_of(world.second))


SNP = "snp_" + "a" * 64
KEY = f"manifests/{SNP}"
GOOD = {"format": "recess.archive", "version": 1, "snapshot": SNP, "name": "", "members": [[KEY, 5]]}


def test_a_head_goes_there_and_back():
    head = decode_announcement(json.dumps(GOOD).encode())
    assert decode_announcement(encode_announcement(head)) == head
    assert head.total_bytes == 5


@pytest.mark.parametrize(
    "change",
    [
        {"format": "tar"}, {"snapshot": "snp_x"}, {"snapshot": 5}, {"name": None}, {"name": "x" * 129}, {"members": []},
        {"members": [[KEY, -1]]}, {"members": [[KEY, True]]}, {"members": [[KEY, MEMBER_BYTES_MAX + 1]]},
        {"members": [[KEY, 1.5]]}, {"members": [["../x", 1], [KEY, 5]]}, {"members": [["manifests/lyr_" + "a" * 64, 1], [KEY, 5]]},
        {"members": [[KEY, 5], [KEY, 5]]}, {"members": [[KEY]]}, {"members": "x"}, {"members": [[KEY, 5]] * 100_000},
    ],
)  # fmt: skip
def test_a_head_that_lies_is_refused(change):
    with pytest.raises(Corrupt):
        decode_announcement(json.dumps(GOOD | change).encode())


def test_an_unknown_version():
    with pytest.raises(Incompatible):
        decode_announcement(json.dumps(GOOD | {"version": 2}).encode())


@pytest.mark.parametrize("data", [b"", b"x" * 100, bytes(512), b"x" * 4096, b"[]"])
def test_what_is_no_archive(data, tmp_path):
    with pytest.raises(Corrupt):
        take_in(data, MemoryBlobs(), tmp_path)


def test_a_huge_head_is_not_read(tmp_path):
    info = tarfile.TarInfo(HEADER_NAME)
    info.size = 1 << 30
    reads = []

    def read(size):
        reads.append(size)
        return info.tobuf(tarfile.USTAR_FORMAT)[:size] if len(reads) == 1 else bytes(size)

    with pytest.raises(Corrupt):
        ArchiveReader(read)
    assert sum(reads) == 512


def test_what_no_archive_can_hold():
    with pytest.raises(Unsupported):
        encode_announcement(Announcement(SNP, "", (Item(KEY, MEMBER_BYTES_MAX + 1),)))
