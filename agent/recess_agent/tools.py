"""`@tool`: a Python function as a tool of the model, with its JSON schema and its effect class.

Effect classes say what a crash may do with a call that had begun:
    local   lives in this machine: it is as alive as the machine is (the default)
    pure    may be repeated freely
    keyed   repeated with the same `call.key`, which the tool hands to its provider
    once    never repeated blindly: `verify(call)` is asked whether it happened, else the model sees a doubt
"""

from __future__ import annotations

import asyncio
import inspect
import json
import typing
from collections.abc import Callable
from typing import Any

EFFECTS = ("local", "pure", "keyed", "once")
_SIMPLE = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    dict: "object",
    list: "array",
    type(None): "null",
}


class Call:
    """One call of a tool: `key` is the same however often the call is tried, and unique to session, turn and call."""

    def __init__(self, id: str, name: str, arguments: dict[str, Any], key: str, turn: int) -> None:
        self.id = id
        self.name = name
        self.arguments = arguments
        self.key = key
        self.turn = turn


class Tool:
    """A function with its schema. Calling it calls the function, so that it stays usable and testable on its own."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        effect: str,
        verify: Callable[..., Any] | None,
        name: str,
        approve: bool | Callable[[dict[str, Any]], Any] = False,
        approve_timeout: float | None = None,
    ) -> None:
        if effect not in EFFECTS:
            raise TypeError(f"effect must be one of {', '.join(EFFECTS)}, not {effect!r}")
        if verify is not None and effect != "once":
            raise TypeError("verify belongs to effect='once'")
        self.function = function
        self.effect = effect
        self.verify = verify
        self.approve = approve
        self.approve_timeout = approve_timeout
        self.name = name or function.__name__
        self.description = inspect.cleandoc(function.__doc__ or "")
        self.parameters, self._wants_call = _parameters(function)
        self.__doc__ = function.__doc__
        self.__name__ = self.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself."""
        return self.function(*args, **kwargs)

    def schema(self) -> dict[str, Any]:
        """Return the tool in the OpenAI function format."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def needs_approval(self, arguments: dict[str, Any]) -> bool:
        """Tell whether a human must approve this call. What the rule raises is the caller's."""
        return bool(self.approve(arguments) if callable(self.approve) else self.approve)

    async def run(self, call: Call) -> Any:
        """Run the function (a sync one in a thread, so that the session goes on answering)."""
        kwargs: dict[str, Any] = dict(call.arguments)
        if self._wants_call:
            kwargs["call"] = call
        return await _invoke(self.function, kwargs)

    async def check(self, call: Call) -> Any:
        """Ask `verify` whether the call took place: its result, or None if it did not."""
        if self.verify is None:
            raise LookupError(f"tool {self.name} has no verify")
        return await _invoke(self.verify, {"call": call}, positional="call")


async def _invoke(function: Callable[..., Any], kwargs: dict[str, Any], positional: str = "") -> Any:
    args = (kwargs.pop(positional),) if positional else ()
    if inspect.iscoroutinefunction(function):
        return await function(*args, **kwargs)
    result = await asyncio.to_thread(function, *args, **kwargs)
    return await result if inspect.isawaitable(result) else result


def tool(
    function: Callable[..., Any] | None = None,
    *,
    effect: str = "local",
    verify: Callable[..., Any] | None = None,
    name: str = "",
    approve: bool | Callable[[dict[str, Any]], Any] = False,
    approve_timeout: float | None = None,
) -> Any:
    """Make a function a tool: `@tool` or `@tool(effect="once", verify=already_paid)`.

    `approve` is True, or a function of the arguments that says whether a human must approve this call first (the machine is
    put away meanwhile); a call that nobody approved within `approve_timeout` seconds (None: for ever) is not run.

    The schema comes from the annotations, the description from the docstring. A keyword parameter named `call`
    receives the `Call` and is not shown to the model.
    """

    def wrap(inner: Callable[..., Any]) -> Tool:
        return Tool(
            inner, effect=effect, verify=verify, name=name, approve=approve, approve_timeout=approve_timeout
        )  # fmt: skip

    return wrap if function is None else wrap(function)


def as_tool(value: Any) -> Tool:
    """Return a Tool for a Tool or a plain function."""
    if isinstance(value, Tool):
        return value
    if callable(value):
        return Tool(value, effect="local", verify=None, name="")
    raise TypeError(f"not a tool: {value!r}")


def render(value: Any) -> str:
    """Return a tool's result as the text that the model and the log get."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):
        hints = {}
    properties: dict[str, Any] = {}
    required: list[str] = []
    wants_call = False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name == "call":
            wants_call = True
            continue
        properties[name] = _schema(hints.get(name, str))
        if parameter.default is parameter.empty:
            required.append(name)
        elif parameter.default is not None:
            properties[name] = {**properties[name], "default": parameter.default}
    out: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    if required:
        out["required"] = required
    return out, wants_call


def _schema(hint: Any) -> dict[str, Any]:
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is list and args:
        return {"type": "array", "items": _schema(args[0])}
    if origin in (list, dict):
        return {"type": _SIMPLE[origin]}
    if _is_literal(origin):
        kinds = sorted({_SIMPLE.get(type(one), "string") for one in args})
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(args)}
    options = [one for one in args if one is not type(None)]
    if origin is not None and len(options) == 1:  # Optional[X]
        return _schema(options[0])
    if options:
        return {"anyOf": [_schema(one) for one in options]}
    return {}


def _is_literal(origin: Any) -> bool:
    return origin is typing.Literal
