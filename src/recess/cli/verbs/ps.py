"""`recess ps`: Docker's columns and filters."""

from __future__ import annotations

import fnmatch

import click

from recess.cli.common import Invocation, verb
from recess.cli.output import ago
from recess.errors import BadInput
from recess.sdk.transport import Json

_FILTERS = ("id", "name", "label", "status", "ancestor", "exited", "session")
_COMMAND_MAX = 30
_ENDED = ("exited", "dead")
PLAIN = "(plain process)"


def ports_of(row: Json) -> list[str]:
    """Return a machine's published ports as "127.0.0.1:8080->80"; [] of one that does not run."""
    if row["state"] not in ("running", "paused") and not row["meta"].get("napping"):
        return []
    return [f"{shown_host(ip, host)}->{shown_guest(guest)}" for ip, host, guest in row["meta"].get("ports") or []]


def shown_host(ip: str, host: int) -> str:
    """Return where a port is published: "127.0.0.1:8080", or the path of a Unix socket."""
    return ip if ip.startswith("/") else f"{ip}:{host}"


def shown_guest(guest: int | str) -> str:
    """Return a port of a machine as Docker words it, "80/tcp", or the path of its Unix socket."""
    return guest if isinstance(guest, str) else f"{guest}/tcp"


def status_of(row: Json) -> str:
    """Return the state as Docker words it: "Up 3 minutes", "Exited (0)"."""
    state, code = row["state"], row["exit_code"]
    if state == "running":
        return f"Up {ago(row['created']).removesuffix(' ago')}"
    if state in _ENDED:
        return f"Exited ({137 if code is None else code})"
    return "Suspended (idle)" if state == "suspended" and row["meta"].get("napping") else str(state).capitalize()


def shown(row: Json, *, whole: bool) -> Json:
    """Return a row with what the table and Docker's templates show of it."""
    command = " ".join(row["spec"]["argv"])
    why = row["meta"].get("driver_why", "")
    return {
        **row,
        "ID": row["id"], "Names": row["name"], "Image": PLAIN if row["driver"] == "process" else row["spec"]["image"], "State": row["state"],
        "Command": command if whole or len(command) <= _COMMAND_MAX else command[: _COMMAND_MAX - 1] + "…",
        "CreatedAt": row["created"], "RunningFor": ago(row["created"]) if row["created"] else "",
        "Driver": f"{row['driver']} ({why})" if whole and why else row["driver"],
        "Status": status_of(row), "Ports": ", ".join(ports_of(row)),
        "Labels": ",".join(f"{k}={v}" for k, v in sorted(row["spec"]["labels"].items())),
    }  # fmt: skip


def passes(row: Json, filters: list[tuple[str, str]]) -> bool:
    """Tell whether a machine passes Docker's filters: those of one key are alternatives, keys add up. Pure."""
    by_key: dict[str, list[str]] = {}
    for key, value in filters:
        by_key.setdefault(key, []).append(value)
    return all(any(_matches(row, key, value) for value in values) for key, values in by_key.items())


def _matches(row: Json, key: str, value: str) -> bool:
    spec = row["spec"]
    match key:
        case "id":
            return str(row["id"]).startswith(value)
        case "name":
            return fnmatch.fnmatchcase(str(row["name"]), f"*{value.strip('^$/')}*")
        case "label":
            name, sep, wanted = value.partition("=")
            return name in spec["labels"] and (not sep or spec["labels"][name] == wanted)
        case "status":
            return str(row["state"]) == value
        case "ancestor":
            return spec["image"] in (value, f"{value}:latest") or str(row["template"]) == value
        case "exited":
            return row["state"] == "exited" and str(row["exit_code"]) == value
        case _:
            return str(row["session"]) == value


def parse_filters(items: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return -f KEY=VALUE as pairs. Raises BadInput for a key that is not known."""
    pairs = []
    for item in items:
        key, sep, value = item.partition("=")
        if not sep or key not in _FILTERS:
            raise BadInput(f"--filter {item}: expected KEY=VALUE", hint=f"keys: {', '.join(_FILTERS)}")
        pairs.append((key, value))
    return pairs


@click.command("ps")
@click.option("-a", "--all", "everything", is_flag=True, help="Those that do not run, too.")
@click.option("-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE", help=f"By {', '.join(_FILTERS)}.")
@click.option("-n", "--last", default=0, metavar="N", help="The N newest, running or not.")
@click.option("-l", "--latest", is_flag=True, help="The newest, running or not.")
@click.option("--no-trunc", is_flag=True, help="Show commands whole, and why it is this driver.")
@verb
def ps(inv: Invocation, everything: bool, filters: tuple[str, ...], last: int, latest: bool, no_trunc: bool) -> None:
    """List machines."""
    wanted, last = parse_filters(filters), 1 if latest else last
    asks_for_ended = bool(last) or any(key in ("status", "exited") for key, _ in wanted)
    answer = inv.server.call("GET", "/v1/machines", query={"all": 1 if everything or asks_for_ended else None})
    found = [row for row in answer["machines"] if passes(row, wanted)]
    found = found[:last] if last else found
    if inv.out.as_json:
        inv.out.data(found)
        return
    rows = [shown(row, whole=no_trunc) for row in found]
    columns = [
        ("MACHINE ID", "id"), ("IMAGE", "Image"), ("COMMAND", "Command"), ("CREATED", "RunningFor"), ("STATE", "state"),
        ("DRIVER", "Driver"), ("PORTS", "Ports"), ("NAME", "name"),
    ]  # fmt: skip
    inv.out.table(rows, columns)
    for row in rows:
        if row["state"] in ("damaged", "stalled"):
            inv.out.progress(f"{row['name'] or row['id']}: {row['status']}\n  hint: {row['meta']['hint']}")
