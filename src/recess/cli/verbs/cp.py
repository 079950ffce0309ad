"""`recess cp`: one file to or from a machine (MACHINE:PATH)."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from recess.cli.common import Invocation, stdin_bytes, verb
from recess.errors import BadInput


def _split(text: str) -> tuple[str, str]:
    machine, sep, path = text.partition(":")
    return (machine, path) if sep and "/" not in machine else ("", text)


@click.command("cp")
@click.argument("source")
@click.argument("target")
@verb
def cp(inv: Invocation, source: str, target: str) -> None:
    """Copy a file: MACHINE:PATH to PATH or the other way; "-" is stdin or stdout."""
    (src_machine, src_path), (dst_machine, dst_path) = _split(source), _split(target)
    if bool(src_machine) == bool(dst_machine):
        raise BadInput("one of the two must be MACHINE:PATH")
    if dst_machine:
        data, mode = (stdin_bytes(), "644") if src_path == "-" else _read(Path(src_path))
        path = dst_path + Path(src_path).name if dst_path.endswith("/") else dst_path
        inv.server.raw("PUT", f"/v1/machines/{dst_machine}/files", query={"path": path, "mode": mode}, body=data)
        return
    data = inv.server.raw("GET", f"/v1/machines/{src_machine}/files", query={"path": src_path})
    if dst_path == "-":
        sys.stdout.buffer.write(data)
        return
    out = Path(dst_path)
    try:
        (out / Path(src_path).name if out.is_dir() else out).write_bytes(data)
    except OSError as exc:
        raise BadInput(f"{dst_path}: {exc.strerror}") from exc


def _read(path: Path) -> tuple[bytes, str]:
    """Return a file's content and its mode in octal."""
    try:
        return path.read_bytes(), f"{path.stat().st_mode & 0o777:o}"
    except OSError as exc:
        raise BadInput(f"{path}: {exc.strerror}") from exc
