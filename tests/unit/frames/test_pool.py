"""Threads of one process, and who goes first."""

import subprocess
import sys

import pytest

from recess.frames.pool import TURN_S, take_short_turns


@pytest.fixture
def python_s():
    """Python's own length of a turn, for the time of a test."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    yield 0.005
    sys.setswitchinterval(before)


def test_turns_are_shortened_and_never_lengthened(python_s):
    take_short_turns(1.0)
    assert sys.getswitchinterval() == pytest.approx(python_s, rel=0.05)
    take_short_turns()
    assert sys.getswitchinterval() == pytest.approx(TURN_S, rel=0.05)
    take_short_turns(0.0001)
    take_short_turns()
    assert sys.getswitchinterval() == pytest.approx(0.0001, rel=0.05)  # CPython cuts to microseconds


def test_the_pagers_nursery_takes_the_shortest():
    """Its forks have what it has. Nobody is at the other end, so it returns at once."""
    code = (
        "import socket, sys; from recess.node.pager import nursery\n"
        "ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET); ours.close(); nursery(theirs)\n"
        "print(sys.getswitchinterval() <= 0.00011)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "True", done.stderr
