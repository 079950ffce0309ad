import json
from pathlib import Path

import pytest

from recess.contextlog.contract import Entry
from recess.contextlog.transcript import check_transcript, messages, to_openai

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "log_transcripts.json").read_text())


def log(*rows, session="ses_a"):
    return [Entry(session, i, kind, body, 1, ref, "", 1, "v", 0.0, 1) for i, (kind, ref, body) in enumerate(rows, 1)]


def without_wording(message):
    """A note is free in its words, nothing else is."""
    return {k: v for k, v in message.items() if not (message.get("note") and k == "text")}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_transcripts(case):
    got = messages(log(*case["entries"]))
    assert [without_wording(m) for m in got] == case["messages"]
    assert all(m["text"].startswith("[recess] ") for m in got if m.get("note"))
    assert check_transcript(got) == []


CALL = {"id": "c1", "name": "sh", "arguments": {}}
ASKED = ("assistant", "", {"text": "x", "tool_calls": [CALL]})


def test_two_calls_of_one_id_get_a_result_each():
    entries = log(
        ("assistant", "", {"text": "", "tool_calls": [CALL, CALL]}),
        ("tool.result", "c1", {"output": "first"}),
        ("tool.result", "c1", {"output": "second"}),
    )
    got = messages(entries)
    assert [m.get("text") for m in got] == ["", "first", "second"]
    assert check_transcript(got) == []


def test_an_id_used_again_by_a_later_reply_is_that_replys():
    entries = log(ASKED, ("tool.result", "c1", {"output": "one"}), ASKED, ("tool.result", "c1", {"output": "two"}))
    assert [m["text"] for m in messages(entries) if m["role"] == "tool"] == ["one", "two"]


def test_a_doubt_settled_after_the_model_saw_it_is_a_note():
    entries = log(
        ASKED,
        ("tool.start", "c1", {"effect": "once"}),
        ("tool.doubt", "c1", {"reason": "crash"}),
        ("assistant", "", {"text": "hm"}),
        ("tool.settled", "c1", {"output": "it was charged", "by": "human"}),
    )
    got = messages(entries)
    assert "outcome unknown" in got[1]["text"]
    assert got[-1]["note"]
    assert "it was charged" in got[-1]["text"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([ASKED], "no result is recorded"),
        ([ASKED, ("turn.cut", "", {"cause": "oom"})], "cut (oom): it was not started"),
        ([ASKED, ("tool.start", "c1", {"effect": "pure"}), ("turn.cut", "", {"cause": "crash"})], "it had begun"),
        ([ASKED, ("tool.start", "c1", {"effect": "once"}), ("turn.cut", "", {})], "outcome unknown"),
        ([ASKED, ("tool.start", "c1", {"effect": "once"}), ("fork", "", {"parent": "p"})], "outcome unknown"),
        ([ASKED, ("fork", "", {"child": "c"})], "no result is recorded"),
    ],
)
def test_why_a_call_has_no_result(rows, words):
    tool = messages(log(*rows))[1]
    assert words in tool["text"]
    assert tool["error"] is True


def test_a_change_of_owner_is_a_fork_even_before_its_entry_is_written():
    parent = log(ASKED)
    child = [Entry("ses_b", 2, "note", {}, 0, "", "", 1, "v", 0.0, 1)]
    assert messages([*parent, *child])[1]["text"] == "not run in this branch"


def test_fresh_and_rebooted_machines_are_told():
    for rung, words in ((4, "booted again"), (5, "fresh one")):
        got = messages(log(("machine.restore", "", {"rung": rung, "stale": False, "position": 3, "lost": "the cache"})))
        assert words in got[0]["text"]
        assert "the cache" in got[0]["text"]


def test_openai_form():
    got = to_openai(messages(log(*GOLDEN[3]["entries"])))
    assert got[1] == {
        "role": "assistant",
        "content": "both",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "a", "arguments": "{}"}},
            {"id": "c2", "type": "function", "function": {"name": "b", "arguments": "not json"}},
        ],
    }
    assert got[2:] == [
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "Error: two"},
    ]
    assert to_openai(messages(log(("assistant", "", {"text": "", "tool_calls": [CALL]}))))[0]["content"] is None


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([{"role": "tool", "text": "", "tool_call_id": "c"}], "without a call"),
        ([{"role": "assistant", "text": "", "tool_calls": [{"id": "c"}]}], "no results"),
        (
            [{"role": "assistant", "text": "", "tool_calls": [{"id": "c"}]}, {"role": "user", "text": ""}],
            "before the results",
        ),
        (
            [
                {"role": "assistant", "text": "", "tool_calls": [{"id": "c"}]},
                {"role": "tool", "text": "", "tool_call_id": "d"},
            ],
            "another call",
        ),
        ([{"role": "user", "text": ""}, {"role": "system", "text": ""}], "not the first"),
        ([{"role": "assistant", "text": ""}], "empty reply"),
        (
            [
                {"role": "assistant", "text": "", "tool_calls": [{"id": ""}]},
                {"role": "tool", "text": "", "tool_call_id": ""},
            ],
            "empty or not unique",
        ),
        ([{"role": "robot", "text": ""}], "role"),
        ([{"role": "user"}], "no text"),
    ],
)
def test_the_judge_sees_each_fault(bad, words):
    assert any(words in line for line in check_transcript(bad))
