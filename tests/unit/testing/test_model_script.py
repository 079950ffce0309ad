import json

import pytest

from recess.testing.model_script import Answer, read_situation, reply_to

TOOLS = [
    {"type": "function", "function": {"name": name}}
    for name in ("sh", "write_file", "start_server", "sh", "remember", "recall", "charge")
]
URL = "http://127.0.0.1:3128/route/git/site.git"


def say(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def play(messages: list, outputs) -> tuple[list, Answer]:
    """Let the model act until it answers in text; `outputs` gives each call's result by its name."""
    while True:
        answer = reply_to(messages, TOOLS)
        if not answer.calls:
            return messages, answer
        ids = [f"c{len(messages)}.{i}" for i in range(len(answer.calls))]
        calls = [
            {"id": i, "type": "function", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}}
            for i, c in zip(ids, answer.calls, strict=True)
        ]
        messages = [*messages, {"role": "assistant", "content": answer.text or None, "tool_calls": calls}]
        for i, call in zip(ids, answer.calls, strict=True):
            messages.append({"role": "tool", "tool_call_id": i, "content": outputs(call)})


def called(messages: list) -> list[str]:
    return [c["function"]["name"] for m in messages if m["role"] == "assistant" for c in m.get("tool_calls", [])]


def test_the_building_task_from_start_to_end() -> None:
    messages, answer = play([say(f"Build me a small site from {URL}")], lambda call: "ok")
    assert called(messages) == ["sh", "write_file", "sh", "start_server", "sh", "remember", "remember", "recall"]
    assert "8000" in answer.text
    assert URL in json.dumps(messages[1])


def test_the_next_instruction_starts_afresh_and_sees_the_past() -> None:
    messages, _ = play([say(f"Build me a small site from {URL}")], lambda call: "ok")
    messages, answer = play(
        [*messages, say("Is it still up?")], lambda call: "<h1>x</h1>" if call.name == "sh" else '{"a": 1}'
    )
    assert answer.text.startswith("Yes, it is up")
    messages, answer = play([*messages, say("What did we do so far?")], lambda call: "page")
    assert "Build me a small site" in answer.text
    assert "Is it still up?" in answer.text


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (json.dumps({"id": "ch_1", "cents": 500}), "Charged 500 cents, once: ch_1."),
        ("[recess] outcome unknown: do not retry without checking", "do not know whether the charge went through"),
    ],
)
def test_charge_and_doubt(output: str, expected: str) -> None:
    messages, answer = play([say("Charge 5 dollars please")], lambda call: output)
    assert called(messages) == ["charge"]
    assert expected in answer.text


def test_notes_are_no_instructions_and_are_repeated() -> None:
    messages, _ = play([say("Charge 5 dollars")], lambda call: json.dumps({"id": "ch_1", "cents": 500}))
    _, answer = play([*messages, say("[recess] the machine was lost at 12")], lambda call: "")
    assert answer.text.startswith("Charged 500 cents")
    assert "I was told: the machine was lost at 12" in answer.text


def test_a_missing_tool_is_said_not_called() -> None:
    assert "charge" in reply_to([say("Charge 5 dollars")], []).text


def test_an_unknown_wish_gets_an_answer() -> None:
    assert "know no part" in reply_to([say("sing")], TOOLS).text
    assert read_situation([{"role": "system", "content": "s"}], []).instruction == ""
