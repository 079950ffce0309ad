"""Any prefix of any log gives a valid transcript, and a tail gives the same one as the whole log."""

from hypothesis import given, settings
from hypothesis import strategies as st

from recess.contextlog.branch import mark_of, plan_tail
from recess.contextlog.contract import Entry
from recess.contextlog.transcript import check_transcript, messages, to_openai

CALL_IDS = st.sampled_from(["c1", "c2", "c3", "call_0", ""])
TEXTS = st.sampled_from(["", "hello", "a\nb", "é"])
EFFECTS = st.sampled_from(["pure", "keyed", "once", "local", "strange", None])
ODD = st.sampled_from([None, 7, "x", [], {}, True, {"id": "c1"}, [None], [{"id": 5, "name": "sh"}]])


def bodies(kind: str, position: int):
    to = st.integers(0, position - 1)
    call = st.fixed_dictionaries({"id": CALL_IDS, "name": st.sampled_from(["sh", "charge", ""]), "arguments": ODD})
    shapes = {
        "system": st.fixed_dictionaries({"text": TEXTS}),
        "user": st.fixed_dictionaries({"text": TEXTS, "mode": st.sampled_from(["queue", "steer"])}),
        "answer": st.fixed_dictionaries({"text": TEXTS, "hidden": st.booleans()}),
        "assistant": st.fixed_dictionaries(
            {"text": TEXTS, "tool_calls": st.lists(call, max_size=4) | ODD},
            optional={"partial": st.booleans(), "replaces": to | ODD, "ask": TEXTS},
        ),
        "tool.start": st.fixed_dictionaries({"name": TEXTS, "effect": EFFECTS}),
        "tool.result": st.fixed_dictionaries({"output": TEXTS | ODD, "error": st.booleans()}),
        "tool.settled": st.fixed_dictionaries({"output": TEXTS}),
        "tool.doubt": st.fixed_dictionaries({"reason": TEXTS}),
        "turn.start": st.fixed_dictionaries({"inbox": to | ODD}),
        "turn.end": st.fixed_dictionaries({"status": st.sampled_from(["done", "failed", "cancelled"])}),
        "turn.cut": st.fixed_dictionaries({"cause": st.sampled_from(["crash", "cancel"])}),
        "compact": st.fixed_dictionaries({"summary": TEXTS, "to": to}),
        "rewind": st.fixed_dictionaries({"to": to}),
        "fork": st.sampled_from([{"parent": "ses_p", "at": 1}, {"child": "ses_c", "at": 1}]),
        "machine.restore": st.fixed_dictionaries(
            {"rung": st.integers(1, 5) | ODD, "stale": st.booleans(), "position": st.integers(0, 9)}
        ),
        "machine.lost": st.fixed_dictionaries({"why": TEXTS}),
        "x.mine": ODD.map(lambda v: {"v": v}),
        "tool.future": st.just({}),
    }
    return shapes[kind]


KINDS = ["system", "user", "user", "answer", "assistant", "assistant", "assistant", "tool.start", "tool.start",
         "tool.result", "tool.result", "tool.settled", "tool.doubt", "turn.start", "turn.end", "turn.cut", "compact",
         "rewind", "fork", "machine.restore", "machine.lost", "x.mine", "tool.future"]  # fmt: skip


@st.composite
def logs(draw):
    size = draw(st.integers(0, 30))
    cut = draw(st.integers(0, 30))
    out = []
    for position in range(1, size + 1):
        kind = draw(st.sampled_from(KINDS))
        body = draw(bodies(kind, position))
        owner = "ses_parent" if position <= cut else "ses_child"
        out.append(Entry(owner, position, kind, body, 1, draw(CALL_IDS), "", 1, "v", 0.0, 1))
    return out


@settings(max_examples=300, deadline=None)
@given(logs())
def test_any_prefix_is_a_valid_transcript(entries):
    for end in range(len(entries) + 1):
        transcript = messages(entries[:end])
        assert check_transcript(transcript) == []
        assert len(to_openai(transcript)) == len(transcript)


@settings(max_examples=300, deadline=None)
@given(logs())
def test_a_tail_says_the_same_as_the_whole(entries):
    plan = plan_tail(mark for entry in reversed(entries) if (mark := mark_of(entry)))
    tail = [e for e in entries if e.position > plan.after or e.position == plan.system]
    assert messages(tail) == messages(entries)


@settings(max_examples=200, deadline=None)
@given(logs(), st.data())
def test_rewinding_to_a_position_brings_back_the_view_as_it_was(entries, data):
    to = data.draw(st.integers(0, len(entries)))
    rewind = Entry("ses_child", len(entries) + 1, "rewind", {"to": to}, 0, "", "", 1, "v", 0.0, 1)
    now = messages([*entries, rewind])
    assert check_transcript(now) == []
    before = messages(entries[:to])
    assert [m["text"] for m in now if m["role"] == "assistant"] == [
        m["text"] for m in before if m["role"] == "assistant"
    ]
