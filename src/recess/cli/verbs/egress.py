"""`recess egress`: what a machine may reach, what it tried, and changing it while the machine runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click

from recess.cli.common import Invocation, verb

FOLLOW_EVERY_S = 0.5


def _line(decision: Mapping[str, Any]) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(decision["wall_s"]))
    told = "allowed" if decision["allowed"] else "DENIED "
    port = f":{decision['port']}" if decision["port"] else ""  # a Unix socket has none
    place = f"{decision['host']}{port}" if decision["host"] else "-"
    return f"{when}  {told}  {decision['method']:<8} {place}  ({decision['reason']})"


@click.command("egress")
@click.option("--allow", multiple=True, metavar="HOST", help="Let it reach this too, from now on.")
@click.option("--deny", multiple=True, metavar="HOST", help="Take a rule away; calls that are open run on.")
@click.option("-f", "--follow", is_flag=True, help="Show calls as they come.")
@click.option("-n", "--tail", default=20, help="How many of the newest calls.")
@click.argument("machine")
@verb
def egress(
    inv: Invocation, machine: str, allow: tuple[str, ...], deny: tuple[str, ...], follow: bool, tail: int
) -> None:
    """Show what MACHINE may reach and what it tried; --allow and --deny change its rules."""
    place = f"/v1/machines/{machine}/egress"
    if allow or deny:
        changed = inv.server.call("PATCH", place, {"allow": list(allow), "deny": list(deny)})
        inv.out.data(changed, "\n".join(changed["allow"]) or "no rule is left: it reaches nothing")
        return
    found = inv.server.call("GET", place)
    found["decisions"] = found["decisions"][-tail:] if tail > 0 else []
    if not follow:
        lines = [f"network  {found['network']}"]
        lines += [f"allow    {rule}" for rule in found["allow"]]
        lines += [f"route    {name} -> {url}" for name, url in found["routes"].items()]
        lines += [f"secret   {text}" for text in found["secrets"]]
        lines += [f"{found['allowed']} calls allowed, {found['denied']} denied"]
        inv.out.data(found, "\n".join(lines + [_line(one) for one in found["decisions"]]))
        return
    while True:
        for one in found["decisions"]:
            inv.out.stream_item(one, _line(one))
        time.sleep(FOLLOW_EVERY_S)
        found = inv.server.call("GET", place, query={"after": found["number"]})
