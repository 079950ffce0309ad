"""Older shapes of an application's own entries, read in today's: `@my_agent.upcast("x.plan", 1)` makes schema 1 into schema 2.

What is in the log stays as it was written, with the number of the code's schema then. It is made new whenever it is read, one step
after the other, so each step is written once and never again. A step gets a copy and returns the new body: nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

Json = dict[str, Any]
Upcaster = Callable[[Json], Json]


class UpcastError(Exception):
    """An entry could not be made into today's shape: `kind`, `position` and `schema` say which."""

    def __init__(self, message: str, *, kind: str, position: int, schema: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.position = position
        self.schema = schema


class NewerEntry(UpcastError):
    """The entry was written by newer code than this (which was rolled back since), in a shape that this code does not know."""


class Upcasters:
    """The steps of one agent, by kind and the schema that they start from."""

    def __init__(self) -> None:
        self._steps: dict[str, dict[int, Upcaster]] = {}
        self._made: dict[int, Json] = {}  # position -> the entry as it is read; those that needed no step are not here

    def add(self, kind: str, schema: int, step: Upcaster) -> None:
        """Take the step from `schema` to the next. Raises ValueError for a kind of Recess's own, or a second step."""
        if kind != "note" and not kind.startswith("x."):
            raise ValueError(f"upcast: {kind!r} is not an application's own: 'note' or 'x.something'")
        if schema < 1 or schema in self._steps.setdefault(kind, {}):
            raise ValueError(f"upcast: one step from each schema, counted from 1, and {kind!r} {schema} is not")
        self._steps[kind][schema] = step

    def newest(self, kind: str) -> int:
        """Return the schema that entries of this kind are written under. Raises ValueError if a step is missing."""
        steps = self._steps.get(kind, {})
        last = max(steps, default=0) + 1
        missing = [n for n in range(1, last) if n not in steps]
        if missing:
            raise ValueError(f"upcast: {kind!r} has no step from schema {missing[0]} to {missing[0] + 1}")
        return last

    def check(self) -> None:
        """Raise ValueError if a step is missing."""
        for kind in self._steps:
            self.newest(kind)

    def read(self, entries: Sequence[Json]) -> list[Json]:
        """Return the entries in today's shapes. One of a newer schema is left as it is and has `newer`: True. Raises UpcastError."""
        known, self._made = self._made, {}
        return [self._read(one, known) for one in entries]

    def _read(self, entry: Json, known: dict[int, Json]) -> Json:
        kind, position, schema = entry["kind"], entry["position"], int(entry.get("schema", 1))
        if kind != "note" and not kind.startswith("x."):
            return entry
        newest = self.newest(kind)
        if schema == newest:
            return entry
        if schema > newest:
            return {**entry, "newer": True}
        made = known.get(position)
        if made is None:
            made = {**entry, "body": self._up(entry, schema, newest), "schema": newest}
        self._made[position] = made
        return made

    def _up(self, entry: Json, schema: int, newest: int) -> Json:
        kind = entry["kind"]
        body: Json = copy.deepcopy(entry["body"])
        for step in range(schema, newest):
            try:
                body = self._steps[kind][step](body)
                if not isinstance(body, dict):
                    raise TypeError(f"it returned {type(body).__name__}, and a body is a dict")
            except Exception as exc:  # the user's code: the error says which entry it failed on
                raise UpcastError(
                    f"upcast: {kind} at position {entry['position']} cannot go from schema {step} to {step + 1}: "
                    f"{type(exc).__name__}: {exc}",
                    kind=kind,
                    position=entry["position"],
                    schema=step,
                ) from exc
        return body


def refuse_newer(entry: Json, newest: int) -> NewerEntry:
    """Return the error for an entry that this code is too old to read."""
    kind, position, schema = entry["kind"], entry["position"], int(entry.get("schema", 1))
    return NewerEntry(
        f"{kind} at position {position} was written by newer code: schema {schema}, and this version knows {newest}. Deploy that "
        "code again, or read with newer='skip'",
        kind=kind,
        position=position,
        schema=schema,
    )
