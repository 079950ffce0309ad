"""`recess up` and `recess down`: the server in the foreground, and its end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import signal
import sys

import click

from recess.cli.common import Invocation, verb
from recess.config import load_config
from recess.errors import BadInput, RecessError, Timeout
from recess.sdk.local_server import is_up, transport_for

END_S = 120.0
"""How long a server may take to put its machines away and end."""


def listen_address(text: str, option: str) -> tuple[str, int] | None:
    """Return where to listen for "HOST:PORT", loopback without a host; None for "". Raises BadInput naming the option. Pure."""
    if not text:
        return None
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit()):
        raise BadInput(f"{option} {text}: expected HOST:PORT")
    return host or "127.0.0.1", int(port)


@click.command("up")
@click.option("--listen", default="", metavar="HOST:PORT", help="Listen on TCP too; RECESS_TOKEN must be set.")
@click.option("--detached", is_flag=True, hidden=True, help="Started by a client: errors go to the log as JSON.")
@click.option("--home", default="", hidden=True, help="Started by a client: the home it means.")
@verb
def up(inv: Invocation, listen: str, detached: bool, home: str) -> int:
    """Run the server in the foreground until Ctrl-C; machines keep running under their keepers."""
    if home:
        inv.config = load_config(home=home)
    # Imported here: the server's stack costs what no other verb should pay.
    from recess.api.app import serve

    # A client that goes away while we write must be an error of that write, not our end.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    address = listen_address(listen, "--listen")

    def ready() -> None:
        inv.out.progress(f"recess: serving {inv.config.home} on {inv.config.socket_path} (pid {os.getpid()})")

    try:
        asyncio.run(serve(inv.config, tcp=address, on_ready=ready))
    except RecessError as error:
        if detached:
            print(json.dumps(error.to_dict()), file=sys.stderr, flush=True)
            return error.exit_code
        raise
    except KeyboardInterrupt:
        return 130
    return 0


@click.command("down")
@click.option("--all", "everything", is_flag=True, help="End the machines, too.")
@verb
def down(inv: Invocation, everything: bool) -> None:
    """Stop the local server; machines keep running under their keepers unless --all."""
    transport = transport_for(inv.config)
    if not is_up(transport):
        inv.out.data({"stopped": False}, "no server is running")
        return
    # Its process, not its socket: the socket goes first, while machines are still being put away.
    local = None if inv.config.url else _process(int(transport.call("GET", "/v1/info")["pid"]))
    try:
        transport.call("POST", "/v1/shutdown", {"detach": not everything})
        if local is not None and not select.select([local], [], [], END_S)[0]:
            raise Timeout(f"the server has not ended in {END_S:g} s", hint="it may still be putting machines away")
    finally:
        if local is not None:
            os.close(local)
    inv.out.data({"stopped": True}, "stopped")


def _process(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process ends; None if it has."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
