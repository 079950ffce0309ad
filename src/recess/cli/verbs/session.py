"""`recess session start|send|log|ls|inspect|suspend|resume|fork|close`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from recess.cli.common import Invocation, new_key, parse_pairs, verb
from recess.cli.output import ago
from recess.sdk.transport import Json, Transport


@click.group("session")
def session() -> None:
    """Agent sessions."""


def _say(inv: Invocation, row: Json) -> None:
    inv.out.data(row, row["id"])


@session.command("start")
@click.option("--name", default="", help="Name of the session.")
@click.option("-l", "--label", multiple=True, metavar="NAME=VALUE", help="Label.")
@click.argument("agent")
@verb
def start(inv: Invocation, agent: str, name: str, label: tuple[str, ...]) -> None:
    """Start a session of AGENT."""
    body = {"agent": agent, "name": name, "labels": parse_pairs(label, "--label")}
    _say(inv, inv.server.call_with_progress("POST", "/v1/sessions", body, inv.out.progress, key=new_key()))


@session.command("send")
@click.option("--key", default="", help="Idempotency key: the same key never sends twice.")
@click.option("-d", "--detach", is_flag=True, help="Do not wait for the answer.")
@click.argument("ref")
@click.argument("text")
@verb
def send(inv: Invocation, ref: str, text: str, key: str, detach: bool) -> int:
    """Send TEXT to a session and show what happens until the turn ends. TEXT "-" reads stdin."""
    message = sys.stdin.read() if text == "-" else text
    answer = inv.server.call("POST", f"/v1/sessions/{ref}/messages", {"text": message}, key=key or new_key())
    if detach:
        inv.out.data(answer, str(answer["position"]))
        return 0
    inv.out.progress(f"position {answer['position']}" + (" (sent before)" if answer["replayed"] else ""))
    status, entries = _follow_turn(inv, ref, int(answer["position"]))
    if inv.out.as_json:
        inv.out.data({**answer, "status": status, "entries": entries})
    return 0 if status == "done" else 1


def _follow_turn(inv: Invocation, ref: str, position: int) -> tuple[str, list[Json]]:
    """Print entries after `position` until the turn that answers it ends; return its status."""
    seen: list[Json] = []
    started = False
    for entry in follow(inv.server, ref, position):
        seen.append(entry)
        if not inv.out.as_json:
            inv.out.line(render(entry))
        if entry["kind"] == "turn.start":
            started = int(entry["body"].get("position", position)) >= position
        if entry["kind"] == "turn.end" and started:
            return str(entry["body"].get("status", "done")), seen
    return "unknown", seen


def follow(server: Transport, ref: str, after: int) -> Any:
    """Yield entries as they are appended, without gap or double, through server restarts of the stream."""
    position = after
    while True:
        for event, _ident, data in server.events(f"/v1/sessions/{ref}/events", after=str(position)):
            if event == "entry" and data["position"] > position:
                position = int(data["position"])
                yield data
            elif event == "end":
                return


def render(entry: Json) -> str:
    """Return one entry as a line for people."""
    body = entry["body"]
    text = ""
    match entry["kind"]:
        case "user" | "assistant" | "system":
            calls = ", ".join(c["name"] for c in body.get("tool_calls") or [])
            text = str(body.get("text", "")) + (f" [calls {calls}]" if calls else "")
        case "tool.start":
            text = f"{body.get('name')}({json.dumps(body.get('arguments'))[:200]})"
        case "tool.result":
            text = str(body.get("output", ""))[:300]
        case _:
            text = json.dumps(body)[:300]
    text = text.rstrip().replace("\n", "\n" + " " * 24)
    return f"{entry['position']:>6}  {entry['kind']:<14}  {text}"


@session.command("log")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on as entries come.")
@click.option("--after", default=0, help="Only entries after this position.")
@click.argument("ref")
@verb
def log(inv: Invocation, ref: str, following: bool, after: int) -> None:
    """Show a session's context log."""
    if following:
        for entry in follow(inv.server, ref, after):
            inv.out.stream_item(entry, render(entry))
        return
    entries: list[Json] = []
    position = after
    while True:
        path, query = f"/v1/sessions/{ref}/log", {"after": position, "limit": 1000}
        page = inv.server.call("GET", path, query=query)["entries"]
        if not page:
            break
        entries += page
        position = page[-1]["position"]
    inv.out.data(entries, "\n".join(render(e) for e in entries) if entries else None)


@session.command("ls")
@click.option("-a", "--all", "everything", is_flag=True, help="Closed ones too.")
@verb
def ls(inv: Invocation, everything: bool) -> None:
    """List sessions."""
    found = inv.server.call("GET", "/v1/sessions", query={"all": 1 if everything else None})["sessions"]
    if inv.out.as_json:
        inv.out.data(found)
        return
    rows = [{**row, "version": row["code_version"][:10], "age": ago(row["created"])} for row in found]
    columns = [
        ("SESSION ID", "id"), ("AGENT", "agent"), ("VERSION", "version"), ("STATE", "state"), ("HEAD", "head"),
        ("CREATED", "age"), ("NAME", "name"),
    ]  # fmt: skip
    inv.out.table(rows, columns)


@session.command("suspend")
@click.argument("ref")
@verb
def suspend(inv: Invocation, ref: str) -> None:
    """Freeze a session now: snapshot stored, machine's memory given back."""
    _say(inv, inv.server.call("POST", f"/v1/sessions/{ref}/suspend", {}))


@session.command("resume")
@click.argument("ref")
@verb
def resume(inv: Invocation, ref: str) -> None:
    """Thaw a session without a message."""
    _say(inv, inv.server.call("POST", f"/v1/sessions/{ref}/resume", {}))


@session.command("fork")
@click.option("--at", default=None, type=int, help="Log position; default: the newest.")
@click.option("--name", default="", help="Name of the child.")
@click.argument("ref")
@verb
def fork(inv: Invocation, ref: str, at: int | None, name: str) -> None:
    """Fork a session: log and machine together."""
    body: dict[str, Any] = {"name": name}
    if at is not None:
        body["at"] = at
    _say(inv, inv.server.call("POST", f"/v1/sessions/{ref}/fork", body, key=new_key()))


@session.command("close")
@click.argument("refs", nargs=-1, required=True)
@verb
def close(inv: Invocation, refs: tuple[str, ...]) -> None:
    """End sessions for good; their logs stay readable."""
    rows = [inv.server.call("POST", f"/v1/sessions/{ref}/close", {}) for ref in refs]
    inv.out.data(rows, "\n".join(r["id"] for r in rows))
