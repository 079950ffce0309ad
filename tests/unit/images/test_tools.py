import os
import threading
import time

import pytest

from recess.errors import MissingTool, OutOfSpace, Unavailable
from recess.images.tools import find_tool, run_tool


def test_output_is_returned_and_told_line_by_line():
    told: list[str] = []
    assert run_tool(["sh", "-c", "echo one; echo >&2; printf two"], progress=told.append) == "one\n\ntwo"
    assert told == ["one", "", "two"]


def test_a_missing_program_says_how_to_get_it():
    with pytest.raises(MissingTool, match="nosuchtool is not installed") as caught:
        find_tool("nosuchtool")
    assert "apt-get install" in caught.value.hint


def test_a_program_in_sbin_is_found():
    assert find_tool("mkfs.ext4").endswith("/mkfs.ext4")


def test_a_failure_tells_the_reason_and_keeps_the_log():
    with pytest.raises(Unavailable, match="status 3: E: broken") as caught:
        run_tool(["sh", "-c", "echo start; echo 'E: broken'; echo end; exit 3"])
    assert caught.value.details["log"] == "start\nE: broken\nend"


def test_a_full_disk_is_told_apart():
    with pytest.raises(OutOfSpace):
        run_tool(["sh", "-c", "echo 'write: No space left on device'; exit 1"])
    with pytest.raises(OutOfSpace):
        run_tool(["sh", "-c", "echo 'write: No space left on device'; seq 1000; exit 1"])


def test_cancelling_ends_the_program_and_what_it_started():
    cancel = threading.Event()
    pids: list[int] = []

    def line(text: str) -> None:
        pids.append(int(text))
        cancel.set()

    with pytest.raises(KeyboardInterrupt):
        run_tool(["sh", "-c", "sleep 60 & echo $!; wait"], progress=line, cancel=cancel)
    assert _gone(pids[0])


def test_an_exception_while_telling_ends_the_program():
    pids: list[int] = []

    def line(text: str) -> None:
        pids.append(int(text))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tool(["sh", "-c", "echo $$; exec sleep 60"], progress=line)
    assert _gone(pids[0])


def _gone(pid: int) -> bool:
    """Tell whether a process has ended within 5 s (a zombie that nobody reaps counts as ended)."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            with open(f"/proc/{pid}/stat") as handle:
                if handle.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except OSError:
            return True
        os.sched_yield()
    return False
