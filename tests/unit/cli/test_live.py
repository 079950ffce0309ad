"""The line of progress: what is drawn, how often, and what stays on the screen."""

import io

import pytest

from recess.cli.live import BAR_CELLS, LiveLine, counted, drawn
from recess.cli.output import Output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("copying 3 blobs: 1.0 MB of 4.0 MB", ("copying 3 blobs", 0.25, True)),
        ("copying: 500 kB of 1.0 GB", ("copying", 0.0005, True)),
        ("copying: 9 B of 0 B", ("copying", 1.0, True)),
        ("unpacking layer 2 of 4", ("unpacking layer", 0.5, False)),
        ("unpacking layer 9 of 4", ("unpacking layer", 1.0, False)),
        ("1.5 MB of 3.0 MB", ("", 0.5, True)),
        ("warming the template: sync", None),
        ("3 of them", None),
        ("", None),
    ],
)
def test_lines_that_count(text, expected):
    assert counted(text) == expected


def test_a_line_is_one_row_whatever_is_in_it():
    assert drawn("pulling x", 0.0, 80) == "pulling x"
    assert drawn("pulling x", 65.0, 80) == "pulling x  1 min 5 s"
    assert drawn("layer 1 of 2", 0.0, 80) == f"layer 1 of 2  [{'#' * (BAR_CELLS // 2)}{'.' * (BAR_CELLS // 2)}]"
    for width in (5, 20, 40, 60, 120):
        assert len(drawn("x" * 500 + ": 1 of 2", 100.0, width)) < width
    assert drawn("a\x1b[2Jb\r\nc", 0.0, 80) == "a[2Jbc"  # a guest's or a registry's words move no cursor


@pytest.fixture
def line():
    out, now = io.StringIO(), [0.0]
    made = LiveLine(out, columns=lambda: 200, clock=lambda: now[0])
    yield made, out, now
    made.end()


def shown(out):
    """What the screen holds: each row's last drawing."""
    return [row.rsplit("\r", 1)[-1].removesuffix("\x1b[K") for row in out.getvalue().split("\n")]


def test_steps_stand_below_each_other_with_what_they_took(line):
    live, out, now = line
    live.show("pulling x")
    now[0] = 3.0
    live.show("indexing")
    now[0] = 3.5
    live.end()
    live.end()
    assert shown(out) == ["pulling x  3.0 s", "indexing", ""]


def test_counts_replace_each_other_and_redraws_are_bounded(line):
    live, out, now = line
    for number in range(1001):
        now[0] = number / 1000
        live.show(f"copying: {number} of 1000")
    live.end()
    rows = shown(out)
    assert len(rows) == 2
    assert rows[0].startswith(f"copying: 1000 of 1000  [{'#' * BAR_CELLS}]")
    assert out.getvalue().count("\r") <= 13


def test_off_a_terminal_steps_are_lines_and_byte_counts_are_nothing(capsys):
    out = Output()
    for text in ("pulling x", "unpacking layer 1 of 2", "copying: 1.0 MB of 4.0 MB"):
        out.step(text)
    out.waiting("taking a snapshot")
    out.settle()
    assert capsys.readouterr().err == "pulling x\nunpacking layer 1 of 2\n"
    for silent in (Output(quiet=True), Output(as_json=True)):
        silent.step("pulling x")
        silent.settle()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_it_is_drawn_in_place(capsys, monkeypatch):
    out = Output()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    out.waiting("taking a snapshot")
    out.settle()
    out.line("snp_1")
    captured = capsys.readouterr()
    assert captured.err == "\rtaking a snapshot\x1b[K\rtaking a snapshot\x1b[K\n"
    assert captured.out == "snp_1\n"
