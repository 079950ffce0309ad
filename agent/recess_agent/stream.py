"""Turn whatever a model client yields into text deltas and one `Reply`. Pure of sockets: `Session` does the sending.

Understood: a string; a `Reply`; a dict or an object with `model_dump()`/`to_dict()` in the OpenAI chat format, whole
(`choices[0].message`) or as a chunk (`choices[0].delta`); own events `{"text": ...}`, `{"tool_calls": [...]}` and `{"restart": True}` (forget what came so far).
"""

from __future__ import annotations

import json
from typing import Any

TEXT_BYTES_MAX = 4 * 1024 * 1024
TOOL_CALLS_MAX = 128


class ToolCall:
    """What the model wants done. `arguments` is a dict, or the raw string if the model's JSON did not parse."""

    def __init__(self, id: str, name: str, arguments: Any) -> None:
        self.id = id
        self.name = name
        self.arguments = arguments

    def to_dict(self) -> dict[str, Any]:
        """Return the call as the log keeps it."""
        return {"id": self.id, "name": self.name, "arguments": self.arguments}


class Reply:
    """One whole answer of the model, as it stands in the log."""

    def __init__(
        self,
        text: str = "",
        tool_calls: list[ToolCall] | None = None,
        usage: dict[str, Any] | None = None,
        model: str = "",
        cancelled: bool = False,
    ) -> None:
        self.text = text
        self.tool_calls = tool_calls or []
        self.usage = usage or {}
        self.model = model
        self.cancelled = cancelled  # the turn was stopped: this is what came until then


class Collector:
    """Adds up the pieces of one reply. `feed` returns the text that is new, for the live stream."""

    def __init__(self) -> None:
        self._reset()
        self.restarts = 0

    def _reset(self) -> None:
        self._text: list[str] = []
        self._size = 0
        self._calls: dict[int, dict[str, str]] = {}
        self._whole: list[ToolCall] = []
        self._usage: dict[str, Any] = {}
        self._model = ""

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._text)

    def feed(self, event: Any) -> str:
        """Take one event; raises ValueError over the caps and TypeError for what is not understood."""
        if event is None:
            return ""
        if isinstance(event, str):
            return self._add(event)
        if isinstance(event, Reply):
            self._whole.extend(event.tool_calls)
            self._count([one.arguments for one in event.tool_calls])
            self._usage = event.usage or self._usage
            self._model = event.model or self._model
            return self._add(event.text)
        data = _as_dict(event)
        if data.get("restart"):
            self._reset()
            self.restarts += 1
            return ""
        if isinstance(data.get("usage"), dict):
            self._usage = data["usage"]
        if isinstance(data.get("model"), str):
            self._model = data["model"]
        if "choices" in data:
            return "".join(self._choice(choice) for choice in (data["choices"] or [])[:1])
        for call in data.get("tool_calls") or []:
            self._whole.append(_whole_call(call))
            self._count(self._whole[-1].arguments)
        return self._add(str(data.get("text") or ""))

    def _choice(self, choice: dict[str, Any]) -> str:
        message = choice.get("delta") or choice.get("message") or {}
        for place, call in enumerate(message.get("tool_calls") or []):
            self._fragment(call, int(call.get("index", place) if "message" not in choice else place))
        return self._add(str(message.get("content") or ""))

    def _fragment(self, call: dict[str, Any], index: int) -> None:
        if index not in self._calls and len(self._calls) >= TOOL_CALLS_MAX:
            raise ValueError(f"a reply with more than {TOOL_CALLS_MAX} tool calls")
        known = self._calls.setdefault(index, {"id": "", "name": "", "arguments": ""})
        function = call.get("function") or {}
        known["id"] = known["id"] or str(call.get("id") or "")
        known["name"] += str(function.get("name") or "") if not known["name"] else ""
        piece = str(function.get("arguments") or "")
        self._count(piece)
        known["arguments"] += piece

    def _add(self, text: str) -> str:
        if text:
            self._count(text)
            self._text.append(text)
        return text

    def _count(self, piece: Any) -> None:
        """Count what the piece takes in the line that carries the reply to the log (a quote two bytes, a line end two, an
        umlaut two), so that what was collected can also be sent."""
        self._size += len(json.dumps(piece, ensure_ascii=False).encode("utf-8", "replace")) - 2
        if self._size > TEXT_BYTES_MAX:
            raise ValueError(f"a reply of more than {TEXT_BYTES_MAX} bytes")

    def reply(self) -> Reply:
        """Return the whole reply."""
        calls = [
            ToolCall(one["id"], one["name"], parse_arguments(one["arguments"]))
            for _, one in sorted(self._calls.items())
        ]
        return Reply(self.text, self._whole + calls, self._usage, self._model)


def parse_arguments(raw: Any) -> Any:
    """Return a dict, or the raw string when it is not a JSON object."""
    if isinstance(raw, dict):
        return raw
    text = str(raw or "")
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def unique_ids(calls: list[ToolCall], taken: set[str]) -> list[ToolCall]:
    """Give each call an id that this session has not seen: some model servers count from `call_0` in every reply."""
    seen = set(taken)
    out = []
    for call in calls:
        base = call.id or "call"
        name, n = base, 2
        while name in seen:
            name, n = f"{base}~{n}", n + 1
        seen.add(name)
        out.append(ToolCall(name, call.name, call.arguments))
    return out


def _whole_call(call: Any) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    data = _as_dict(call)
    function = data.get("function") or data
    return ToolCall(
        str(data.get("id") or ""), str(function.get("name") or ""), parse_arguments(function.get("arguments"))
    )


def _as_dict(event: Any) -> dict[str, Any]:
    if isinstance(event, dict):
        return event
    for name in ("model_dump", "to_dict", "dict"):
        convert = getattr(event, name, None)
        if callable(convert):
            data = convert()
            if isinstance(data, dict):
                return data
    raise TypeError(f"cannot read a reply from {type(event).__name__}")
