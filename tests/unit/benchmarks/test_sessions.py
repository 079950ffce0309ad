"""The session benchmark's tables, and what it says of a side that does not come up. Its loop: tests/e2e/test_bench_sessions.py."""

import csv
import sys

import pytest

from benchmarks import sessions


def test_a_worker_that_cannot_start_is_told_with_its_words(monkeypatch):
    monkeypatch.setattr(sessions, "PATIENCE_S", 0.0)
    with pytest.raises(RuntimeError, match="nobody did not get to turn 2"):
        sessions.length("nobody", sys.executable, 1)


def test_what_is_written(tmp_path):
    rows = [
        {"figure": "length 5", "side": "recess", "value": 0.5, "unit": "s", "n": 2, "samples": [0.4, 0.5]},
        {"figure": "length 5", "side": "dbos", "value": 1.25, "unit": "s", "n": 2, "samples": [1.2, 1.25]},
        {"figure": "card", "side": "recess", "value": 0, "unit": "of 5", "n": 5},
        {"figure": "card", "side": "dbos", "value": 5, "unit": "of 5", "n": 5},
    ]
    told = sessions.write(rows, {"recess": "", "dbos": ""}, tmp_path / "out")
    assert "| length 5 | 0.5 s | 1.25 s |" in told
    assert "| card | 0 of 5 | 5 of 5 |" in told
    with (tmp_path / "out" / "sessions.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [(row["figure"], row["side"], row["value"]) for row in found][1] == ("length 5", "dbos", "1.25")
    assert (tmp_path / "out" / "sessions.md").read_text() in told
