"""`recess logs`: what the host keeps of a main process's output, stdout and stderr apart, and then what comes."""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Callable
from typing import Any

import click

from recess.cli.common import Invocation, verb
from recess.cli.terminal import Seen, follow_main, show
from recess.errors import BadInput, ServerUnavailable
from recess.sdk.exec_stream import OnOutput
from recess.units import format_moment, parse_moment

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


class Stamped:
    """Shows output with the time at which it came here before each line, as the server writes it before those it kept."""

    def __init__(self, kept: list[tuple[int, bytes]], now_ns: Callable[[], int], write: OnOutput) -> None:
        """`kept`: what was shown already; its last line of a stream may go on."""
        self._within = {stream: not piece.endswith(b"\n") for stream, piece in kept if piece}
        self._now_ns = now_ns
        self._write = write

    def __call__(self, stream: int, data: bytes) -> None:
        """Show a piece."""
        out = bytearray()
        for line in io.BytesIO(data):
            out += line if self._within.get(stream) else f"{format_moment(self._now_ns())} ".encode() + line
            self._within[stream] = not line.endswith(b"\n")
        self._write(stream, bytes(out))


@click.command("logs")
@click.option("-f", "--follow", is_flag=True, help="Go on until the process ends.")
@click.option("-n", "--tail", default="all", metavar="LINES", help="Only the last lines.")
@click.option("-t", "--timestamps", is_flag=True, help="Each line with the time at which it came, in UTC.")
@click.option("--since", default="", metavar="TIME", help="What came since: 10m (ago), 2026-11-23T10:20:30Z.")
@click.option("--until", default="", metavar="TIME", help="What came until then.")
@click.argument("machine")
@verb
def logs(inv: Invocation, machine: str, follow: bool, tail: str, timestamps: bool, since: str, until: str) -> int:
    """Show the output of a MACHINE's main process: its stdout and stderr on ours."""
    if tail != "all" and not (tail.isascii() and tail.isdigit()):
        raise BadInput(f"--tail {tail}: expected a number of lines, or all")
    if follow and until:
        raise BadInput("--follow and --until exclude each other")
    now_s = time.time()
    query: dict[str, Any] = {
        "framed": 1, "timestamps": 1 if timestamps else None, "tail": None if tail == "all" else tail,
        "since": parse_moment(since, now_s) if since else None, "until": parse_moment(until, now_s) if until else None,
    }  # fmt: skip
    row = inv.server.call("GET", f"/v1/machines/{machine}")
    pieces, totals = parse_framed(inv.server.raw("GET", f"/v1/machines/{row['id']}/logs", query=query))
    if inv.out.as_json:
        inv.out.data({"logs": b"".join(piece for _, piece in pieces).decode(errors="replace")})
        return 0
    for stream, piece in pieces:
        show(stream, piece)
    if follow and row["state"] in ("running", "suspended") and row["spec"]["argv"]:
        write = Stamped(pieces, time.time_ns, show) if timestamps else show
        follow_main(inv, row, stdin=False, proxy=False, seen=Seen(totals, write))
    return 0
