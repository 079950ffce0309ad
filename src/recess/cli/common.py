"""What every verb shares: the --json, --format and -q options, the way to the server, parsing of Docker's flag values."""

from __future__ import annotations

import functools
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from recess.cli.output import Output
from recess.config import Config, load_config
from recess.errors import BadInput
from recess.sdk.local_server import ensure_server
from recess.sdk.transport import Json, Transport

F = TypeVar("F", bound=Callable[..., Any])


class Invocation:
    """One run of a verb: its output and, when first needed, its server."""

    def __init__(self, *, as_json: bool, quiet: bool, command: str, template: str = "", context: str = "") -> None:
        if template and as_json:
            raise BadInput("--json and --format exclude each other", hint="--format json prints one document a row")
        self.out = Output(as_json=as_json, quiet=quiet, command=command, template=template)
        self.config: Config = load_config(context=context)
        self._transport: Transport | None = None

    @property
    def server(self) -> Transport:
        """Return the transport, starting the local server on first use."""
        if self._transport is None:
            if not self.config.url and not self.config.socket_path.exists():
                self.out.progress("starting the local server")
            self._transport = ensure_server(self.config)
        return self._transport

    def act(
        self, method: str, path: str, body: object, *, key: str = "", query: Mapping[str, Any] | None = None
    ) -> Json:
        """Make a call that may take long and show its progress meanwhile."""
        server = self.server
        try:
            return server.call_with_progress(method, path, body, self.out.step, key=key, query=query)
        finally:
            self.out.settle()


def verb(function: F) -> Callable[..., Any]:
    """Give a verb --json, --format and -q and pass it an `Invocation` first."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON envelope instead of text.")
    @click.option(
        "--format", "template", default="", metavar="TEMPLATE", help="Print by a template: '{{.Name}}', json."
    )
    @click.option("-q", "--quiet", is_flag=True, help="Print ids only.")
    @click.pass_context
    @functools.wraps(function)
    def wrapper(ctx: click.Context, /, *args: Any, as_json: bool, quiet: bool, template: str, **kwargs: Any) -> Any:
        above = ctx.find_root().obj or {}
        command = " ".join(ctx.command_path.split()[1:])
        invocation = Invocation(
            as_json=as_json or bool(above.get("json")), quiet=quiet, command=command, template=template,
            context=str(above.get("context", "")),
        )  # fmt: skip
        return function(invocation, *args, **kwargs)

    return wrapper


def new_key() -> str:
    """Return an idempotency key for one invocation."""
    return secrets.token_hex(16)


def parse_pairs(items: tuple[str, ...], what: str) -> dict[str, str]:
    """Return KEY=VALUE items as a dict."""
    out: dict[str, str] = {}
    for item in items:
        name, sep, value = item.partition("=")
        if not sep or not name:
            raise BadInput(f"{what}: expected NAME=VALUE, got {item!r}")
        out[name] = value
    return out


def callers_env() -> dict[str, str]:
    """Return the user's environment, which `-e NAME` hands on: the one place beside `config` that looks at it."""
    return dict(os.environ)


def parse_env(items: tuple[str, ...], files: tuple[str, ...], environ: dict[str, str]) -> dict[str, str]:
    """Return Docker's -e and --env-file: NAME alone takes the caller's value, later ones win."""
    lines: list[str] = []
    for name in files:
        try:
            text = Path(name).read_text()
        except OSError as exc:
            raise BadInput(f"--env-file {name}: {exc.strerror}") from exc
        lines += [line for line in (raw.strip() for raw in text.splitlines()) if line and not line.startswith("#")]
    out: dict[str, str] = {}
    for item in [*lines, *items]:
        name, sep, value = item.partition("=")
        if not name:
            raise BadInput(f"-e: expected NAME or NAME=VALUE, got {item!r}")
        if sep:
            out[name] = value
        elif name in environ:
            out[name] = environ[name]
    return out


def parse_port(text: str) -> tuple[str, int, int | str]:
    """Return Docker's -p as (host address, host port, guest port): "80", "8080:80", "127.0.0.1:8080:80". 0: any free port.

    Ports are bound to 127.0.0.1 unless an address is given. A path in place of the host's side is a Unix socket of the host
    ("./app.sock:80"), one in place of the guest's a socket in the machine ("8080:/run/app.sock").
    """
    outer, _, last = text.removesuffix("/tcp").rpartition(":")
    guest = last if last.startswith("/") else _port(text, last)
    if guest == 0:
        raise BadInput(f"-p {text}: expected [IP:][HOST_PORT:]GUEST_PORT")
    if "/" in outer:
        return (str(Path(outer).expanduser().absolute()), 0, guest)
    ip, sep, host = outer.rpartition(":")
    if ":" in ip and not ip.startswith("["):
        raise BadInput(f"-p {text}: expected [IP:][HOST_PORT:]GUEST_PORT")
    return (ip if sep else "127.0.0.1", _port(text, host or "0"), guest)


def _port(text: str, number: str) -> int:
    if not number.isascii() or not number.isdigit() or not 0 <= int(number) < 65536:
        raise BadInput(f"-p {text}: a port is a number from 0 to 65535")
    return int(number)


def stdin_bytes() -> bytes:
    """Return all of stdin."""
    return sys.stdin.buffer.read()
