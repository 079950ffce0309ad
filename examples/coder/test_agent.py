"""Tests of the example agent as its author would write them: `pytest examples/coder`. No machine, no server, no provider."""

import json
from pathlib import Path

import pytest

from recess.testing.offline import Refuse, ScriptedModel, call, calls, offline
from recess.testing.payment_server import PaymentServer

AGENT = Path(__file__).with_name("agent.py")


@pytest.fixture
def workdir(tmp_path):
    return {"CODER_WORKDIR": str(tmp_path)}


async def test_it_does_what_the_model_asks_for(workdir, tmp_path):
    model = ScriptedModel(
        calls(call("write_file", path="notes/tea.txt", text="green"), call("sh", cmd="ls notes")), "There is tea."
    )
    async with offline(AGENT, model, env=workdir) as run:
        turn = await run.say("Write down the tea")
    assert (turn.status, turn.text) == ("done", "There is tea.")
    assert [one.name for one in turn.calls] == ["write_file", "sh"]
    assert turn.calls[1].output == "tea.txt\n"
    assert (tmp_path / "notes" / "tea.txt").read_text() == "green"
    assert [one["role"] for one in model.requests[-1]["messages"]] == ["system", "user", "assistant", "tool", "tool"]


async def test_memory_is_there_after_lunch_and_gone_with_the_machine(workdir):
    model = ScriptedModel(
        call("remember", key="a", value="1"), "Noted.", call("recall"), "One.", call("recall"), "None."
    )
    async with offline(AGENT, model, env=workdir) as run:
        await run.say("Remember")
        await run.freeze()
        lunch = await run.say("What do you know?")
        assert json.loads(lunch.calls[0].output)["memory"] == {"a": "1"}
        await run.lose_machine()
        after = await run.say("And now?")
        assert json.loads(after.calls[0].output)["memory"] == {}
        told = [one["text"] for one in await run.transcript() if one.get("note")]
        assert any("Your machine was lost" in text for text in told), "the model is told"


async def test_a_provider_that_is_down_for_a_quarter_of_an_hour(workdir):
    model = ScriptedModel(call("sh", cmd="true"), Refuse(429, retry_after=900), "Here I am.")
    async with offline(AGENT, model, env=workdir) as run:
        position = await run.send("Hello")
        await run.seen("timer")
        await run.freeze()  # it waits, so nothing need run meanwhile
        await run.pass_time(901)
        turn = await run.turn(position)
    assert turn.text == "Here I am."
    assert len(turn.calls) == 1, "only the model was asked again"


async def test_a_card_is_charged_once_though_the_agent_dies_in_the_middle(workdir):
    async with PaymentServer("") as pay:
        model = ScriptedModel(call("charge", cents=500), "Charged.")
        async with offline(AGENT, model, env={**workdir, "PAY_URL": pay.url}) as run:
            pay.hold()
            position = await run.send("Charge 5 dollars")
            await pay.counted.wait()
            await run.kill_agent()  # the money has moved, the log does not know
            pay.release()
            turn = await run.turn(position)
    assert (turn.attempts, turn.calls[0].outcome, turn.text) == (2, "settled", "Charged.")
    assert pay.calls == len(pay.charges) == 1
