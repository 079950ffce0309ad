"""A model that says what a test wrote down: an OpenAI-compatible endpoint on this host, so any client reaches it unchanged.

The script is read by the transcript, not by a counter: the reply to a transcript with N replies in it is the script's N-th. So a
call that is made again after a crash gets the same reply, as the test means it. Refusals stand before the reply they
delay, and each is said once. It must know nothing of sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recess.testing.http_server import HttpResponse, json_response
from recess.testing.model_script import Answer, WantedCall
from recess.testing.model_server import ModelServer

KEY = "sk-scripted"


@dataclass(frozen=True)
class Refuse:
    """The endpoint does not answer: an HTTP status and, in seconds, when to ask again."""

    status: int = 503
    retry_after: int | None = None


Reply = str | Answer
Step = Reply | Refuse | Callable[[Sequence[Mapping[str, Any]]], Reply]


def call(name: str, /, **arguments: Any) -> Answer:
    """Return a reply that asks for one tool."""
    return Answer(calls=(WantedCall(name, arguments),))


def calls(*replies: Answer, text: str = "") -> Answer:
    """Return a reply that asks for several tools at once: `calls(call("a"), call("b"))`."""
    return Answer(text, tuple(one for reply in replies for one in reply.calls))


class ScriptedModel(ModelServer):
    """Says its steps in order: a text, `call(...)`, `calls(...)`, `Refuse(...)`, or a function of the messages. Past its end it
    refuses with status 400, which fails the turn and says so. `requests` holds what it was asked."""

    def __init__(self, *steps: Step) -> None:
        super().__init__(KEY)
        self._replies: list[Reply | Callable[[Sequence[Mapping[str, Any]]], Reply]] = []
        self._refusals: dict[int, list[Refuse]] = {}
        for step in steps:
            if isinstance(step, Refuse):
                self._refusals.setdefault(len(self._replies), []).append(step)
            else:
                self._replies.append(step)

    def reply(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Answer | HttpResponse:
        """See `ModelServer`."""
        number = sum(one["role"] == "assistant" for one in messages)
        waiting = self._refusals.get(number)
        if waiting:
            return _refusal(waiting.pop(0))
        if number >= len(self._replies):
            told = f"the script has {len(self._replies)} replies, and this is the call for number {number + 1}"
            return _refusal(Refuse(400), told)
        step = self._replies[number]
        said = step if isinstance(step, str | Answer) else step(messages)
        return Answer(said) if isinstance(said, str) else said


def _refusal(refuse: Refuse, told: str = "refused by the script") -> HttpResponse:
    made = json_response({"error": {"message": told, "type": "scripted", "param": None, "code": None}}, refuse.status)
    later = {} if refuse.retry_after is None else {"Retry-After": str(refuse.retry_after)}
    return replace(made, headers=later)
