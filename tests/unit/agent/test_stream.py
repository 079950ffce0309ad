"""Replies out of whatever a model client yields."""

import pytest
from recess_agent import Reply, ToolCall
from recess_agent.stream import Collector, unique_ids


def collect(*events):
    collector = Collector()
    said = [collector.feed(event) for event in events]
    return collector.reply(), said


def chunk(**delta):
    return {"choices": [{"delta": delta}]}


def test_openai_chunks():
    reply, said = collect(
        chunk(role="assistant", content="he"),
        chunk(content="llo"),
        chunk(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x"'}}]),
        chunk(tool_calls=[{"index": 1, "id": "b", "function": {"name": "g", "arguments": ""}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": ": 1}"}}]),
        {"choices": [], "usage": {"total_tokens": 9}, "model": "m"},
    )
    assert (reply.text, said[:2]) == ("hello", ["he", "llo"])
    assert [c.to_dict() for c in reply.tool_calls] == [
        {"id": "a", "name": "f", "arguments": {"x": 1}},
        {"id": "b", "name": "g", "arguments": {}},
    ]
    assert (reply.usage, reply.model) == ({"total_tokens": 9}, "m")


def test_a_whole_answer_a_string_an_object_a_reply():
    message = {"content": None, "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "not json"}}]}
    reply, _ = collect({"choices": [{"message": message}]})
    assert reply.tool_calls[0].arguments == "not json"
    assert collect("a", "b")[0].text == "ab"

    class Event:
        def model_dump(self):
            return {"text": "x"}

    assert collect(Event())[0].text == "x"
    assert collect(Reply("y", [ToolCall("i", "n", {})]))[0].tool_calls[0].id == "i"


def test_bounds_and_nonsense():
    with pytest.raises(TypeError):
        collect(object())
    for much in ("x" * (5 << 20), "ä" * (3 << 20), '"' * (3 << 20), "\x01" * (1 << 20)):
        with pytest.raises(ValueError, match="bytes"):
            collect(much)
    assert len(collect("x" * (4 << 20))[0].text) == 4 << 20
    with pytest.raises(ValueError, match="bytes"):
        collect({"text": "", "tool_calls": [{"id": "a", "name": "f", "arguments": {"x": "y" * (5 << 20)}}]})
    with pytest.raises(ValueError, match="bytes"):
        collect(Reply("", [ToolCall("i", "n", {"x": "y" * (5 << 20)})]))
    with pytest.raises(ValueError, match="tool calls"):
        collect(*[chunk(tool_calls=[{"index": i, "id": str(i)}]) for i in range(200)])


def test_ids_are_made_unique():
    calls = [ToolCall("call_0", "f", {}), ToolCall("call_0", "g", {}), ToolCall("", "h", {})]
    assert [c.id for c in unique_ids(calls, {"call_0"})] == ["call_0~2", "call_0~3", "call"]


def test_an_answer_that_begins_afresh():
    first = chunk(content="wro", tool_calls=[{"index": 0, "id": "a", "function": {"name": "f"}}])
    reply, _ = collect(first, {"restart": True}, chunk(content="right"))
    assert (reply.text, reply.tool_calls) == ("right", [])
