import subprocess
import sys

import pytest

from recess.demo.heartbeat import _PROGRAM, read_result
from recess.errors import GuestFailed


def test_the_program_beats_until_its_input_is_closed_and_tells_its_longest_silence() -> None:
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.readline()
    rest, _ = process.communicate(timeout=20)  # closes its input
    longest, beats = read_result(first + rest)
    assert first == b"up\n"
    assert longest >= 0
    assert beats >= 0


@pytest.mark.parametrize("output", [b"", b"up\n", b"up\n{", b'up\n{"beats": 1}', b"up\nnull"])
def test_a_heartbeat_that_was_cut_off_is_no_figure(output: bytes) -> None:
    with pytest.raises(GuestFailed):
        read_result(output)


def test_result() -> None:
    assert read_result(b'up\n{"longest_s": 0.02, "beats": 7}') == (0.02, 7)
