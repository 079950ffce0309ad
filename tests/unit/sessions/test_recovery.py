"""The settle pass against its table: effect class by whether the machine still has what the call did."""

import pytest

from recess.contextlog.contract import Delta, Draft
from recess.sessions.facts import OpenCall, TurnFacts
from recess.sessions.recovery import DOUBT, GAP, INTERRUPTED, LOST, join_pieces, settle

S = 10  # the snapshot's position: calls at 7 began before it, calls at 15 after


def facts(*calls, **changes):
    known = {"turn": 3, "attempt": 2, "open": True, "started": 5}
    return TurnFacts(**{**known, "calls": {call.call_id: call for call in calls}, **changes})


def call(effect, *, at=15, verify=False, call_id="c1"):
    return OpenCall(call_id, at, "charge", {}, effect, verify)


def settled(*calls, lives=False, deltas=(), **changes):
    return settle(
        facts(*calls, **changes), deltas, cause="crash", detail="gone", machine_lives=lives, machine_position=S
    )


TABLE = [
    # effect, verify, began at, the machine lived on -> kind of what settles it ("" = left to the agent), its text
    ("local", False, 15, True, "tool.result", INTERRUPTED),
    ("local", False, 7, False, "tool.result", INTERRUPTED),
    ("local", False, 10, False, "tool.result", INTERRUPTED),
    ("local", False, 15, False, "tool.result", LOST),
    ("local", True, 15, False, "tool.result", LOST),
    ("pure", False, 15, True, "", ""),
    ("pure", False, 15, False, "", ""),
    ("keyed", False, 15, True, "", ""),
    ("keyed", False, 7, False, "", ""),
    ("once", True, 15, True, "", ""),
    ("once", True, 15, False, "", ""),
    ("once", False, 15, True, "tool.doubt", DOUBT),
    ("once", False, 7, False, "tool.doubt", DOUBT),
    ("", False, 15, False, "tool.doubt", DOUBT),
    ("", True, 15, True, "tool.doubt", DOUBT),
    ("of the future", True, 15, False, "tool.doubt", DOUBT),
]


@pytest.mark.parametrize(("effect", "verify", "at", "lives", "kind", "text"), TABLE)
def test_the_table(effect, verify, at, lives, kind, text):
    *calls, cut = settled(call(effect, at=at, verify=verify), lives=lives)
    assert (cut.kind, cut.body, cut.turn, cut.key) == ("turn.cut", {"cause": "crash", "detail": "gone"}, 3, "t3/cut/2")
    if not kind:
        assert calls == []
        return
    (one,) = calls
    assert (one.kind, one.turn, one.ref) == (kind, 3, "c1")
    assert text in (one.body.get("output"), one.body.get("reason"))
    assert one.key == f"t3/c1/{kind.removeprefix('tool.')}"


def test_a_settle_says_the_same_however_often_and_in_the_order_of_the_calls():
    calls = [call("local", at=15, call_id="b"), call("once", at=12, call_id="a")]
    first = settled(*calls)
    assert first == settled(*reversed(calls))
    assert [one.ref for one in first] == ["a", "b", ""]
    assert all(one.key for one in first)


def test_nothing_to_settle():
    assert settled(call("local"), open=False) == []
    assert settled(call("local"), cut=True) == []


def test_deltas_become_a_partial_reply_of_this_turn_only():
    deltas = [Delta(3, 1, 1, "lo"), Delta(3, 1, 0, "hel"), Delta(2, 0, 0, "old"), Delta(3, 0, 0, "first")]
    replies = settled(deltas=deltas)[:-1]
    assert replies == [
        Draft("assistant", {"text": "first", "tool_calls": [], "part": 0, "partial": True}, 3, key="t3/p0/assistant"),
        Draft("assistant", {"text": "hello", "tool_calls": [], "part": 1, "partial": True}, 3, key="t3/p1/assistant"),
    ]


def test_a_missing_piece_is_marked():
    (reply, _cut) = settled(deltas=[Delta(3, 0, 0, "pay "), Delta(3, 0, 3, "100"), Delta(3, 0, 4, " now")])
    assert reply.body["text"] == f"pay {GAP}100 now"
    assert reply.body["gaps"] == 2


@pytest.mark.parametrize(
    ("pieces", "text", "gaps"),
    [
        ({}, "", 0),
        ({0: "a", 1: "b"}, "ab", 0),
        ({1: "b"}, f"{GAP}b", 1),
        ({0: "a", 2: "c", 5: "f"}, f"a{GAP}c{GAP}f", 3),
    ],
)
def test_joining(pieces, text, gaps):
    assert join_pieces(pieces) == (text, gaps)
