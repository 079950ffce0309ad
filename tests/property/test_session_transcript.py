"""The agent's transcript and the host's are the same function, on any log; and it is always valid."""

from hypothesis import given, settings
from hypothesis import strategies as st
from recess_agent.settled import Settled
from recess_agent.transcript import build
from recess_agent.transcript import messages as agent_messages
from recess_agent.transcript import to_openai as agent_openai

from recess.contextlog.contract import Entry
from recess.contextlog.transcript import check_transcript
from recess.contextlog.transcript import messages as host_messages
from recess.contextlog.transcript import to_openai as host_openai
from recess.sessions.channel import entry_data

IDS = st.sampled_from(["c0", "c1", "c2", ""])
TEXT = st.sampled_from(["", "one", "two"])
CALL = st.fixed_dictionaries(
    {"id": IDS, "name": st.sampled_from(["f", "g", ""]), "arguments": st.sampled_from([{}, {"a": 1}, "raw"])}
)
NUMBER = st.integers(0, 40)

BODIES = {
    "system": st.fixed_dictionaries({"text": TEXT}),
    "user": st.fixed_dictionaries({"text": TEXT}, optional={"mode": st.sampled_from(["queue", "steer"])}),
    "answer": st.fixed_dictionaries({"text": TEXT}, optional={"hidden": st.booleans()}),
    "assistant": st.fixed_dictionaries(
        {"text": TEXT, "tool_calls": st.lists(CALL, max_size=3), "part": NUMBER},
        optional={"partial": st.booleans(), "replaces": NUMBER, "ask": TEXT},
    ),
    "tool.start": st.fixed_dictionaries({"name": TEXT, "effect": st.sampled_from(["local", "pure", "keyed", "once"])}),
    "tool.result": st.fixed_dictionaries({"output": TEXT}, optional={"error": st.booleans()}),
    "tool.settled": st.fixed_dictionaries({"output": TEXT, "by": st.just("verify")}),
    "tool.doubt": st.fixed_dictionaries({"reason": TEXT}),
    "turn.start": st.fixed_dictionaries({"inbox": NUMBER, "attempt": st.just(1)}),
    "turn.end": st.fixed_dictionaries({"status": st.sampled_from(["done", "failed", "cancelled"])}, optional={"error": TEXT}),
    "turn.cut": st.fixed_dictionaries({"cause": st.sampled_from(["crash", "fork"])}, optional={"detail": TEXT}),
    "machine.restore": st.fixed_dictionaries(
        {"rung": st.integers(1, 5), "stale": st.booleans(), "position": NUMBER, "head": NUMBER, "why": TEXT},
        optional={"lost": TEXT},
    ),
    "machine.lost": st.fixed_dictionaries({"why": TEXT}),
    "compact": st.fixed_dictionaries({"summary": TEXT, "to": NUMBER}),
    "rewind": st.fixed_dictionaries({"to": NUMBER}),
    "fork": st.fixed_dictionaries({"parent": st.just("ses_p"), "at": NUMBER}),
    "x.own": st.fixed_dictionaries({}),
}  # fmt: skip
ENTRY = st.sampled_from(sorted(BODIES)).flatmap(
    lambda kind: st.tuples(st.just(kind), BODIES[kind], IDS, st.sampled_from(["a", "b"]))
)


@settings(max_examples=400, deadline=None)
@given(st.lists(ENTRY, max_size=30))
def test_host_and_agent_agree_on_any_log(drawn):
    log = [
        Entry(session, i + 1, kind, body, 1, ref, "", 1, "v", 0.0, 1)
        for i, (kind, body, ref, session) in enumerate(drawn)
    ]
    ours = agent_messages([entry_data(e) for e in log])
    assert ours == host_messages(log)
    assert check_transcript(ours) == []
    assert agent_openai(ours) == host_openai(ours)


def spoil(value):
    """Change everything that can be changed in a message."""
    for one in value.values() if isinstance(value, dict) else value:
        if isinstance(one, (dict, list)):
            spoil(one)
    value.clear()


@settings(max_examples=600, deadline=None)
@given(st.lists(ENTRY, max_size=30), st.lists(st.integers(1, 6), min_size=1, max_size=30))
def test_what_is_kept_of_a_transcript_is_what_it_would_be_made_anew(drawn, steps):
    whole = [
        {"session": session, "position": i + 1, "kind": kind, "body": body, "turn": 1, "ref": ref}
        for i, (kind, body, ref, session) in enumerate(drawn)
    ]
    neutral, openai = Settled(list), Settled(agent_openai)
    log = []
    for step in steps:
        log += whole[len(log) : len(log) + step]
        anew = agent_messages(log)
        assert neutral.messages(log) == anew
        shown = openai.messages(log)
        assert shown == agent_openai(anew)
        for one in shown:
            spoil(one)


def turn_of(n):
    """One plain turn, as a log has it."""
    call = {"id": f"c{n}", "name": "f", "arguments": {"n": n}}
    made = [
        ("user", {"text": str(n)}, ""),
        ("turn.start", {"inbox": 6 * n + 1, "attempt": 1}, ""),
        ("assistant", {"text": "", "tool_calls": [call], "part": 0}, ""),
        ("tool.start", {"name": "f", "effect": "once"}, call["id"]),
        ("tool.result", {"output": "x"}, call["id"]),
        ("turn.end", {"status": "done"}, ""),
    ]
    return [
        {"session": "s", "position": 6 * n + i + 1, "kind": kind, "body": body, "turn": n + 1, "ref": ref}
        for i, (kind, body, ref) in enumerate(made)
    ]


def test_a_turn_costs_its_own_entries_whatever_the_past(monkeypatch):
    built = []
    monkeypatch.setattr("recess_agent.settled.build", lambda log: built.append(len(log)) or build(log))
    kept, log = Settled(agent_openai), []
    for n in range(50):
        log += turn_of(n)
        assert len(kept.messages(log)) == 3 * (n + 1)
    assert max(built) == 6
