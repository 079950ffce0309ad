import stat

import pytest

from recess.errors import Corrupt
from recess.images import cpio


def test_an_independent_reader_finds_what_was_written():
    data = cpio.archive(
        [cpio.directory("modules"), cpio.file("init", b"#!x", executable=True), cpio.file("modules/order", b"a\nb\n")]
    )
    assert _parse(data) == {
        "modules": (stat.S_IFDIR | 0o755, b""),
        "init": (stat.S_IFREG | 0o755, b"#!x"),
        "modules/order": (stat.S_IFREG | 0o644, b"a\nb\n"),
    }


def test_the_same_entries_give_the_same_bytes():
    entries = [cpio.device("dev/console", 5, 1), cpio.file("a", b"abc")]
    assert cpio.archive(entries) == cpio.archive(list(entries))
    assert len(cpio.archive(entries)) % 512 == 0


def test_a_device_keeps_its_numbers():
    record = cpio.archive([cpio.device("dev/console", 5, 1)])
    numbers = [int(record[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
    assert numbers[1] == stat.S_IFCHR | 0o600
    assert numbers[9:11] == [5, 1]


def _parse(data: bytes) -> dict[str, tuple[int, bytes]]:
    """An independent reader of the newc form."""
    found, at = {}, 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        start = (at + 110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (fields[1], data[start : start + fields[6]])
        at = (start + fields[6] + 3) // 4 * 4


def test_a_file_is_read_back():
    made = cpio.archive([cpio.directory("d"), cpio.file("d/a", b"x" * 5), cpio.file("init", b"elf" * 100)])
    assert cpio.read_file(made, "init") == b"elf" * 100
    assert cpio.read_file(made, "d/a") == b"x" * 5


@pytest.mark.parametrize("cut", [0, 6, 50, 120, 240])
def test_an_archive_that_is_cut_is_corrupt(cut):
    made = cpio.archive([cpio.file("other", b"1" * 100), cpio.file("init", b"elf")])
    with pytest.raises(Corrupt):
        cpio.read_file(made[:cut], "init")
