"""`recess logs`: what the host keeps of a main process's output, stdout and stderr apart, and then what comes."""

from __future__ import annotations

import struct

import click

from recess.cli.common import Invocation, verb
from recess.cli.terminal import Seen, follow_main, show
from recess.errors import BadInput, ServerUnavailable

_HEAD = struct.Struct("<BI")
_TOTALS = struct.Struct("<QQ")
_END = 0xFF


def parse_framed(data: bytes) -> tuple[list[tuple[int, bytes]], tuple[int, int]]:
    """Return (pieces with their stream, bytes of stdout and stderr of this run so far). Raises ServerUnavailable."""
    pieces: list[tuple[int, bytes]] = []
    at = 0
    while at + _HEAD.size <= len(data):
        stream, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size + length
        piece = data[at - length : at]
        if stream == _END and length == _TOTALS.size == len(piece):
            out, err = _TOTALS.unpack(piece)
            return pieces, (out, err)
        pieces.append((stream, piece))
    raise ServerUnavailable("the server's answer broke off", hint="try again")


def last_lines(pieces: list[tuple[int, bytes]], count: int) -> list[tuple[int, bytes]]:
    """Return the pieces that hold the last `count` lines, an unfinished one too. Pure."""
    lines = [(stream, line) for stream, piece in pieces for line in piece.splitlines(keepends=True)]
    whole: list[tuple[int, bytes]] = []
    for stream, line in lines:
        if whole and whole[-1][0] == stream and not whole[-1][1].endswith(b"\n"):
            whole[-1] = (stream, whole[-1][1] + line)
        else:
            whole.append((stream, line))
    return whole[len(whole) - count :] if count < len(whole) else whole


@click.command("logs")
@click.option("-f", "--follow", is_flag=True, help="Go on until the process ends.")
@click.option("-n", "--tail", default="all", metavar="LINES", help="Only the last lines.")
@click.argument("machine")
@verb
def logs(inv: Invocation, machine: str, follow: bool, tail: str) -> int:
    """Show the output of a MACHINE's main process: its stdout and stderr on ours."""
    if tail != "all" and not (tail.isascii() and tail.isdigit()):
        raise BadInput(f"--tail {tail}: expected a number of lines, or all")
    row = inv.server.call("GET", f"/v1/machines/{machine}")
    pieces, totals = parse_framed(inv.server.raw("GET", f"/v1/machines/{row['id']}/logs", query={"framed": 1}))
    pieces = pieces if tail == "all" else last_lines(pieces, int(tail))
    if inv.out.as_json:
        inv.out.data({"logs": b"".join(piece for _, piece in pieces).decode(errors="replace")})
        return 0
    for stream, piece in pieces:
        show(stream, piece)
    if follow and row["state"] in ("running", "suspended") and row["spec"]["argv"]:
        follow_main(inv, row, stdin=False, proxy=False, seen=Seen(totals))
    return 0
