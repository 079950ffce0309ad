"""`recess mcp`: machines and sessions for a client of the Model Context Protocol, over stdin and stdout."""

from __future__ import annotations

import click

from recess.cli.common import Invocation, verb
from recess.errors import Unavailable
from recess.sdk.client import Client


@click.command("mcp")
@verb
def mcp(inv: Invocation) -> None:
    """Serve the Model Context Protocol on stdin and stdout, until stdin ends."""
    try:
        from recess.adapters.mcp_server import make_server
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != "mcp":
            raise
        raise Unavailable("the MCP library is not installed", hint="pip install 'recess[mcp]'") from None
    make_server(Client(transport=inv.server)).run("stdio")
