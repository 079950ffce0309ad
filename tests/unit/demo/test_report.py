import itertools
import json
import re

import pytest

from recess.demo.report import Report, StoryFailed, show_figure


def make() -> tuple[Report, list[str]]:
    said: list[str] = []
    ticks = itertools.count()
    return Report(said.append, clock=lambda: float(next(ticks))), said


def test_a_step_is_timed_told_and_kept() -> None:
    report, said = make()
    step = report.begin("lunch", "nobody says anything")
    report.check(step, "it is frozen", True)
    report.end(step, standstill_s=0.0213, stored_bytes=3_300_000, rung=2)
    assert (step.at_s, step.seconds) == (1.0, 1.0)
    assert said[0].endswith("nobody says anything")
    assert said[1].strip() == "ok  it is frozen"
    assert "standstill 21 ms, stored 3.3 MB, rung 2" in said[2]
    table = report.table()
    assert table[0].split()[:3] == ["step", "rung", "standstill"]
    assert table[1].split() == ["lunch", "2", "21", "ms", "-", "-", "3.3", "MB", "-", "1.0", "s"]
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["ok"], data["checks"], data["steps"][0]["figures"]["stored_bytes"]) == (True, 1, 3_300_000)


def test_a_check_that_does_not_hold_ends_the_story_and_says_what_was_seen() -> None:
    report, _ = make()
    step = report.begin("crash", "power")
    with pytest.raises(StoryFailed, match="charge stands once") as caught:
        report.check(step, "the charge stands once", False, {"calls": 2})
    assert caught.value.details["seen"] == "{'calls': 2}"
    assert step.checks == []
    assert caught.value.exit_code == 1


def test_a_machine_that_was_put_away_has_no_standstill_but_is_gone_after_a_while() -> None:
    report, _ = make()
    report.end(report.begin("lunch", "x"), durable_s=0.3, freeze_to_gone_s=0.35)
    assert re.split(r" {2,}", report.table()[1]) == ["lunch", "-", "not woken", "300 ms", "350 ms", "-", "-", "1.0 s"]


def test_steps_without_a_machine_are_not_in_the_table() -> None:
    report, _ = make()
    report.end(report.begin("start", "x"), server_s=1.0)
    assert len(report.table()) == 1


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("restore_s", 1.5, "restore 1.5 s"),
        ("given_back_bytes", 51_000_000, "given back 51.0 MB"),
        ("why_s", "x", "why s x"),
    ],
)
def test_figures_are_shown_by_their_unit(name, value, shown) -> None:
    assert show_figure(name, value) == shown
