"""What a session has cost and saved, from its log; counters for a scraper; observers that break harm nobody."""

import pytest

from recess.contextlog.contract import Entry
from recess.sessions.cost import cost_of
from recess.sessions.counters import OTHER, SERIES_MAX, Counters
from recess.sessions.observing import Observers
from recess.testing.session_world import coder_world


def entry(position, kind, ts, session="s", **body):
    return Entry(session, position, kind, body, 0, "", "", 1, "v", ts, 1)


LOG = [
    entry(1, "machine.snapshot", 1.0, session="parent", figures={"new_bytes": 1000}),
    entry(2, "machine.restore", 100.0, seconds=0.5, rung=5, bytes_read=0),
    entry(3, "assistant", 101.0, usage={"prompt_tokens": 10, "completion_tokens": 2}),
    entry(4, "tool.start", 102.0),
    entry(5, "turn.end", 103.0),
    entry(
        6,
        "machine.snapshot",
        110.0,
        snapshot="a",
        figures={"new_bytes": 50, "cpu_s": 0.2, "standstill_s": 0.01},
        away=False,
    ),
    entry(7, "machine.snapshot", 200.0, snapshot="b", figures={"new_bytes": 7, "cpu_s": 0.1}, away=True),
    entry(8, "machine.restore", 3800.0, seconds=0.25, rung=2, bytes_read=40),
    entry(9, "machine.lost", 3900.0),
]


def test_sums():
    cost = cost_of("s", LOG, {"b"}, now=4000.0)
    assert (cost.snapshots, cost.written_bytes, cost.stored_bytes, cost.read_bytes) == (2, 57, 7, 40)
    assert cost.cpu_s == pytest.approx(0.3)
    assert (cost.up_s, cost.away_s, cost.machine_hours_saved) == (100.0 + 100.0, 3600.0, 1.0)
    assert (cost.thaws, cost.thaw_s, cost.turns, cost.replies, cost.tool_calls) == (2, 0.75, 1, 1, 1)
    assert (cost.input_tokens, cost.output_tokens) == (10, 2)


def test_time_runs_on_until_the_session_is_closed():
    assert cost_of("s", LOG[:7], set(), now=7400.0).away_s == 7200.0
    assert cost_of("s", LOG[:7], set(), now=7400.0, closed=True).away_s == 0.0
    assert cost_of("s", LOG[:5], set(), now=150.0).up_s == 50.0
    old = entry(6, "machine.snapshot", 110.0, why="idle", figures={})
    assert cost_of("s", [*LOG[:5], old], set(), now=120.0).away_s == 10.0, "entries of before the word"


async def test_the_sums_of_a_real_life(tmp_path):
    async with coder_world(tmp_path) as (w, s):
        await w.say(s, "one", turn=1)
        await w.until_state(s, "frozen")
        w.clock.jump(7200)
        cost = await w.sessions.cost(s)
        assert (cost.turns, cost.snapshots, cost.thaws) == (1, 1, 1)
        assert 7200 <= cost.away_s < 7300
        assert 0 < cost.up_s < 100
        log = await w.entries(s)
        assert cost_of(s, log, set(), now=log[-1].ts).away_s == 0.0
        child = await w.sessions.fork(s)
        assert (await w.sessions.cost(child.id)).turns == 0, "a fork's cost is its own"


def test_counters_only_rise_and_stay_bounded():
    counters = Counters()
    for one in LOG:
        counters.saw("s", one)
    found = {(one.name, one.labels): one.value for one in counters.samples()}
    assert found[("recess_thaws_total", (("rung", "2"),))] == 1
    assert found[("recess_session_snapshots_total", (("away", "yes"),))] == 1
    assert found[("recess_snapshot_stored_bytes_total", ())] == 1057
    for number in range(2 * SERIES_MAX):
        counters.saw("s", entry(1, "tool.start", 1.0, name=f"tool-{number}"))
    samples = counters.samples()
    assert len(samples) <= SERIES_MAX + 20
    tools = [one for one in samples if one.name == "recess_tool_calls_total"]
    assert sum(one.value for one in tools) == 2 * SERIES_MAX + 1, "nothing is lost, only its name"
    assert any(one.labels == (("tool", OTHER),) for one in tools)


def test_an_observer_that_breaks_harms_nobody(caplog):
    class Broken:
        def taken_up(self, session, entries):
            raise ValueError("taken up")

        def saw(self, session, entry):
            raise ValueError("saw")

    counters = Counters()
    both = Observers([Broken(), counters])
    both.taken_up("s", [])
    both.saw("s", LOG[1])
    assert counters.samples()[0].name == "recess_log_entries_total"
    assert "an observer of sessions failed" in caplog.text
