"""What Firecracker's own API description takes (api.json is an extract of it), as a check of one request.

Also for the program that plays Firecracker, which runs by itself: standard library only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

API: dict[str, Any] = json.loads(Path(__file__).with_name("api.json").read_text())
TYPES: dict[str, type | tuple[type, ...]] = {"string": str, "boolean": bool, "integer": int}
_DRIVES = "/drives/"


def problems(body: object, name: str) -> list[str]:
    """Return what is wrong with a body of this kind."""
    known = API["bodies"][name]
    if not isinstance(body, dict):
        return [f"{name}: not an object"]
    found = [f"{name}: {key} is missing" for key in known["required"] if key not in body]
    for key, value in body.items():
        rule = known["properties"].get(key)
        if rule is None:
            found.append(f"{name}: unknown field {key}")
        elif "body" in rule:
            found += problems(value, rule["body"])
        elif not isinstance(value, TYPES[rule["type"]]) or (rule["type"] == "integer" and isinstance(value, bool)):
            found.append(f"{name}: {key} is no {rule['type']}")
        elif "enum" in rule and value not in rule["enum"]:
            found.append(f"{name}: {key} may not be {value}")
        elif not rule.get("minimum", value) <= value <= rule.get("maximum", value):
            found.append(f"{name}: {key} is out of bounds")
    return found


def check(method: str, path: str, body: dict[str, Any]) -> list[str]:
    """Return what is wrong with a request that has a body."""
    head = f"{method} {path}"
    if path.startswith(_DRIVES):
        if body.get("drive_id") != path.removeprefix(_DRIVES):
            return ["the drive's id differs from its path's"]
        head = f"{method} {_DRIVES}{{drive_id}}"
    return problems(body, API["paths"][head]) if head in API["paths"] else [f"no such call: {head}"]
