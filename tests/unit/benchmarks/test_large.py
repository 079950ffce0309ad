"""The large machine's benchmark: its table, and the program that the guest runs, run here."""

import subprocess
import sys

from benchmarks.large import WORKER, Change, markdown

FACTS = {"date": "2026-11-23", "cpu": "a CPU", "cores": 2, "load": (0.5, 0.4, 0.3)}
ARGS = {"repeats": 3, "much": 1, "resident": 1024, "filled": 512}


def test_the_table_has_a_row_for_each_change_and_tells_young_from_old():
    one = Change("10 MiB of memory", "memory", 10, [10.0, 12.0, 20.0], [90.0, 100.0, 1100.0], [5.5, 5.61, 5.7])
    shown = markdown([one], ARGS, FACTS).splitlines()
    assert "--resident 1024 --filled 512" in shown[0]
    assert "| 10 MiB of memory | 3 | 12.0 / 20.0 | 10.0, 20.0 | 100 / 1,100 | 5.61 / 5.70 |" in shown


def test_the_guests_python_changes_what_it_is_told_to(tmp_path):
    program = [sys.executable, "-u", "-c", WORKER.replace("/root/large", str(tmp_path / "large")), "2", "1"]
    said = "sum 0\nsum 0\nmemory 1\nsum 0\ndisk 3\nsum 0\nsum 0\n"
    done = subprocess.run(program, input=said, capture_output=True, text=True, timeout=60, check=True)
    ready, first, same, _, memory, _, disk, again = done.stdout.split()
    assert (ready, first, disk) == ("ready", same, again)
    assert len({first, memory, disk}) == 3
    assert (tmp_path / "large").stat().st_size == 1 << 20
