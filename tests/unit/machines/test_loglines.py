"""What `logs` shows of an output: the last lines, those of a time, each with its time."""

import pytest

from recess.machines.loglines import Wanted, select
from recess.machines.outputlog import Piece, Said

SAID = Said(
    [
        Piece(1, b"one\ntw", 10),
        Piece(2, b"bad\n", 20),
        Piece(1, b"o\nthree\n", 30),
        Piece(1, b"fo", 40),
        Piece(1, b"ur", 50),
    ],
    18,
    4,
)


def shown(**wanted):
    said = select(SAID, Wanted(**wanted))
    assert (said.stdout, said.stderr) == (18, 4)  # where a follower goes on, whatever is shown
    return [(piece.stream, piece.data) for piece in said.pieces]


def test_all_of_it_is_left_as_it_is():
    assert select(SAID, Wanted()) is SAID


@pytest.mark.parametrize(
    ("count", "lines"),
    [
        (0, []),
        (1, [b"four"]),
        (3, [b"bad\n", b"three\n", b"four"]),
        (99, [b"one\n", b"two\n", b"bad\n", b"three\n", b"four"]),
    ],
)
def test_the_last_lines_also_where_streams_mix(count, lines):
    assert [data for _, data in shown(tail=count)] == lines


@pytest.mark.parametrize(
    ("bounds", "lines"),
    [
        ({"since_ns": 20}, [b"bad\n", b"three\n", b"four"]),
        ({"until_ns": 20}, [b"one\n", b"two\n", b"bad\n"]),  # a line is as old as its beginning
        ({"since_ns": 11, "until_ns": 30}, [b"bad\n", b"three\n"]),
        ({"since_ns": 11, "tail": 1}, [b"four"]),
        ({"since_ns": 51}, []),
    ],
)
def test_lines_of_a_time(bounds, lines):
    assert [data for _, data in shown(**bounds)] == lines


def test_each_line_with_its_time():
    said = Said([Piece(1, b"a\rb\nc\n", 1_700_000_000_123_456_789), Piece(2, b"old\n", 0)])
    assert [piece.data for piece in select(said, Wanted(timestamps=True)).pieces] == [
        b"2023-11-14T22:13:20.123456789Z a\rb\n",  # what is redrawn is one line
        b"2023-11-14T22:13:20.123456789Z c\n",
        b"- old\n",
    ]
