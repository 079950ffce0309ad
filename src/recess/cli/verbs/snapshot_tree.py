"""The tree of snapshots as lines of text. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recess.cli.output import ago, short
from recess.units import format_bytes

_LEGEND = "owned: its alone; shared: with others; frees: by removing it (branch: it and all below)"


def tree_lines(nodes: Sequence[Mapping[str, Any]], total_bytes: int) -> list[str]:
    """Return the tree, oldest first; `nodes` as `GET /v1/snapshots/tree` gives them. A node whose parent is not there
    is a root; what a loop of damaged rows would hide is shown as roots too."""
    by_id = {str(node["id"]): node for node in nodes}
    below: dict[str, list[str]] = {}
    for ref, node in sorted(by_id.items(), key=lambda item: (item[1].get("created", 0.0), item[0])):
        parent = str(node["parent"])
        below.setdefault(parent if parent in by_id else "", []).append(ref)
    lines: list[str] = []
    waiting = [(ref, "", "") for ref in reversed(below.get("", []))]
    shown: set[str] = set()
    while waiting:
        ref, lead, branch = waiting.pop()
        if ref in shown:
            continue
        shown.add(ref)
        lines.append(lead + branch + _describe(by_id[ref]))
        lead += {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        children = below.get(ref, [])
        for child in reversed(children):
            waiting.append((child, lead, "└─ " if child == children[-1] else "├─ "))
    lines += [_describe(by_id[ref]) for ref in by_id if ref not in shown]
    return [*lines, f"{len(nodes)} in {format_bytes(total_bytes)}. {_LEGEND}"]


def _describe(node: Mapping[str, Any]) -> str:
    words = [short(str(node["id"]))]
    if node["kind"] == "template":
        words.append(f"template of {node['image']}")
    if node["names"]:
        words.append("(" + ", ".join(node["names"]) + ")")
    if node.get("why"):
        words.append(f"{node['why']} of {node['machine_name'] or node['machine']}, {ago(float(node['created']))}")
    if "stored" in node:
        sizes = {key: format_bytes(int(node[key])) for key in ("owned", "shared", "frees", "branch_frees")}
        words.append("owned {owned} shared {shared} frees {frees} (branch {branch_frees})".format(**sizes))
    if node["damaged"]:
        words.append("DAMAGED")
    if node["needed_by"]:
        words.append("<- " + ", ".join(node["needed_by"]))
    return "  ".join(words)
