"""`recess snapshots push|pull|export|import`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import click

from recess.cli.common import Invocation, verb
from recess.cli.output import short
from recess.errors import BadInput, OutOfSpace
from recess.sdk.files import download, upload
from recess.units import MIB, format_bytes

TELL_EVERY_BYTES = 64 * MIB
_REMOTE = "A bucket (s3://BUCKET/PREFIX, gs://, az://) or an absolute folder; default: RECESS_REMOTE."

_WITH_IMAGE = "Its root image and kernel, too: for a node that has not exactly these."


@click.command("push")
@click.option("--remote", default="", metavar="URL", help=_REMOTE)
@click.option("--check", is_flag=True, help="Read everything back from there and check it.")
@click.option("--with-image", is_flag=True, help=_WITH_IMAGE)
@click.argument("ref")
@verb
def push(inv: Invocation, ref: str, remote: str, check: bool, with_image: bool) -> None:
    """Copy a snapshot to a remote store; only what is missing there travels."""
    body = {"remote": _absolute(remote), "check": check, "with_image": with_image}
    done = inv.act("POST", f"/v1/snapshots/{ref}/push", body)
    inv.out.progress(_moved(done, "sent", "there"))
    inv.out.data(done, done["snapshot"])


@click.command("pull")
@click.option("--remote", default="", metavar="URL", help=_REMOTE)
@click.option("--name", default="", metavar="NAME", help="Call it so here.")
@click.argument("ref")
@verb
def pull(inv: Invocation, ref: str, remote: str, name: str) -> None:
    """Copy a snapshot (id or name) from a remote store; only what is missing here travels."""
    body = {"ref": ref, "remote": _absolute(remote), "name": name}
    done = inv.act("POST", "/v1/snapshot-pulls", body)
    inv.out.progress(_moved(done, "came", "here"))
    _tell_missing(inv, done)
    inv.out.data(done, done["snapshot"])


def _tell_missing(inv: Invocation, done: dict[str, Any]) -> None:
    if done["missing"]:
        inv.out.progress(f"cannot be restored here yet: {done['missing']}")
        inv.out.progress("  hint: send it again, --with-image")


def _absolute(remote: str) -> str:
    """Return a folder's whole path: the server's working folder is not the user's."""
    return remote if not remote or "://" in remote else str(Path(remote).expanduser().absolute())


def _moved(done: dict[str, Any], went: str, where: str) -> str:
    was = f"{done['blobs_there']} were {where} already"
    return f"{went}: {done['blobs_sent']} blobs, {format_bytes(int(done['bytes_sent']))}; {was}"


@click.command("export")
@click.option("--with-image", is_flag=True, help=_WITH_IMAGE)
@click.option("--as-stored", is_flag=True, help="Do not compress its layers harder first: at once, and larger.")
@click.argument("ref")
@click.argument("file")
@verb
def export(inv: Invocation, ref: str, file: str, with_image: bool, as_stored: bool) -> None:
    """Write a snapshot and its template to FILE ("-": stdout), a tar that `import` reads anywhere.

    An export that broke off goes on where it was.
    """
    image = {"image": "1" if with_image else "0", "as_stored": "1" if as_stored else "0"}
    about = inv.act(
        "GET", f"/v1/snapshots/{ref}/archive", None, query=image
    )  # fmt: skip
    path = f"/v1/snapshots/{about['snapshot']}/export"
    on_bytes = _teller(inv, int(about["bytes"]))
    if file == "-":
        download(inv.server, path, sys.stdout.buffer, query=image, on_bytes=on_bytes)
        sys.stdout.buffer.flush()
        return
    target = Path(file)
    part = target.with_name(f".{target.name}.{about['tag'][:16]}.part")
    try:
        with part.open("ab") as out:
            have = out.tell()
            if have:
                inv.out.progress(f"going on after {format_bytes(have)}")
            download(inv.server, path, out, query={**image, "offset": str(have)}, on_bytes=lambda n: on_bytes(have + n))
            out.flush()
            os.fsync(out.fileno())
        part.replace(target)
    except OSError as exc:
        if exc.errno == 28:
            raise OutOfSpace(f"no space for {file}", hint="make room, then try again: it goes on where it was") from exc
        raise BadInput(f"cannot write {file}: {exc.strerror}") from exc
    inv.out.progress(f"{short(about['snapshot'])}: {format_bytes(int(about['bytes']))} in {file}")
    inv.out.data({**about, "file": file}, file)


@click.command("import")
@click.option("--name", default="", metavar="NAME", help="Call it so here.")
@click.option("--trust", is_flag=True, help="Also if a machine restored from it may reach out or use secrets.")
@click.argument("file")
@verb
def import_(inv: Invocation, file: str, name: str, trust: bool) -> None:
    """Take in a snapshot from FILE ("-": stdin) that `export` wrote."""
    query = {"name": name, "trust": "1" if trust else "0"}
    if file == "-":
        done = _send(inv, sys.stdin.buffer, None, query)
    else:
        try:
            with Path(file).open("rb") as source:
                done = _send(inv, source, Path(file).stat().st_size, query)
        except OSError as exc:
            raise BadInput(f"cannot read {file}: {exc.strerror}") from exc
    inv.out.progress(_moved(done, "new", "here"))
    _tell_missing(inv, done)
    inv.out.data(done, done["snapshot"])


def _send(inv: Invocation, source: BinaryIO, size: int | None, query: dict[str, str]) -> dict[str, Any]:
    on_bytes = _teller(inv, size or 0)
    return upload(inv.server, "/v1/snapshot-imports", source, size=size, query=query, on_bytes=on_bytes)


def _teller(inv: Invocation, total: int) -> Callable[[int], None]:
    """Return what tells now and then how far a transfer is."""
    told = 0

    def tell(so_far: int) -> None:
        nonlocal told
        if so_far - told >= TELL_EVERY_BYTES:
            told = so_far
            inv.out.progress(f"{format_bytes(so_far)}" + (f" of {format_bytes(total)}" if total else ""))

    return tell


TRANSFERS = (push, pull, export, import_)
