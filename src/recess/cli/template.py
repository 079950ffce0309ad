"""`--format`: the part of Docker's (Go's) templates that people type. Pure.

    {{.Name}}  {{.State.Status}}  {{json .}}  {{json .Config.Env}}  {{upper .Name}}  {{lower .Name}}  {{len .Names}}
    {{join .Names ","}}   "json": one JSON document a row   "table {{.ID}}\t{{.Names}}": with a heading

A name is looked up as it is written, then without regard to case. Everything else is refused by name, never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from recess.errors import BadInput

_ACTION = re.compile(r"\{\{-?\s*(.*?)\s*-?\}\}")
_PATH = re.compile(r"\.(?:[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*)?")
_TABLE = "table "


def render(template: str, row: Any) -> str:
    """Return one row by the template. Raises BadInput naming what is not understood, or a name that is not there."""
    if template == "json":
        return json.dumps(row)
    text = _unescape(template.removeprefix(_TABLE))
    if "{{" in _ACTION.sub("", text):
        raise BadInput("--format: there is a {{ without its }}")
    return _ACTION.sub(lambda match: _action(match[1], row), text)


def heading(template: str) -> str | None:
    """Return the heading of a "table ..." template, None for another."""
    if not template.startswith(_TABLE):
        return None
    return _ACTION.sub(
        lambda match: match[1].split(" ")[-1].rpartition(".")[2].upper(), _unescape(template[len(_TABLE) :])
    )


def align(lines: Sequence[str]) -> list[str]:
    """Return lines whose tab-separated cells stand in columns."""
    cells = [line.split("\t") for line in lines]
    width = [
        max((len(row[i]) for row in cells if i < len(row)), default=0) for i in range(max(map(len, cells), default=0))
    ]
    return ["   ".join(cell.ljust(width[i]) for i, cell in enumerate(row)).rstrip() for row in cells]


def _unescape(text: str) -> str:
    return text.replace("\\t", "\t").replace("\\n", "\n")


def _action(text: str, row: Any) -> str:
    words = text.split(None, 1)
    if len(words) == 1 and _PATH.fullmatch(text):
        return _shown(_lookup(text, row))
    name, rest = [*words, "", ""][:2]
    if name == "join":
        path, _, separator = rest.partition(" ")
        value, between = _value(path, row, text), separator.strip().strip('"')
        return between.join(_shown(item) for item in value) if isinstance(value, list | tuple) else _shown(value)
    value = _value(rest, row, text)
    match name:
        case "json":
            return json.dumps(value)
        case "upper":
            return _shown(value).upper()
        case "lower":
            return _shown(value).lower()
        case "len" if isinstance(value, Sequence | Mapping):
            return str(len(value))
    raise _unknown(text)


def _value(path: str, row: Any, text: str) -> Any:
    if not _PATH.fullmatch(path):
        raise _unknown(text)
    return _lookup(path, row)


def _unknown(text: str) -> BadInput:
    return BadInput(
        f"--format: {{{{{text[:60]}}}}} is not understood",
        hint='{{.Name}}, {{json .}}, {{upper .Name}}, {{join .Names ","}}',
    )


def _lookup(path: str, row: Any) -> Any:
    value = row
    for name in path.split(".")[1:]:
        if not name:
            continue
        found = value if isinstance(value, Mapping) else {}
        key = name if name in found else next((k for k in found if str(k).lower() == name.lower()), None)
        if key is None:
            known = ", ".join(sorted(map(str, found))[:12])
            raise BadInput(f"--format: there is no {path}", hint=f"there are: {known}" if known else "")
        value = found[key]
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, Mapping | list | tuple) else str(value)
