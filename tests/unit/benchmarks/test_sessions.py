"""The session benchmark's tables, its judge of transcripts, and what it says of a side that does not come up. Its loop:
tests/e2e/test_bench_sessions.py."""

import csv
import sys

import pytest

from benchmarks import session_cells, sessions
from benchmarks.session_worker import asked, called, charged
from benchmarks.session_world import transcript_faults
from benchmarks.sessions import Row


def test_a_worker_that_cannot_start_is_told_with_its_words(monkeypatch):
    monkeypatch.setattr(session_cells, "PATIENCE_S", 0.0)
    with pytest.raises(RuntimeError, match="nobody did not get to turn 3"):
        session_cells.deploy("nobody", sys.executable)


def test_a_side_that_comes_no_farther_is_given_up(monkeypatch):
    monkeypatch.setattr(session_cells, "LOOK_S", 0.0)
    given_up = pytest.raises(RuntimeError, match=r"given up at turn 0, after \d+ s and with 0.0 GB kept")
    with session_cells.life_of("nobody", sys.executable, 9) as life, given_up:
        life.grow(9, session_cells.Cap(0.0, 1e9))


def turn(number):
    return [asked(number), called(number, "words"), charged(number, "paid")]


def test_a_whole_transcript_has_no_fault():
    note = {"role": "user", "content": "[recess] the machine is new"}
    assert transcript_faults([*turn(1), note, *turn(2), asked(3)], 3) == []


@pytest.mark.parametrize(
    ("messages", "number", "fault"),
    [
        ([asked(1), called(1, "w"), asked(2)], 2, "calls without results"),
        ([asked(1), called(1, "w")], 1, "calls without results"),
        ([asked(1), charged(1, "paid")], 1, "a result without its call"),
        ([*turn(1), charged(1, "paid"), asked(2)], 2, "a result without its call"),
        ([*turn(1), asked(2), asked(2)], 2, "user's messages"),
        ([*turn(1), asked(3)], 3, "user's messages"),
    ],
)
def test_what_is_wrong_with_a_transcript_is_told(messages, number, fault):
    assert any(fault in one for one in transcript_faults(messages, number))


def test_what_is_written(tmp_path):
    rows = [
        Row("length 5", "recess", 0.5, "s", 2, (0.4, 0.5)),
        Row("length 5", "dbos", 1.25, "s", 2, (1.2, 1.25)),
        Row("card", "recess", 0, "of 5", 5),
        Row("card", "dbos", 5, "of 5", 5),
        Row("race", "recess", 0, "doubled or lost in 1"),
        Row("race", "dbos", None, why="it has no second worker"),
        Row("fork", "dbos", None, why="it has no second worker"),
    ]
    assert sessions.Row("orphan", "recess", 1000, "of 1000 valid").cell() == "1000 of 1000 valid"
    told = sessions.write(rows, ["recess", "dbos"], tmp_path / "out")
    assert "| length 5 | 0.5 s | 1.25 s |" in told
    assert "| card | 0 of 5 | 5 of 5 |" in told
    assert "| race | 0 doubled or lost in 1 | - |" in told
    assert "- dbos, race; fork: it has no second worker" in told
    with (tmp_path / "out" / "sessions.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [(row["figure"], row["side"], row["value"]) for row in found][1] == ("length 5", "dbos", "1.25")
    assert found[-1]["not_measured"] == "it has no second worker"
    assert (tmp_path / "out" / "sessions.md").read_text() in told


def test_a_side_that_fails_leaves_the_others_their_figures(capsys):
    run = sessions.Run(sessions.parse([]), {"recess": "a", "dbos": "b", "temporal": "c"})

    def measure(name, python):
        if name == "dbos":
            raise RuntimeError("it ended")
        run.keep(Row("card", name, 1))

    run.each("card", measure)
    assert [(row.side, row.value, row.why) for row in run.rows] == [
        ("recess", 1, ""),
        ("dbos", None, "failed: it ended"),
        ("temporal", None, sessions.NO_SERVER),
    ]
    capsys.readouterr()


def test_an_unknown_figure_is_refused(capsys):
    with pytest.raises(SystemExit):
        sessions.parse(["--only", "length,nothing"])
    assert "no such figure: nothing" in capsys.readouterr().err
