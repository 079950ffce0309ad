"""`recess run` and `recess create`: a machine from an image, Docker's flags where Docker has them."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from recess.cli.common import Invocation, new_key, verb
from recess.cli.machine_flags import machine_flags, spec_of
from recess.cli.terminal import follow_main
from recess.errors import BadInput, NotFound, RecessError
from recess.sdk.transport import Json


def _shell(flags: dict[str, Any]) -> list[str]:
    """What is run in an image that names no command, by somebody who is there to talk to it."""
    return ["/bin/bash"] if flags["tty"] else ["/bin/sh"]


def _note(inv: Invocation, row: Json) -> None:
    if row["spec"]["network"] == "full":
        inv.out.progress(
            "--net full: no rules, no journal; its connections end at a suspend, restore and in forks (docs/egress.md)"
        )
    if row["status"]:
        inv.out.progress(row["status"])  # what is not as it was asked for


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.option("-d", "--detach", is_flag=True, help="Leave it running and print its id.")
@click.option("--detach-keys", default="", metavar="KEYS", help="Keys that detach, like ctrl-p,ctrl-q.")
@machine_flags
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@verb
def run(inv: Invocation, image: str, command: tuple[str, ...], detach: bool, detach_keys: str, **flags: Any) -> int:
    """Start a machine from IMAGE and run COMMAND in it; its exit code is this command's."""
    if detach and flags["remove"] and not command and flags["entrypoint"] is None:
        raise BadInput("--rm needs a command whose end ends the machine")
    body: dict[str, Any] = {"name": flags["name"], "pull": flags["pull"], "spec": spec_of(image, command, flags)}
    if not detach:
        body["shell"] = _shell(flags)
    key = flags["key"] or new_key()
    try:
        row = inv.act("POST", "/v1/machines", body, key=key)
    except KeyboardInterrupt:
        if not detach:
            _take_back(inv, body, key)
        raise
    _note(inv, row)
    if detach:
        inv.out.data(row, row["id"])
        return 0
    code = follow_main(inv, row, stdin=flags["interactive"], keys=detach_keys)
    sys.stdout.flush()
    if code is not None and row["spec"]["volumes"]:
        settled(inv, row["id"])
    if flags["remove"] and code is not None:
        # The server forgets it too, a little later, so that a second client may still read its last output.
        with contextlib.suppress(NotFound):
            inv.server.call("DELETE", f"/v1/machines/{row['id']}", query={"force": 1})
    return code or 0


def _take_back(inv: Invocation, body: Json, key: str) -> None:
    """End a machine whose making somebody interrupted who waits for its command: the server makes it all the same, and the
    command would run with nobody there. The call's key finds it."""
    inv.out.progress("interrupted: the machine goes as soon as it is made (Ctrl-C again leaves it: recess ps -a)")
    with contextlib.suppress(RecessError):  # it was not made
        row = inv.act("POST", "/v1/machines", body, key=key)
        inv.server.call("DELETE", f"/v1/machines/{row['id']}", query={"force": 1})


def settled(inv: Invocation, machine: str) -> None:
    """Wait until a machine whose command has ended has given its volumes back: whoever looks then finds its files."""
    with contextlib.suppress(NotFound):  # --rm: it is gone, and that came after
        while inv.server.call("POST", f"/v1/machines/{machine}/wait", {})["exit_code"] is None:
            inv.out.progress("bringing the volumes back")


@click.command("create", context_settings={"allow_interspersed_args": False})
@machine_flags
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@verb
def create(inv: Invocation, image: str, command: tuple[str, ...], **flags: Any) -> None:
    """Make a machine of IMAGE that is not started yet, and print its id."""
    body: dict[str, Any] = {
        "name": flags["name"],
        "pull": flags["pull"],
        "spec": spec_of(image, command, flags),
        "start": False,
    }
    if flags["tty"] or flags["interactive"]:
        body["shell"] = _shell(flags)
    row = inv.act("POST", "/v1/machines", body, key=flags["key"] or new_key())
    _note(inv, row)
    inv.out.data(row, row["id"])
