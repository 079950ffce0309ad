"""`recess mcp`: machines and sessions for a client of the Model Context Protocol, over stdin and stdout or over HTTP."""

from __future__ import annotations

import click

from recess.cli.common import Invocation, verb
from recess.cli.verbs.up import listen_address
from recess.errors import BadInput, Unavailable
from recess.sdk.client import Client


@click.command("mcp")
@click.option("--http", default="", metavar="[HOST:]PORT", help="Serve it over HTTP at /mcp; RECESS_TOKEN must be set.")
@verb
def mcp(inv: Invocation, http: str) -> None:
    """Serve the Model Context Protocol on stdin and stdout, until stdin ends; or over HTTP, until Ctrl-C."""
    address, token = listen_address(http, "--http"), inv.config.token
    if address is not None and not token:
        # Also on a loopback address: every user and every page of this host reaches that.
        raise BadInput("serving over HTTP needs a token", hint="set RECESS_TOKEN")
    try:
        from recess.adapters.mcp_server import make_server
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != "mcp":
            raise
        raise Unavailable("the MCP library is not installed", hint="pip install 'recess[mcp]'") from None
    server = make_server(Client(transport=inv.server))
    if address is None:
        server.run("stdio")
        return
    # Imported here: what no other verb should pay for.
    import uvicorn

    from recess.api.guard import Guard, tcp_socket

    with tcp_socket(*address) as listening:
        host, port = listening.getsockname()[:2]
        app = Guard(server.streamable_http_app(host=host), token)
        inv.out.progress(
            f"recess: MCP at http://{f'[{host}]' if ':' in host else host}:{port}/mcp, bearer token RECESS_TOKEN"
        )
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listening])
