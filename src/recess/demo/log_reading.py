"""Reading a session's entries for the story: which tool said what, what was answered, what happened to the machine. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence

from recess.sdk.transport import Json


def of_kind(entries: Sequence[Json], kind: str) -> list[Json]:
    """Return the entries of a kind, in order."""
    return [entry for entry in entries if entry["kind"] == kind]


def tool_outputs(entries: Sequence[Json]) -> list[tuple[str, str]]:
    """Return (tool, output) for each call that has an outcome, in the order of the calls."""
    outcomes = {
        entry["ref"]: str(entry["body"].get("output", ""))
        for entry in entries
        if entry["kind"] in ("tool.result", "tool.settled")
    }
    starts = of_kind(entries, "tool.start")
    return [(str(e["body"]["name"]), outcomes[e["ref"]]) for e in starts if e["ref"] in outcomes]


def durations(entries: Sequence[Json]) -> dict[str, float]:
    """Return how long each call took, by its id, in seconds between its two entries; calls without an end are left out."""
    begun = {entry["ref"]: float(entry["ts"]) for entry in of_kind(entries, "tool.start")}
    ends = [entry for entry in entries if entry["kind"] in ("tool.result", "tool.settled") and entry["ref"] in begun]
    return {entry["ref"]: float(entry["ts"]) - begun[entry["ref"]] for entry in ends}


def output_of(entries: Sequence[Json], tool: str) -> str:
    """Return the newest output of a tool, "" if it has none."""
    return next((output for name, output in reversed(tool_outputs(entries)) if name == tool), "")


def look(entries: Sequence[Json]) -> dict[str, str]:
    """Return what the agent's newest look around its machine saw (the command is `recess.testing.model_script.LOOK`).

    Raises LookupError if it has not looked, ValueError if something did not answer.
    """
    found = [output for name, output in tool_outputs(entries) if name == "sh" and '"nonce"' in output]
    if not found:
        raise LookupError("the agent has not looked around")
    lines = found[-1].split("\n")
    server = json.loads(lines[0])
    kernel = {"boot_id": lines[1], "uptime_s": lines[2].split()[0], "hostname": lines[3], "machine_id": lines[4]}
    fresh = {"random": lines[5].strip(), "uuid": lines[6], "keys": lines[7], "page": "\n".join(lines[8:])}
    return {**{name: str(server[name]) for name in ("nonce", "pid", "served")}, **kernel, **fresh}


def last_text(entries: Sequence[Json]) -> str:
    """Return the text of the newest reply that asks for nothing more."""
    replies = [entry for entry in of_kind(entries, "assistant") if not entry["body"].get("tool_calls")]
    return str(replies[-1]["body"].get("text", "")) if replies else ""


def open_calls(entries: Sequence[Json]) -> list[str]:
    """Return the tools of calls that were started and have no outcome."""
    done = {e["ref"] for e in entries if e["kind"] in ("tool.result", "tool.settled", "tool.doubt")}
    return [str(e["body"]["name"]) for e in of_kind(entries, "tool.start") if e["ref"] not in done]


def said(entry: Json) -> tuple[object, ...]:
    """Return what must be equal in a fork's copy of an entry."""
    return entry["position"], entry["kind"], entry["turn"], entry["ref"], repr(entry["body"])


def snapshot_figures(entry: Json) -> dict[str, float | int | str]:
    """Return a machine.snapshot entry's figures under the story's names."""
    figures = dict(entry["body"].get("figures") or {})
    names = {
        "standstill_s": "standstill_s",
        "freezer_s": "freezer_s",
        "durable_s": "durable_s",
        "stored_bytes": "new_bytes",
    }
    if not figures.get("standstill_s"):  # it was put away: there is no instant at which it ran again
        figures.pop("freezer_s", None)
    return {ours: figures[theirs] for ours, theirs in names.items() if figures.get(theirs)}


def put_away_figures(entry: Json, gone: float) -> dict[str, float | int | str]:
    """Return how long a machine that was put away had been frozen when its last process was gone (wall time `gone`).

    A snapshot's `durable_s` runs from the freeze to the manifest's fsync, and the entry is appended after that.
    """
    figures = entry["body"].get("figures") or {}
    return {"freeze_to_gone_s": float(figures["durable_s"]) + max(0.0, gone - float(entry["ts"]))}


def restore_figures(entry: Json) -> dict[str, float | int | str]:
    """Return a machine.restore entry's figures under the story's names."""
    body = entry["body"]
    return {"rung": int(body["rung"]), "restore_s": float(body.get("seconds", 0.0))}
