"""The SDK's waits, stops and copy of the log, without a host."""

import asyncio

import pytest
from recess_agent import ModelError
from recess_agent.blobs import Blobs
from recess_agent.cancelling import Stop, TurnCancelled
from recess_agent.mirror import Mirror
from recess_agent.openai import RETRY_AFTER_MOST_S, retry_seconds
from recess_agent.running import Runs
from recess_agent.stream import ToolCall
from recess_agent.tools import tool
from recess_agent.transcript import messages
from recess_agent.waiting import Waits, retry_delay
from recess_agent.wire import SessionError


class Host:
    """What the wire would carry: every append, and the answers to waits."""

    def __init__(self, answers=()):
        self.appended, self.waited, self.answers = [], [], list(answers)

    async def append(self, kind, body, *, ref=""):
        self.appended.append((kind, ref, body))
        return {"position": len(self.appended), "key": f"key-{ref}"}

    async def request(self, op, **fields):
        self.waited.append((op, fields))
        if op == "wait":
            return self.answers.pop(0) if self.answers else await asyncio.Event().wait()
        return {}


def waits(host, stop=None, turn=1):
    return Waits(turn, host.request, host.append, stop or Stop())


async def test_a_wait_is_named_by_what_it_is_about():
    one, again, other = waits(Host()), waits(Host()), waits(Host(), turn=2)
    names = [one.name("ask", "a"), one.name("ask", "b"), one.name("ask", "a")]
    assert len(set(names)) == 3
    assert names == [again.name("ask", "a"), again.name("ask", "b"), again.name("ask", "a")]
    assert names[0] != other.name("ask", "a")


async def test_ask_with_a_timeout_waits_for_both():
    host = Host()
    host.answers = [{"ref": "q", "body": {"text": "yes"}}, {"ref": "q-t", "due": 1.0}]
    assert await waits(host).ask("sure?", ["yes"], 60, False, "q") == "yes"
    assert await waits(host).ask("sure?", [], 60, True, "q") is None
    assert host.appended[:2] == [
        ("ask", "q", {"text": "sure?", "choices": ["yes"]}),
        ("timer", "q-t", {"seconds": 60.0}),
    ]
    assert host.appended[2][2] == {"text": "sure?", "show": True}
    assert [fields["refs"] for _, fields in host.waited] == [["q", "q-t"]] * 2


async def test_a_stop_ends_waits_and_lets_none_begin():
    stop, host = Stop(), Host()
    sleeping = asyncio.ensure_future(waits(host, stop).sleep(900))
    while not host.waited:
        await asyncio.sleep(0)
    stop.ask("enough")
    with pytest.raises(TurnCancelled, match="enough"):
        await sleeping
    with pytest.raises(TurnCancelled):
        await waits(host, stop).spawn("worker", "go")
    assert len(host.waited) == 1


async def test_a_race_passes_on_results_errors_and_cancellation():
    stop = Stop()
    assert await stop.race(asyncio.sleep(0, "done")) == "done"

    async def broken():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await stop.race(broken())
    inner = asyncio.get_running_loop().create_future()
    outer = asyncio.ensure_future(stop.race(inner))
    await asyncio.sleep(0)
    outer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await outer
    assert inner.cancelled()


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (ModelError("x", 503, retry_after=900), 900.0), (ModelError("x", 503), 30.0), (ConnectionError("x"), 30.0),
        (ModelError("x", 503, retry_after=0), 0.0),
    ],
)  # fmt: skip
def test_how_long_to_wait(error, seconds):
    assert retry_delay(error, 30.0, 3600.0) == seconds


@pytest.mark.parametrize("error", [ModelError("bad request", 400), ModelError("x", 503, retry_after=4000)])
def test_what_is_of_no_use_is_raised(error):
    with pytest.raises(ModelError) as raised:
        retry_delay(error, 30.0, 3600.0)
    assert raised.value is error


NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120.0), (" 0 ", 0.0), ("Tue, 14 Nov 2023 22:28:20 GMT", 900.0), ("Tue, 14 Nov 2023 22:00:00 GMT", 0.0),
        ("9" * 40, RETRY_AFTER_MOST_S), ("", None), ("soon", None), ("-5", None), ("١٢", None), ("Tue, 99 Nov 2023", None),
    ],
)  # fmt: skip
def test_retry_after_headers(header, seconds):
    assert retry_seconds(header, NOW) == seconds


def entry(position, kind, body, turn=1):
    return {"session": "s", "position": position, "kind": kind, "body": body, "turn": turn, "ref": "", "ts": 0.0}


def test_a_compaction_shrinks_the_copy_and_not_what_the_model_sees():
    log = [
        entry(1, "system", {"text": "old"}), entry(2, "system", {"text": "be kind"}), entry(3, "user", {"text": "one"}),
        entry(4, "turn.start", {"inbox": 3, "attempt": 1}), entry(5, "assistant", {"text": "1", "part": 0}),
        entry(6, "user", {"text": "two"}, 0), entry(7, "turn.start", {"inbox": 6, "attempt": 1}, 2),
        entry(8, "assistant", {"text": "2", "part": 0}, 2), entry(9, "compact", {"summary": "we counted", "to": 5}, 2),
    ]  # fmt: skip
    mirror = Mirror()
    for one in log:
        mirror.add(one)
        mirror.add(one)
    assert [e["position"] for e in mirror.entries] == [2, 6, 7, 8, 9]
    assert messages(mirror.entries) == messages(log)
    assert (mirror.next_part(2), mirror.next_part(3), mirror.position) == (1, 0, 9)


def test_a_compaction_of_the_turn_itself_does_not_number_a_reply_twice():
    mirror = Mirror()
    for one in (entry(1, "assistant", {"text": "a", "part": 4}), entry(2, "compact", {"summary": "s", "to": 1})):
        mirror.add(one)
    assert mirror.next_part(1) == 5


def runs(host, tools, stop=None):
    stop = stop or Stop()
    return Runs(1, {one.name: one for one in tools}, host.append, waits(host, stop), stop, Blobs(host.request))


def outputs(host):
    return [body["output"] for kind, _, body in host.appended if kind == "tool.result"]


async def test_an_approval_rule_that_breaks_approves_nothing():
    @tool(approve=lambda arguments: arguments["nothing"])
    def risky() -> str:
        raise AssertionError("it ran")

    host = Host()
    assert (await runs(host, [risky]).run(ToolCall("c1", "risky", {}))).startswith("not run: its approval rule failed")
    assert [kind for kind, _, _ in host.appended] == ["tool.result"]


async def test_an_answer_that_is_no_choice_is_no_approval():
    @tool(approve=True)
    def risky() -> str:
        raise AssertionError("it ran")

    host = Host([{"ref": "approve-c1", "body": {"text": "deny"}}])
    assert await runs(host, [risky]).run(ToolCall("c1", "risky", {})) == "not run: a human denied it"


async def test_a_host_that_refuses_a_call_while_cancelling_is_understood():
    stop = Stop()

    class Refusing(Host):
        async def append(self, kind, body, *, ref=""):
            if kind == "tool.start":
                stop.ask("enough")
                raise SessionError("illegal_state", "the turn is being cancelled")
            return await super().append(kind, body, ref=ref)

    @tool
    def work() -> str:
        raise AssertionError("it ran")

    host = Refusing()
    assert await runs(host, [work], stop).run(ToolCall("c1", "work", {})) == "not run: the turn was cancelled"


@pytest.mark.parametrize(
    ("logged", "now", "verify", "kind"),
    [
        ("pure", "pure", None, "tool.result"), ("keyed", "pure", None, "tool.result"), ("pure", "once", None, "tool.doubt"),
        ("once", "pure", None, "tool.doubt"), ("once", "once", lambda call: {"paid": True}, "tool.settled"),
        ("once", "once", lambda call: None, "tool.result"), ("", "keyed", None, "tool.doubt"),
    ],
)  # fmt: skip
async def test_what_a_crash_left_open_is_repeated_only_if_both_say_it_may(logged, now, verify, kind):
    @tool(effect=now, verify=verify)
    def work() -> str:
        return "ran"

    host = Host()
    await runs(host, [work]).settle([{"call_id": "c1", "name": "work", "arguments": {}, "effect": logged, "key": "k"}])
    assert [one[0] for one in host.appended] == [kind]
