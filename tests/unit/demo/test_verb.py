"""`recess demo` as a command: what a broken story does to the exit code and the reader."""

from __future__ import annotations

import json

import pytest

import recess.demo
from recess.cli.main import run_cli
from recess.demo import StoryOptions
from recess.demo.report import Report, StoryFailed


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RECESS_HOME", str(tmp_path))


def tells(monkeypatch, outcome):
    async def tell(config, options: StoryOptions, say) -> Report:
        say("once upon a time")
        if isinstance(outcome, Exception):
            raise outcome
        return Report(say)

    monkeypatch.setattr(recess.demo, "tell_story", tell)


def test_a_story_that_holds(monkeypatch, capsys) -> None:
    tells(monkeypatch, None)
    assert run_cli(["demo"]) == 0
    assert capsys.readouterr().out == "once upon a time\n"


@pytest.mark.parametrize(
    "outcome", [StoryFailed("step 'crash': not true: once", seen="two"), KeyError("rung"), TimeoutError()]
)
def test_a_story_that_breaks_is_loud(monkeypatch, capsys, outcome) -> None:
    tells(monkeypatch, outcome)
    assert run_cli(["demo"]) == 1
    said = capsys.readouterr().err
    assert "step 'crash'" in said or "the story broke" in said


async def test_the_report_is_written_also_when_the_story_fails(tmp_path) -> None:
    from recess.config import load_config
    from recess.demo import tell_story

    path = tmp_path / "r.json"
    # No guest tools anywhere: the server comes up or not, but no machine can; the story must break, not hang or pass.
    config = load_config({}, home=str(tmp_path / "h"), driver="none-such")
    with pytest.raises(StoryFailed):
        await tell_story(config, StoryOptions(json_path=path), lambda _line: None)
    report = json.loads(path.read_text())
    assert report["ok"] is False
    assert "server" in report["error"]
    assert list((tmp_path / "h").glob("demo-*")) == []
