"""`recess cp`, `export` and `commit`: files and folders to and from a machine, by Docker's rules, as tar streams."""

from __future__ import annotations

import os
import posixpath
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

import click

from recess.cli.common import Invocation, verb
from recess.cli.copying import pack, unpack
from recess.errors import BadInput, NotFound, Unsupported
from recess.sdk.files import download, upload

_IN_MEMORY = 32 << 20
_NAMED = 3


def split(text: str) -> tuple[str, str]:
    """Return (machine, path) of MACHINE:PATH, ("", path) of a path of this host. Pure."""
    machine, sep, path = text.partition(":")
    return (machine, path) if sep and machine and "/" not in machine else ("", text)


@click.command("cp")
@click.option("-L", "--follow-link", "follow", is_flag=True, help="Copy what a link at SOURCE points to.")
@click.option(
    "-a", "--archive", is_flag=True, help="Set-uid bits out of a machine, too. Owners: root there, the caller here."
)
@click.argument("source")
@click.argument("target")
@verb
def cp(inv: Invocation, source: str, target: str, follow: bool, archive: bool) -> None:
    """Copy a file or folder: MACHINE:PATH to PATH or the other way; PATH/. is what is in a folder. "-" is a tar on stdout
    or stdin."""
    (src_machine, src_path), (dst_machine, dst_path) = split(source), split(target)
    if bool(src_machine) == bool(dst_machine):
        raise BadInput("one of the two must be MACHINE:PATH")
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as file:
        spool = cast("BinaryIO", file)
        if dst_machine:
            _into(inv, src_path, dst_machine, dst_path or "/", follow, spool)
        else:
            _out_of(inv, src_machine, src_path or "/", dst_path, spool, follow=follow, rights=archive)


def _into(inv: Invocation, source: str, machine: str, path: str, follow: bool, spool: BinaryIO) -> None:
    path = path if path.startswith("/") else f"/{path}"
    if source == "-":
        while piece := sys.stdin.buffer.read(1 << 20):
            spool.write(piece)
        _send(inv, machine, path, spool)
        return
    here, contents = Path(source), source.endswith("/.") or source == "."
    if not os.path.lexists(here):  # before the machine is asked, maybe woken
        raise BadInput(f"{source}: no such file or folder")
    if _is_folder(inv, machine, path) or (path.endswith("/") and not here.is_dir()):
        folder, name = path, "" if contents else here.absolute().name  # which the server says, if it is no folder
    else:
        folder, name = posixpath.split(path.rstrip("/"))
    packed = pack(here, name, spool, follow=follow)
    if packed.left:
        more = f" and {len(packed.left) - _NAMED} more" if len(packed.left) > _NAMED else ""
        inv.out.progress(f"left out, neither file, folder nor link: {', '.join(packed.left[:_NAMED])}{more}")
    try:
        _send(inv, machine, folder or "/", spool, sparse=packed.with_holes)
    except Unsupported:
        if not packed.with_holes:
            raise
        spool.seek(0)
        spool.truncate()
        pack(here, name, spool, follow=follow, holes=False)
        _send(inv, machine, folder or "/", spool)


def _send(inv: Invocation, machine: str, folder: str, spool: BinaryIO, *, sparse: bool = False) -> None:
    size = spool.tell()
    spool.seek(0)
    path, query = f"/v1/machines/{machine}/archive", {"path": folder} | ({"sparse": "1"} if sparse else {})
    upload(inv.server, path, spool, size=size, query=query, on_bytes=lambda _n: None)


def _is_folder(inv: Invocation, machine: str, path: str) -> bool:
    try:
        inv.server.call("GET", f"/v1/machines/{machine}/files/list", query={"path": path})
    except (NotFound, BadInput):
        inv.server.call("GET", f"/v1/machines/{machine}")  # a machine that is not there is another matter
        return False
    return True


def _out_of(
    inv: Invocation, machine: str, path: str, target: str, spool: BinaryIO, *, follow: bool, rights: bool
) -> None:
    path = path if path.startswith("/") else f"/{path}"
    contents = path.endswith("/.")
    own = posixpath.basename(posixpath.normpath(path)) or "root"
    query = {"path": path, "name": own if target == "-" else "x", "follow": "1" if follow else "0"}
    archive = f"/v1/machines/{machine}/archive"
    if target == "-":
        download(inv.server, archive, sys.stdout.buffer, query=query, on_bytes=lambda _n: None)
        sys.stdout.buffer.flush()
        return
    place = Path(target)
    folder = place if target.endswith("/") else place.absolute().parent
    if not place.is_dir() and not folder.is_dir():
        raise BadInput(f"{folder}: a file, no folder" if os.path.lexists(folder) else f"{folder}: no such folder")
    download(inv.server, archive, spool, query={**query, "sparse": "1"}, on_bytes=lambda _n: None)
    spool.seek(0)
    into, name = (place, "" if contents else own) if place.is_dir() else (place.absolute().parent, place.name)
    dropped = unpack(spool, into, name, rights=rights)
    if dropped:
        inv.out.progress(f"set-uid or set-gid bits of {dropped} files were left out (-a keeps them)")


@click.command("export")
@click.option("-o", "--output", default="-", metavar="FILE", help='Where to; "-": stdout.')
@click.argument("machine")
@verb
def export(inv: Invocation, machine: str, output: str) -> None:
    """Write all files of a running MACHINE as a tar, which `import` makes an image of."""
    path, query = f"/v1/machines/{machine}/archive", {"path": "/", "name": ""}
    if output == "-":
        download(inv.server, path, sys.stdout.buffer, query=query, on_bytes=lambda _n: None)
        sys.stdout.buffer.flush()
        return
    try:
        with Path(output).open("wb") as out:
            download(inv.server, path, out, query=query, on_bytes=lambda _n: None)
    except OSError as exc:
        raise BadInput(f"{output}: {exc.strerror}") from exc


@click.command("commit")
@click.argument("machine")
@click.argument("name")
@verb
def commit(inv: Invocation, machine: str, name: str) -> None:
    """Make an image NAME of the files of a running MACHINE, as they are now; its memory is not in it."""
    row = inv.act("POST", f"/v1/machines/{machine}/commit", {"name": name})
    inv.out.data(row, row["name"])
