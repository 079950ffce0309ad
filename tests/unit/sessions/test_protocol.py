"""The agent's lines: what is let in, what is refused, what ends the stream."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recess.errors import BadInput, GuestFailed
from recess.sessions.keys import call_key, entry_key
from recess.sessions.protocol import Ack, DeltaLine, Hello, Lines, Request, parse, request_id


class Feed:
    def __init__(self, *pieces):
        self.pieces = list(pieces)

    async def read(self, limit=65536):
        return self.pieces.pop(0) if self.pieces else b""


def line(**data):
    return json.dumps(data).encode()


async def test_lines_are_put_together_and_bounded():
    lines = Lines(Feed(b'{"a"', b":1}\n\n{}", b"\nrest"))
    assert [await lines.next(), await lines.next(), await lines.next()] == [b'{"a":1}', b"{}", b""]
    with pytest.raises(GuestFailed, match="more than"):
        await Lines(Feed(*[b"x" * 50] * 5), limit=100).next()


def test_messages():
    hello = parse(
        line(t="hello", proto=1, version="v", job="j", pid=7, nonce="n", position=3, done=1, hooks=["suspend"])
    )
    assert isinstance(hello, Hello)
    assert (hello.job, hello.position, hello.hooks) == ("j", 3, ("suspend",))
    assert parse(line(t="req", id=4, op="next", done=2)) == Request(4, "next", done=2)
    assert parse(line(t="delta", turn=1, part=0, n=2, text="x")) == DeltaLine(1, 0, 2, "x")
    assert parse(line(t="ack", ack=3)) == Ack(3)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"null", b"{", b'{"t": "what"}', line(t="hello", proto=9), line(t="req", op="next"), b"\xff\xfe"],
)
def test_what_ends_the_stream(data):
    with pytest.raises(GuestFailed):
        parse(data)


@pytest.mark.parametrize(
    "fields",
    [
        {"op": "drop"},
        {"op": "append", "kind": "user", "body": {}},
        {"op": "append", "kind": "turn.end", "body": {}},
        {"op": "append", "kind": "machine.restore", "body": {}},
        {"op": "append", "kind": "x." + "y" * 99, "body": {}},
        {"op": "append", "kind": "note", "body": []},
        {"op": "append", "kind": "tool.result", "body": {}},
        {"op": "append", "kind": "tool.start", "ref": "c", "body": {"effect": "magic"}},
        {"op": "append", "kind": "tool.start", "ref": "c" * 500, "body": {"effect": "once"}},
        {"op": "append", "kind": "assistant", "body": {"text": 3}},
        {"op": "append", "kind": "assistant", "body": {"text": "", "tool_calls": [{"id": 1}]}},
        {"op": "append", "kind": "assistant", "body": {"text": "", "part": -1}},
        {"op": "append", "kind": "note", "body": {}, "turn": "1"},
        {"op": "next", "done": True},
    ],
)
def test_what_is_answered_with_an_error(fields):
    data = line(t="req", id=9, **fields)
    with pytest.raises(BadInput):
        parse(data)
    assert request_id(data) == 9


@given(st.binary(max_size=200))
def test_garbage_is_a_typed_error(data):
    with contextlib.suppress(GuestFailed, BadInput):
        parse(data)
    assert isinstance(request_id(data), int)


def test_keys_come_from_content_not_from_attempts():
    start = Request(1, "append", kind="tool.start", ref="c1", turn=4)
    assert entry_key(start) == entry_key(Request(99, "append", kind="tool.start", ref="c1", turn=4)) == "t4/c1/start"
    assert entry_key(Request(1, "append", kind="assistant", body={"part": 2}, turn=4)) == "t4/p2/assistant"
    assert entry_key(Request(1, "append", kind="note", serial="n.1")) == "t0/note/n.1"
    assert entry_key(Request(1, "append", kind="note")) == ""
    assert call_key("ses_a", 1, "c") != call_key("ses_b", 1, "c")
    assert call_key("ses_a", 1, "c") == call_key("ses_a", 1, "c")
