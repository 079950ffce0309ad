"""A session's log as one trace: freezes are inside, ids do not depend on who tells, a crash leaves no hole."""

from recess.contextlog.contract import Entry
from recess.sessions.spans import SpanMaker, span_id, trace_id


def entry(position, kind, ts, turn=0, ref="", **body):
    return Entry("ses_a", position, kind, body, turn, ref, "", 1, "v1", ts, 1)


LIFE = [
    entry(2, "turn.start", 100.0, 1, inbox=1, attempt=1),
    entry(3, "assistant", 102.0, 1, text="", tool_calls=[{}], usage={"prompt_tokens": 7}, model="m"),
    entry(4, "tool.start", 102.5, 1, "c", name="sh", effect="local"),
    entry(5, "tool.result", 104.0, 1, "c", output="x", error=True),
    entry(6, "ask", 104.5, 1, "q"),
    entry(7, "machine.snapshot", 110.0, figures={"durable_s": 0.5, "new_bytes": 9}, why="wait", away=True),
    entry(8, "machine.restore", 3710.0, seconds=0.25, rung=2, why="frozen", stale=False),
    entry(9, "turn.end", 3712.0, 1, status="done"),
]


def spans_of(entries, maker=None):
    maker = maker or SpanMaker()
    return [span for one in entries for span in maker.saw("ses_a", one)]


def test_one_turn_with_an_hour_of_frozen_time_in_it():
    found = {one.name: one for one in spans_of(LIFE)}
    assert list(found) == ["model", "tool sh", "snapshot", "frozen", "thaw", "turn 1"]
    turn = found["turn 1"]
    assert (turn.begun_s, turn.ended_s, turn.parent, turn.error) == (100.0, 3712.0, 0, "")
    assert all(one.parent == turn.ident for name, one in found.items() if name != "turn 1")
    assert {one.trace for one in found.values()} == {trace_id("ses_a")}
    assert len({one.ident for one in found.values()}) == len(found)
    assert (found["frozen"].begun_s, found["frozen"].ended_s) == (110.0, 3709.75)
    assert (found["thaw"].begun_s, found["thaw"].attributes["recess.rung"]) == (3709.75, 2)
    assert (found["snapshot"].begun_s, found["snapshot"].attributes["recess.new_bytes"]) == (109.5, 9)
    assert (found["model"].begun_s, found["model"].attributes["recess.prompt_tokens"]) == (100.0, 7)
    assert (found["tool sh"].error, found["tool sh"].ended_s) == ("failed", 104.0)


def test_whoever_goes_on_tells_the_same_trace():
    whole = spans_of(LIFE)
    for cut in range(len(LIFE)):
        maker = SpanMaker()
        maker.taken_up("ses_a", LIFE[:cut])
        assert spans_of(LIFE[:cut]) + spans_of(LIFE[cut:], maker) == whole, f"another server from {cut} on"


def test_a_turn_that_was_cut_and_one_that_nobody_saw_begin():
    log = [LIFE[0], entry(3, "turn.cut", 101.0, 1, cause="crash"), entry(4, "turn.start", 105.0, 1, inbox=1, attempt=2)]
    (turn,) = spans_of([*log, entry(5, "turn.end", 106.0, 1, status="failed", error="no")])
    assert (turn.begun_s, turn.attributes["recess.attempts"], turn.error) == (100.0, 2, "no")
    maker = SpanMaker()
    maker.taken_up("ses_a", [])
    assert [one.name for one in spans_of([LIFE[-1]], maker)] == []


def test_ids_are_of_the_right_size_and_never_nothing():
    assert 0 < trace_id("x") < 2**128
    assert 0 < span_id("x", "turn", 1) < 2**64
    assert span_id("x", "turn", 1) != span_id("x", "tool", 1) != span_id("y", "tool", 1)
