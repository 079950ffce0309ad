"""`recess context`: other homes and servers by name."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from recess.cli.common import Invocation, verb
from recess.config import contexts_path
from recess.contexts import DEFAULT, Place, load_book, save_book
from recess.errors import BadInput, Unavailable


def _path() -> Path:
    path = contexts_path()
    if path is None:
        raise Unavailable("there is no folder for contexts", hint="set HOME or XDG_CONFIG_HOME")
    return path


@click.group("context")
def context() -> None:
    """Other homes and servers by name: create, use, ls, show, rm."""


@context.command("create")
@click.option("--home", default="", metavar="PATH", help="A home on this host.")
@click.option("--url", default="", help="A server elsewhere: http://HOST:PORT.")
@click.option("--token-file", default="", metavar="FILE", help='Its token, from a file; "-": stdin.')
@click.option("--use", is_flag=True, help="Use it from now on.")
@click.argument("name")
@verb
def create(inv: Invocation, name: str, home: str, url: str, token_file: str, use: bool) -> None:
    """Make a context NAME, or change it."""
    place = Place(str(Path(home).expanduser().absolute()) if home else "", url, _token(token_file))
    if place.token and not place.url:
        raise BadInput("a token belongs to a --url")
    book = load_book(_path()).with_place(name, place)
    save_book(_path(), book.using(name) if use else book)
    inv.out.data({"name": name, "home": place.home, "url": place.url}, name)


def _token(file: str) -> str:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text() if file else ""
    except (OSError, UnicodeDecodeError) as exc:
        raise BadInput(f"--token-file {file}: {exc}") from exc
    return text.strip()


@context.command("use")
@click.argument("name")
@verb
def use(inv: Invocation, name: str) -> None:
    """Use context NAME from now on; "default" is the home of this user."""
    save_book(_path(), load_book(_path()).using(name))
    inv.out.data({"name": name}, name)


@context.command("ls")
@verb
def ls(inv: Invocation) -> None:
    """List contexts; the one in use has a star."""
    book, chosen = load_book(_path()), inv.config.context or DEFAULT
    rows = [
        {"name": name, "current": name == chosen, "mark": "*" if name == chosen else "", "home": place.home,
         "url": place.url, "where": place.url or place.home or "the home of this user", "token": bool(place.token)}
        for name, place in {DEFAULT: Place(), **dict(sorted(book.places.items()))}.items()
    ]  # fmt: skip
    inv.out.table(rows, (("", "mark"), ("NAME", "name"), ("WHERE", "where")), ids="name")


@context.command("show")
@click.argument("name", default="")
@verb
def show(inv: Invocation, name: str) -> None:
    """Show the context in use, or NAME; never its token."""
    name = name or inv.config.context or DEFAULT
    place = load_book(_path()).place(name)
    where = place.url or place.home or str(inv.config.home)
    inv.out.data({"name": name, "home": place.home, "url": place.url, "token": bool(place.token)}, f"{name}  {where}")


@context.command("rm")
@click.argument("name")
@verb
def rm(inv: Invocation, name: str) -> None:
    """Forget context NAME; its home stays."""
    save_book(_path(), load_book(_path()).without(name))
    inv.out.data({"name": name}, name)
