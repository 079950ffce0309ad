"""`recess doctor`: does this host do, and does a guest truly run here?"""

from __future__ import annotations

import click

from recess.cli.common import Invocation, verb


@click.command("doctor")
@click.option(
    "--install-firecracker",
    is_flag=True,
    help="Fetch Firecracker's official release into the home, by its pinned checksum, and do nothing else.",
)
@verb
def doctor(inv: Invocation, install_firecracker: bool) -> int:
    """Check this host and boot a guest; exit code 1 when something that is needed is missing."""
    if install_firecracker:
        done = inv.server.call("POST", "/v1/doctor", {"install_firecracker": True})
        inv.out.data(done, f"{done['installed']}\nRECESS_DRIVER=firecracker chooses it")
        return 0
    report = inv.server.call("POST", "/v1/doctor", {})
    lines = []
    for check in report["checks"]:
        lines.append(f"{'ok  ' if check['ok'] else 'FAIL'}  {check['name']}: {check['detail']}")
        if check.get("hint") and not check["ok"]:
            lines.append(f"      hint: {check['hint']}")
    inv.out.data(report, "\n".join(lines))
    return 0 if report["ok"] else 1
