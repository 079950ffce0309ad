"""The lazy restore's benchmark: its table, and the program that the guest runs, run here."""

import subprocess
import sys

from benchmarks.lazy import HOLDER, Way, markdown

FACTS = {"date": "2026-11-23", "cpu": "a CPU", "cores": 2, "load": (0.5, 0.4, 0.3)}
ARGS = {"repeats": 2, "resident": 1024, "remote_resident": 256}


def test_the_table_has_a_row_for_each_way_and_says_what_was_not_counted():
    one = Way(
        "lazily", [60.0, 80.0], [90.0, 110.0], [300.0, 400.0], [40.0, 60.0], [0.002, 0.004], {"restore": [70.0, 80.0]}
    )
    shown = markdown([one, Way("mapped", [40.0], [50.0], [60.0])], ARGS, FACTS).splitlines()
    assert "--resident 1024" in shown[0]
    assert "| lazily | 2 | 60 / 80 | 90 / 110 | 300 / 400 | 40 | 0.20% |" in shown
    assert "| mapped | 1 | 40 / 40 | 50 / 50 | 60 / 60 | - | - |" in shown
    assert "- lazily: restore 70.0" in shown


def test_the_guests_python_answers_from_its_memory():
    program = [sys.executable, "-u", "-c", HOLDER, "3000"]
    done = subprocess.run(program, input="1\n2\n1\n", capture_output=True, text=True, timeout=60, check=True)
    ready, first, second, again = done.stdout.split()
    assert ready == "ready"
    assert first == again != second
