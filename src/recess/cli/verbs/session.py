"""`recess session start|send|cancel|questions|answer|log|ls|suspend|resume|take|hand-back|inspect|fork|rewind|snapshots|diff|blobs|blob|close`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from recess.cli.common import Invocation, new_key, parse_pairs, verb
from recess.cli.entry_lines import render
from recess.cli.output import ago, short
from recess.cli.verbs.session_blobs import BLOBS
from recess.cli.verbs.snapshots import diff_lines
from recess.errors import ServerUnavailable
from recess.sdk.transport import Json, Transport
from recess.units import format_bytes

RECONNECT_S = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 6.0, 6.0)


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
    _say(inv, inv.act("POST", "/v1/sessions", body, key=new_key()))


@session.command("send")
@click.option("--key", default="", help="Idempotency key: the same key never sends twice.")
@click.option("-d", "--detach", is_flag=True, help="Do not wait for the answer.")
@click.option(
    "--mode", type=click.Choice(["queue", "steer", "interrupt"]), default="queue", show_default=True,
    help="While a turn is at work: wait for a turn of its own, be seen by this one, or stop this one first.",
)  # fmt: skip
@click.option(
    "--contract", type=click.IntRange(0), default=0,
    help="The least contract that the code which takes it must have (`contract=` of @agent).",
)  # fmt: skip
@click.argument("ref")
@click.argument("text")
@verb
def send(inv: Invocation, ref: str, text: str, key: str, detach: bool, mode: str, contract: int) -> int:
    """Send TEXT to a session and show what happens until the turn ends. TEXT "-" reads stdin."""
    message = sys.stdin.read() if text == "-" else text
    body = {"text": message, "mode": mode, **({"contract": contract} if contract else {})}
    sent = inv.server.call("POST", f"/v1/sessions/{ref}/messages", body, key=key or new_key())
    if detach:
        inv.out.data(sent, str(sent["position"]))
        return 0
    inv.out.progress(f"position {sent['position']}" + (" (sent before)" if sent["replayed"] else ""))
    status, entries = _follow_turn(inv, ref, int(sent["position"]))
    if inv.out.as_json:
        inv.out.data({**sent, "status": status, "entries": entries})
    return 0 if status == "done" else 1


def _follow_turn(inv: Invocation, ref: str, position: int) -> tuple[str, list[Json]]:
    """Print entries after `position` until the turn that the message there went into has ended; return its status. That is
    the turn begun for it or, for one that was sent into an open turn, the first that ends."""
    seen: list[Json] = []
    page = inv.server.call("GET", f"/v1/sessions/{ref}/log", query={"after": position - 1, "limit": 1})["entries"]
    started = bool(page) and page[0]["body"].get("mode") == "steer"

    def trouble(why: str) -> None:
        inv.out.progress(f"its machine does not come up: {why} (it is tried again, the message is kept)")

    for entry in follow(inv.server, ref, position, trouble=trouble):
        seen.append(entry)
        if not inv.out.as_json:
            inv.out.line(render(entry))
        if entry["kind"] == "ask":
            inv.out.progress(f"it waits for an answer: recess session answer {ref} {entry['ref']} TEXT")
        if entry["kind"] == "turn.start" and entry["body"].get("inbox") == position:
            started = True
        if entry["kind"] == "turn.end" and started:
            return str(entry["body"].get("status", "done")), seen
    return "unknown", seen


def follow(
    server: Transport, ref: str, after: int, *,
    trouble: Callable[[str], None] = lambda why: None, pause: Callable[[float], None] = time.sleep,
) -> Iterator[Json]:  # fmt: skip
    """Yield entries as they are appended, without gap or double, through cut connections and server restarts; `trouble` is
    told why none come. Raises ServerUnavailable when there is no server for some 20 s."""
    last, failed = str(after), 0
    while True:
        try:
            for event, ident, data in server.events(f"/v1/sessions/{ref}/events", after=last):
                failed = 0
                if event == "end":
                    return
                if event == "trouble" and data["failure"]:
                    trouble(str(data["failure"]))
                last = ident or last
                if event == "entry":
                    yield data
        except ServerUnavailable:
            if failed >= len(RECONNECT_S):
                raise
        pause(RECONNECT_S[min(failed, len(RECONNECT_S) - 1)])
        failed += 1


@session.command("cancel")
@click.option("--reason", default="", help="Why, for the log and the model.")
@click.argument("ref")
@verb
def cancel(inv: Invocation, ref: str, reason: str) -> None:
    """Stop the turn at work; the agent's memory and machine stay."""
    sent = inv.server.call("POST", f"/v1/sessions/{ref}/cancel", {"reason": reason}, key=new_key())
    inv.out.data(sent, str(sent["position"]))


@session.command("questions")
@click.argument("ref")
@verb
def questions(inv: Invocation, ref: str) -> None:
    """Show what a session waits for a human to answer."""
    found = inv.server.call("GET", f"/v1/sessions/{ref}/questions")["questions"]
    if inv.out.as_json:
        inv.out.data(found)
        return
    rows = [{**one, "id": one["ref"], "answers": " | ".join(one["choices"])} for one in found]
    inv.out.table(rows, [("QUESTION ID", "id"), ("ANSWERS", "answers"), ("TEXT", "text")])


@session.command("answer")
@click.argument("ref")
@click.argument("question")
@click.argument("text")
@verb
def answer(inv: Invocation, ref: str, question: str, text: str) -> None:
    """Answer QUESTION (an id that `session questions` shows) with TEXT. The first answer stands."""
    sent = inv.server.call("POST", f"/v1/sessions/{ref}/answers", {"question": question, "text": text})
    inv.out.data(sent, str(sent["position"]))


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


@session.command("take")
@click.option("--why", default="", help="Why, for the log and the model.")
@click.argument("ref")
@verb
def take(inv: Invocation, ref: str, why: str) -> None:
    """Take a session over: its turn is stopped, its machine is yours (`recess exec`), messages wait until `hand-back`."""
    row = inv.server.call("POST", f"/v1/sessions/{ref}/take", {"why": why})
    inv.out.progress(f"its machine is {row['machine']}: recess exec {row['machine']} COMMAND")
    _say(inv, row)


@session.command("hand-back")
@click.argument("ref")
@click.argument("text", default="")
@verb
def hand_back(inv: Invocation, ref: str, text: str) -> None:
    """Give a session that was taken over back to its agent, with TEXT as a message to it."""
    _say(inv, inv.server.call("POST", f"/v1/sessions/{ref}/hand-back", {"text": text}, key=new_key()))


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


@session.command("rewind")
@click.option("--to", required=True, type=int, help="Log position to go back to.")
@click.argument("ref")
@verb
def rewind(inv: Invocation, ref: str, to: int) -> None:
    """Take a session back to a position, log and machine together; what came after stays in the log."""
    _say(inv, inv.server.call("POST", f"/v1/sessions/{ref}/rewind", {"to": to}))


@session.command("snapshots")
@click.argument("ref")
@verb
def snapshots(inv: Invocation, ref: str) -> None:
    """List a session's snapshots: the turn each is of, why it was taken, what it cost."""
    found = inv.server.call("GET", f"/v1/sessions/{ref}/snapshots")
    if inv.out.as_json:
        inv.out.data(found)
        return
    rows = [
        {
            **one,
            "short": short(one["snapshot"]),
            "turn": str(one["turn"]) + ("" if one["whole"] else " (at work)"),
            "stored": format_bytes(int(one["new_bytes"])) + ("" if one["here"] else " (pruned)"),
            "still": f"{one['standstill_s'] * 1000:.0f} ms",
            "age": ago(one["ts"]),
        }
        for one in found["snapshots"]
    ]
    columns = [
        ("SNAPSHOT ID", "short"), ("AT", "position"), ("TURN", "turn"), ("WHY", "why"), ("STORED", "stored"),
        ("STANDSTILL", "still"), ("CREATED", "age"),
    ]  # fmt: skip
    inv.out.table(rows, columns)
    cost = found["cost"]
    inv.out.progress(f"in all {format_bytes(int(cost['new_bytes']))} stored, {cost['standstill_s']:.2f} s stood still")


@session.command("inspect")
@click.argument("ref")
@verb
def inspect(inv: Invocation, ref: str) -> None:
    """Show a session with what it has cost: bytes stored and moved, processor seconds, machine hours saved."""
    row = inv.server.call("GET", f"/v1/sessions/{ref}")
    cost = inv.server.call("GET", f"/v1/sessions/{ref}/cost")
    inv.out.data({**row, "cost": cost}, "\n".join(f"{name:<14} {value}" for name, value in _about(row, cost)))


def _about(row: Json, cost: Json) -> list[tuple[str, str]]:
    stored, written, read = (format_bytes(int(cost[name])) for name in ("stored_bytes", "written_bytes", "read_bytes"))
    waits = row["meta"].get("by_hand")
    about = [
        ("id", row["id"]), ("name", row["name"]), ("agent", f"{row['agent']} {row['code_version']}"),
        ("state", row["state"] + (f", taken over: {waits}" if waits else "")), ("machine", row["machine"]),
        ("failure", str(row["meta"].get("failure", ""))), ("log", f"{row['head']} entries"),
        ("turns", f"{cost['turns']} ended, {cost['replies']} replies, {cost['tool_calls']} tool calls"),
        ("tokens", f"{cost['input_tokens']} in, {cost['output_tokens']} out"),
        ("snapshots", f"{cost['snapshots']}, {cost['standstill_s']:.2f} s stood still"),
        ("thaws", f"{cost['thaws']}, {cost['thaw_s']:.2f} s"),
        ("stored", f"{stored} ({written} written in all)"), ("moved", f"{written} out, {read} in"),
        ("compression", f"{cost['cpu_s']:.2f} CPU s"),
        ("machine time", f"{cost['up_s'] / 3600:.2f} h held, {cost['machine_hours_saved']:.2f} h saved"),
    ]  # fmt: skip
    return [(name, value) for name, value in about if value]


@session.command("diff")
@click.argument("ref")
@click.argument("left", metavar="TURN_A", type=click.IntRange(min=0))
@click.argument("right", metavar="TURN_B", type=click.IntRange(min=0))
@verb
def diff(inv: Invocation, ref: str, left: int, right: int) -> None:
    """Show what changed in a session's machine from the end of TURN_A to that of TURN_B, by the newest snapshots that are not
    newer: with the agent's setting snapshot="turn" there is one of each turn."""
    found = inv.server.call("GET", f"/v1/sessions/{ref}/diff", query={"from": left, "to": right})
    ends = [f"turn {one['turn']}, entry {one['position']}" for one in (found["from"], found["to"])]
    inv.out.progress(f"from {ends[0]} to {ends[1]}")
    inv.out.data(found, "\n".join(diff_lines(found)))


@session.command("close")
@click.argument("refs", nargs=-1, required=True)
@verb
def close(inv: Invocation, refs: tuple[str, ...]) -> None:
    """End sessions for good; their logs stay readable."""
    rows = [inv.server.call("POST", f"/v1/sessions/{ref}/close", {}) for ref in refs]
    inv.out.data(rows, "\n".join(r["id"] for r in rows))


for command in BLOBS:
    session.add_command(command)
