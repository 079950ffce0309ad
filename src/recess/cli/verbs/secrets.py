"""`recess secrets`: the host's secrets by name. A value is read from stdin, a file or a variable, never from the command
line (which every process of the host can read), and is never shown again."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from recess.cli.common import Invocation, callers_env, verb
from recess.errors import BadInput, NotFound

VALUE_BYTES_MAX = 64 * 1024


@click.group("secrets")
def secrets() -> None:
    """Keep values that machines use and never hold: run --secret NAME@host."""


@secrets.command("set")
@click.option("--file", "path", type=click.Path(path_type=Path), default=None, help="Take the value from this file.")
@click.option("--env", "variable", default="", metavar="VARIABLE", help="Take the value from this variable.")
@click.option(
    "--from", "source", default="", metavar="SOURCE", help="Leave it where it is: keyring:…, vault:…, file:…, env:…"
)
@click.argument("name")
@verb
def set_(inv: Invocation, name: str, path: Path | None, variable: str, source: str) -> None:
    """Keep a value under NAME: what is typed or piped, --file, --env; or --from says where it stays."""
    if sum(map(bool, (path, variable, source))) > 1:
        raise BadInput("only one of --file, --env and --from")
    body = {"source": source} if source else {"value": _value(name, path, variable)}
    kept = inv.server.call("PUT", f"/v1/secrets/{name}", body)
    inv.out.data(kept, kept["name"])


def _value(name: str, path: Path | None, variable: str) -> str:
    if variable:
        known = callers_env()
        if variable not in known:
            raise NotFound(f"no variable {variable} in this environment", kind="variable", ref=variable)
        return known[variable]
    if path is not None:
        try:
            return path.read_bytes()[:VALUE_BYTES_MAX].decode("latin-1")
        except OSError as exc:
            raise BadInput(f"{path}: {exc.strerror}") from exc
    if sys.stdin.isatty():
        return str(click.prompt(f"value of {name}", hide_input=True, err=True))
    return sys.stdin.buffer.read(VALUE_BYTES_MAX).decode("latin-1")


@secrets.command("ls")
@verb
def ls(inv: Invocation) -> None:
    """List names and where their values are kept."""
    rows = inv.server.call("GET", "/v1/secrets")["secrets"]
    inv.out.table(rows, [("NAME", "name"), ("KEPT", "kept")], ids="name")


@secrets.command("rm")
@click.argument("names", nargs=-1, required=True)
@verb
def rm(inv: Invocation, names: tuple[str, ...]) -> None:
    """Forget secrets; machines that use one get an error from now on."""
    for name in names:
        inv.server.call("DELETE", f"/v1/secrets/{name}")
        inv.out.line(name)
    if inv.out.as_json:
        inv.out.data(list(names))
