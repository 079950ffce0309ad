"""`recess logs`."""

from __future__ import annotations

import sys

import click

from recess.cli.common import Invocation, verb
from recess.cli.terminal import converse
from recess.sdk.exec_stream import ExecStream


@click.command("logs")
@click.option("-f", "--follow", is_flag=True, help="Go on until the process ends.")
@click.argument("machine")
@verb
def logs(inv: Invocation, machine: str, follow: bool) -> int:
    """Show the output of a MACHINE's main process."""
    row = inv.server.call("GET", f"/v1/machines/{machine}")
    if follow and row["state"] == "running":
        converse(ExecStream(inv.server, row["id"], {"attach": "main"}), is_tty=False, stdin=False)
        return 0
    data = inv.server.raw("GET", f"/v1/machines/{row['id']}/logs")
    if inv.out.as_json:
        inv.out.data({"logs": data.decode(errors="replace")})
    else:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    return 0
