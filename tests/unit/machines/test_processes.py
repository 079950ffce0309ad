"""A guest's process table out of three files of /proc: sane rows, and nonsense left out."""

from recess.machines.processes import parse

STAT = b"42 (a (b) c) S 1 42 42 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 1 0 12345 1000000 256 18446744073709551615"
STATUS = b"Name:\tx\nUid:\t1000\t1000\t1000\t1000\n"


def test_a_process():
    found = parse(42, STAT, STATUS, b"python3\0-m\0x\0")
    assert found is not None
    assert (found.pid, found.ppid, found.uid, found.state) == (42, 1, 1000, "S")
    assert (found.cpu_s, found.rss_bytes, found.command) == (2.0, 256 * 4096, "python3 -m x")


def test_kernel_threads_are_left_out_and_zombies_are_not():
    assert parse(42, STAT, STATUS, b"") is None
    assert parse(42, STAT.replace(b") S 1", b") Z 1"), STATUS, b"").command == "[a (b) c]"


def test_nonsense_is_left_out():
    for stat, status in (
        (b"", STATUS),
        (b"42 (x) S", STATUS),
        (STAT, b""),
        (STAT, b"Uid:\tx\n"),
        (b"\xff" * 99, STATUS),
    ):
        assert parse(42, stat, status, b"x\0") is None
