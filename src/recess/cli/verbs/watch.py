"""`recess top`, `stats`, `port` and `events`: what goes on in machines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import click

from recess.cli.common import Invocation, parse_pairs, verb
from recess.cli.verbs.ps import shown_guest, shown_host
from recess.errors import BadInput, Conflict, NotFound
from recess.sdk.transport import Json
from recess.units import format_bytes, format_duration, parse_duration, parse_moment

EVERY_S = 1.0
_POLL_S = 25


@click.command("top")
@click.argument("machine")
@verb
def top(inv: Invocation, machine: str) -> None:
    """Show the processes of a running MACHINE."""
    found = inv.server.call("GET", f"/v1/machines/{machine}/top")["processes"]
    if inv.out.as_json:
        inv.out.data(found)
        return
    rows = [{**one, "cpu": f"{one['cpu_s']:.2f}", "rss": format_bytes(one["rss_bytes"])} for one in found]
    columns = [
        ("PID", "pid"), ("PPID", "ppid"), ("UID", "uid"), ("STATE", "state"), ("CPU SECONDS", "cpu"), ("MEMORY", "rss"),
        ("COMMAND", "command"),
    ]  # fmt: skip
    inv.out.table(rows, columns, ids="pid")


@click.command("port")
@click.argument("machine")
@click.argument("guest", default="")
@verb
def port(inv: Invocation, machine: str, guest: str) -> None:
    """Show where the ports of MACHINE are published, or one GUEST port."""
    row = inv.server.call("GET", f"/v1/machines/{machine}")
    serves = row["state"] in ("running", "paused") or row["meta"].get("napping")
    there = row["meta"].get("ports") or [] if serves else []
    wanted = guest.removesuffix("/tcp")
    found = [one for one in there if not wanted or str(one[2]) == wanted]
    if wanted and not found:
        raise NotFound(f"machine {row['name']} publishes no port {guest}", hint="recess port shows those it does")
    data = [{"ip": ip, "host": host, "guest": inner} for ip, host, inner in found]
    lines = [("" if wanted else f"{shown_guest(inner)} -> ") + shown_host(ip, host) for ip, host, inner in found]
    inv.out.data(data, "\n".join(lines) if lines else None)


@click.command("stats")
@click.option("-a", "--all", "everything", is_flag=True, help="Docker's; those without a VM have no figures.")
@click.option("--no-stream", is_flag=True, help="Once, not every second.")
@click.argument("machines", nargs=-1)
@verb
def stats(inv: Invocation, machines: tuple[str, ...], everything: bool, no_stream: bool) -> None:
    """Show memory and CPU of running MACHINES (default: all)."""
    before, at = _sample(inv, machines), time.monotonic()
    while True:
        time.sleep(EVERY_S)
        now, then = _sample(inv, machines), time.monotonic()
        rows = [usage(row, before.get(row["id"]), then - at) for row in now.values()]
        _show(inv, rows, last=no_stream)
        if no_stream:
            return
        before, at = now, then


def _sample(inv: Invocation, refs: Sequence[str]) -> dict[str, Json]:
    """Return the machines with their figures, by id; one that ends meanwhile is left out, one that is named is not."""
    wanted = list(refs) or [row["id"] for row in inv.server.call("GET", "/v1/machines")["machines"]]
    out = {}
    for ref in wanted:
        try:
            row = inv.server.call("GET", f"/v1/machines/{ref}")
        except (NotFound, Conflict):
            if refs:
                raise
            continue
        if "stats" in row:
            out[row["id"]] = row
    return out


def usage(row: Json, before: Json | None, seconds: float) -> Json:
    """Return one line of figures: CPU since the sample before, memory of the host's processes. Pure."""
    figures, spec = row["stats"], row["spec"]
    cpu = 0.0
    if before is not None and seconds > 0:
        cpu = max(0.0, 100.0 * (figures["cpu_s"] - before["stats"]["cpu_s"]) / seconds)
    return {
        "id": row["id"], "name": row["name"], "cpu_percent": round(cpu, 1), "memory_bytes": figures["pss_bytes"],
        "private_bytes": figures["private_bytes"], "limit_bytes": spec["memory_bytes"], "guest": figures.get("guest"),
    }  # fmt: skip


def _show(inv: Invocation, rows: list[Json], *, last: bool) -> None:
    if inv.out.as_json and not last:
        for row in rows:
            inv.out.stream_item(row, "")
        return
    if inv.out.as_json or inv.out.template:
        inv.out.data(rows)
        return
    shown = [
        {
            **row, "cpu": f"{row['cpu_percent']:.1f}%", "mem": format_bytes(row["memory_bytes"]),
            "own": format_bytes(row["private_bytes"]), "limit": format_bytes(row["limit_bytes"]),
        }
        for row in rows
    ]  # fmt: skip
    columns = [("MACHINE ID", "id"), ("NAME", "name"), ("CPU", "cpu"), ("MEMORY", "mem"), ("OF ITS OWN", "own")]
    inv.out.table(shown, [*columns, ("SIZE", "limit")])


@click.command("events")
@click.option("--since", default="", metavar="TIME", help="Also what happened since: 10m (ago), 2026-11-23T10:20:30Z.")
@click.option("--until", default="", metavar="IN", help="End after this time, like 30s.")
@click.option("-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE", help="By event, machine, name.")
@verb
def events(inv: Invocation, since: str, until: str, filters: tuple[str, ...]) -> None:
    """Show what happens to machines as it happens: JSON lines with --json."""
    wanted = parse_pairs(filters, "--filter")
    if set(wanted) - {"event", "machine", "name"}:
        raise BadInput("--filter: expected event=, machine= or name=")
    oldest = parse_moment(since, time.time()) if since else None
    end = time.monotonic() + parse_duration(until) if until else None
    after: Any = "now" if oldest is None else 0
    while end is None or time.monotonic() < end:
        left = _POLL_S if end is None else max(0, min(_POLL_S, int(end - time.monotonic()) + 1))
        answer = inv.server.call("GET", "/v1/events", query={"after": after, "wait": left})
        after = answer["next"]
        for event in answer["events"]:
            if (oldest is None or event["ts"] >= oldest) and _wanted(event, wanted):
                inv.out.stream_item(event, event_line(event))


def _wanted(event: Json, filters: dict[str, str]) -> bool:
    known = {"event": event["action"], "machine": event["id"], "name": event["name"]}
    return all(known[key] == value or (key == "machine" and event["name"] == value) for key, value in filters.items())


def event_line(event: Json) -> str:
    """Return one event as a line: time, action, machine, details."""
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(event["ts"]))
    details = ", ".join(f"{name}={_value(name, value)}" for name, value in event["details"].items() if value != "")
    return f"{at}  {event['action']:<9} {event['id']} {event['name']}" + (f"  ({details})" if details else "")


def _value(name: str, value: Any) -> str:
    return format_duration(value) if name.endswith("_s") and isinstance(value, int | float) else str(value)
