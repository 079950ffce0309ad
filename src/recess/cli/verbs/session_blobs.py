"""`recess session blobs|blob`: what an agent kept beside its log."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import click

from recess.cli.common import Invocation, verb
from recess.errors import BadInput, Corrupt, NotFound, OutOfSpace
from recess.sdk.files import download
from recess.sdk.transport import Json
from recess.units import format_bytes


class _Hashed:
    """A file that is written and hashed at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)


@click.command("blobs")
@click.argument("ref")
@verb
def blobs(inv: Invocation, ref: str) -> None:
    """List what a session's agent kept beside its log: plots, archives, long outputs. Newest first."""
    found = inv.server.call("GET", f"/v1/sessions/{ref}/blobs")["blobs"]
    if inv.out.as_json:
        inv.out.data(found)
        return
    rows = [{**one, "short": one["hash"][:12], "bytes": format_bytes(int(one["size"]))} for one in found]
    columns = [("BLOB", "short"), ("AT", "position"), ("SIZE", "bytes"), ("TYPE", "media_type"), ("NAME", "name")]
    inv.out.table(rows, columns, ids="hash")


@click.command("blob")
@click.argument("ref")
@click.argument("blob")
@click.argument("file")
@verb
def blob(inv: Invocation, ref: str, blob: str, file: str) -> None:
    """Write a BLOB of a session (its name, or the beginning of its hash) to FILE ("-": stdout)."""
    one = _chosen(inv.server.call("GET", f"/v1/sessions/{ref}/blobs")["blobs"], ref, blob)
    path = f"/v1/sessions/{ref}/blobs/{one['hash']}"
    if file == "-":
        _fetch(inv, path, one, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    target = Path(file)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as out:
            _fetch(inv, path, one, out)
        part.replace(target)
    except OSError as exc:
        if exc.errno == 28:
            raise OutOfSpace(f"no space for {file}", hint="make room, then try again") from exc
        raise BadInput(f"cannot write {file}: {exc.strerror}") from exc
    finally:
        part.unlink(missing_ok=True)
    inv.out.data({**one, "file": file}, file)


def _fetch(inv: Invocation, path: str, one: Json, file: BinaryIO) -> None:
    hashed = _Hashed(file)
    download(inv.server, path, hashed, query={}, on_bytes=lambda _n: None)
    if hashed.digest.hexdigest() != one["hash"]:
        raise Corrupt(f"blob {one['hash']}: what came is not what was put", hint="see server.log in the home")


def _chosen(found: Sequence[Json], ref: str, wanted: str) -> Json:
    """Return the newest blob of that name, or the one whose hash begins so. Raises NotFound, BadInput."""
    named = [one for one in found if one["name"] == wanted]
    if named:
        return named[0]
    hashes = {one["hash"] for one in found if wanted and one["hash"].startswith(wanted)}
    if len(hashes) > 1:
        raise BadInput(f"{wanted!r} is ambiguous: several blobs begin with it", hint="give more of the hash")
    if not hashes:
        raise NotFound(
            f"session {ref} has no blob {wanted!r}",
            hint=f"list them: recess session blobs {ref}",
            kind="blob",
            ref=wanted,
        )
    return next(one for one in found if one["hash"] in hashes)


BLOBS = (blobs, blob)
