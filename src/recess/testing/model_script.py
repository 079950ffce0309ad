"""The scripted model's mind: from a transcript to the next reply, a pure function without memory of its own.

It plays a fixed coding task, and reads everything it says from the messages it is given: so it is right after a
crash, in a fork, under newer agent code, exactly as far as the transcript it was shown is right. What it is told in
`[recess]` notes and doubts it repeats in its answer, which makes "the model was told" checkable.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOTE_PREFIX = "[recess] "
SITE_DIR = "site"  # in the agent's working folder
SITE_PORT = 8000
# One look around: the dev server's life over HTTP, the kernel's, the machine's names, randomness, keys in any process's
# environment (their number), the page.
LOOK = (
    f"curl -sS http://127.0.0.1:{SITE_PORT}/_life; echo; cat /proc/sys/kernel/random/boot_id /proc/uptime; hostname; "
    "cat /etc/machine-id; od -An -N16 -tx1 /dev/urandom; "
    "cat /proc/sys/kernel/random/uuid 2>/dev/null || python3 -c 'import uuid; print(uuid.uuid4())'; "
    "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep -c -e '=sk-' -e '=pk-'; "
    f"curl -sS http://127.0.0.1:{SITE_PORT}/"
)
_URL = re.compile(r"https?://\S+?\.git\b")
_DOLLARS = re.compile(r"(\d+(?:\.\d\d)?) dollars?")
_VARIANT = re.compile(r"variant (\w+)")


@dataclass(frozen=True)
class WantedCall:
    """A tool call that the model asks for."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """One reply: text, or calls, or both."""

    text: str = ""
    calls: tuple[WantedCall, ...] = ()


@dataclass(frozen=True)
class Situation:
    """The transcript as the script sees it: the newest instruction, what came back since, what Recess said since."""

    instruction: str
    outputs: tuple[str, ...]
    notes: tuple[str, ...]
    history: tuple[str, ...]  # all instructions, oldest first
    tools: frozenset[str]
    calls: int  # tool calls since the instruction


def read_situation(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Situation:
    """Return the situation; the messages must have been checked."""
    said = [(i, str(m.get("content") or "")) for i, m in enumerate(messages) if m["role"] == "user"]
    instructions = [(i, text) for i, text in said if not text.startswith(NOTE_PREFIX)]
    start, newest = instructions[-1] if instructions else (-1, "")
    after = messages[start + 1 :]
    return Situation(
        instruction=newest,
        outputs=tuple(str(m.get("content") or "") for m in after if m["role"] == "tool"),
        notes=tuple(text.removeprefix(NOTE_PREFIX) for i, text in said if i > start and text.startswith(NOTE_PREFIX)),
        history=tuple(text for _, text in instructions),
        tools=frozenset(str(tool["function"]["name"]) for tool in tools),
        calls=sum(len(m.get("tool_calls") or ()) for m in after if m["role"] == "assistant"),
    )


def _call(name: str, **arguments: Any) -> Answer:
    return Answer(calls=(WantedCall(name, arguments),))


def _page(title: str, colour: str) -> str:
    return f"<!doctype html><title>{title}</title><body style='background:{colour}'><h1>{title}</h1></body>\n"


def _build(now: Situation) -> Answer:
    url = _URL.search(now.instruction)
    if url is None:
        return Answer("Which repository shall I start from?")
    steps = [
        _call("sh", cmd=f"git clone -q {url[0]} {SITE_DIR} && git -C {SITE_DIR} log --oneline"),
        _call("write_file", path=f"{SITE_DIR}/index.html", text=_page("Lunch menu", "teal")),
        _call("sh", cmd=f"cd {SITE_DIR} && sh install.sh && python3 -c 'import tinysite; print(tinysite.__version__)'"),
        _call("start_server", cmd=f"python3 -m tinysite {SITE_DIR} {SITE_PORT}", port=SITE_PORT),
        _call("sh", cmd=LOOK),
        Answer(
            "I keep the choices in mind.",
            (
                WantedCall("remember", {"key": "colour", "value": "teal"}),
                WantedCall("remember", {"key": "port", "value": str(SITE_PORT)}),
            ),
        ),
        _call("recall"),
        Answer(f"The site is up on port {SITE_PORT}: a teal page with the lunch menu, served by tinysite."),
    ]
    return _next(steps, now)


def _still_up(now: Situation) -> Answer:
    steps = [_call("sh", cmd=LOOK), _call("recall")]
    if len(now.outputs) < 2:
        return _next(steps, now)
    up = "<h1>" in now.outputs[0]
    return Answer(f"{'Yes, it is up' if up else 'No, it does not answer'}. I remember {now.outputs[1]}.")


def _charge(now: Situation) -> Answer:
    amount = _DOLLARS.search(now.instruction)
    cents = round(float(amount[1]) * 100) if amount else 0
    if not now.outputs:
        return _call("charge", cents=cents)
    try:
        charge = json.loads(now.outputs[-1])
        return Answer(f"Charged {charge['cents']} cents, once: {charge['id']}.")
    except (ValueError, KeyError, TypeError):
        return Answer(f"I do not know whether the charge went through and will not repeat it: {now.outputs[-1]}")


def _variant(now: Situation) -> Answer:
    match = _VARIANT.search(now.instruction)
    name = match[1] if match else "x"
    steps = [
        _call("write_file", path=f"{SITE_DIR}/index.html", text=_page(f"Variant {name}", name)),
        _call("sh", cmd=LOOK),
        _call("remember", key="variant", value=name),
        Answer(f"Variant {name} is in place."),
    ]
    return _next(steps, now)


def _story_so_far(now: Situation) -> Answer:
    steps = [_call("sh", cmd=LOOK)]
    if "outline" in now.tools:
        steps.append(_call("outline", path=f"{SITE_DIR}/index.html"))
    if len(now.outputs) < len(steps):
        return _next(steps, now)
    asked = "; ".join(text[:40] for text in now.history[:-1])
    return Answer(f"You asked: {asked}. The page now: {now.outputs[-1].strip()}")


def _next(steps: Sequence[Answer], now: Situation) -> Answer:
    """Return the step after those whose calls have been made. Counted in calls: a reply may hold several."""
    made = 0
    for step in steps:
        if made >= now.calls:
            return step
        made += len(step.calls)
    return steps[-1]


_SCRIPT: tuple[tuple[str, Callable[[Situation], Answer]], ...] = (
    ("small site", _build),
    ("still up", _still_up),
    ("dollar", _charge),
    ("variant", _variant),
    ("so far", _story_so_far),
)


def reply_to(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Answer:
    """Return the model's reply to a checked transcript; notes since the instruction are repeated in a final text."""
    now = read_situation(messages, tools)
    play = next((act for words, act in _SCRIPT if words in now.instruction.lower()), None)
    answer = play(now) if play else Answer(f"I am a scripted model and know no part for: {now.instruction[:200]}")
    missing = [call.name for call in answer.calls if call.name not in now.tools]
    if missing:
        answer = Answer(f"I would need the tool {missing[0]}, which I do not have.")
    if now.notes and not answer.calls:
        return Answer(f"{answer.text} (I was told: {' / '.join(now.notes)})")
    return answer
