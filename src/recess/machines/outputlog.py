"""The host's copy of what a machine's main process said: two capped files, readable after the machine is gone.

Records: u8 stream (1 stdout, 2 stderr, 0xFE stamp, 0xFF heading), u32 little-endian length, bytes. A heading opens each
file and holds two u64: how many bytes of stdout and stderr of this run came before it (zeros within a file: a new run
began). So the totals survive rotation, which is what lets a re-attached reader skip the part of the guest's ring that is
here already. A stamp holds one u64, the host's wall time in ns at which what follows came (0: nobody knows, as in logs
of before there were stamps). A torn last record (the host crashed in a write) is cut off when the log is opened.
Synchronous; writes are small and buffered by the kernel, never fsynced.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from recess.errors import OutOfSpace
from recess.units import MIB

FILE_BYTES_MAX = 4 * MIB
_HEAD = struct.Struct("<BI")
_TOTALS = struct.Struct("<QQ")
_STAMP_BODY = struct.Struct("<Q")
_STAMP = 0xFE
_HEADING = 0xFF
_LENGTHS = {_STAMP: _STAMP_BODY.size, _HEADING: _TOTALS.size}


class Piece(NamedTuple):
    """Some output: stream (1 stdout, 2 stderr), bytes, and the host's wall time in ns at which it came (0: unknown)."""

    stream: int
    data: bytes
    at_ns: int = 0


@dataclass(frozen=True)
class Said:
    """What is kept of a process's output, and how many bytes of each stream this run of it has said up to here."""

    pieces: Sequence[Piece] = ()
    stdout: int = 0
    stderr: int = 0

    @property
    def data(self) -> bytes:
        """Both streams in the order in which they came."""
        return b"".join(piece.data for piece in self.pieces)


def _records(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield (stream, bytes, end offset) of every whole record."""
    at = 0
    while at + _HEAD.size <= len(data):
        stream, length = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length
        if end > len(data) or length != _LENGTHS.get(stream, length) or stream not in (1, 2, *_LENGTHS):
            return
        yield stream, data[at + _HEAD.size : end], end
        at = end


class OutputLog:
    """One machine's log in its folder: `output.log` and, once that is full, `output.log.1`."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "output.log"
        self._old = directory / "output.log.1"
        self.totals = {1: 0, 2: 0}
        self._size = 0
        self._stamped_ns = 0
        self._open()

    def _open(self) -> None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        for stream, piece, end in _records(data):
            if stream == _HEADING:
                self.totals[1], self.totals[2] = _TOTALS.unpack(piece)
            elif stream == _STAMP:
                (self._stamped_ns,) = _STAMP_BODY.unpack(piece)
            else:
                self.totals[stream] += len(piece)
            self._size = end
        if self._size < len(data):
            with self._path.open("r+b") as file:
                file.truncate(self._size)

    def new_run(self) -> None:
        """Count from zero: the process is started anew, and its ring in the guest with it. Raises OutOfSpace."""
        if not any(self.totals.values()):
            return
        try:
            with self._path.open("ab") as file:
                self._size += file.write(_HEAD.pack(_HEADING, _TOTALS.size) + _TOTALS.pack(0, 0))
        except OSError as exc:
            raise OutOfSpace(f"cannot keep the machine's output: {exc.strerror or exc}") from exc
        self.totals = {1: 0, 2: 0}

    def append(self, stream: int, data: bytes, at_ns: int) -> None:
        """Add output that came at this wall time. Raises OutOfSpace; what was there stays."""
        try:
            if self._size >= FILE_BYTES_MAX:
                self._path.replace(self._old)
                self._size = self._stamped_ns = 0
            with self._path.open("ab") as file:
                if self._size == 0:
                    heading = _TOTALS.pack(self.totals[1], self.totals[2])
                    self._size += file.write(_HEAD.pack(_HEADING, len(heading)) + heading)
                stamp = b"" if at_ns == self._stamped_ns else pack_record(_STAMP, _STAMP_BODY.pack(at_ns))
                self._size += file.write(stamp + pack_record(stream, data))
                self._stamped_ns = at_ns
        except OSError as exc:
            raise OutOfSpace(f"cannot keep the machine's output: {exc.strerror or exc}") from exc
        self.totals[stream] += len(data)


def pack_record(stream: int, data: bytes) -> bytes:
    """Return one record of a framed output."""
    return _HEAD.pack(stream, len(data)) + data


def pack_said(said: Said) -> bytes:
    """Return an output as records (u8 stream, u32 little-endian length, bytes), and last one of stream 0xFF: two u64, how
    many bytes of stdout and stderr this run of the process has said up to here."""
    records = b"".join(pack_record(stream, data) for stream, data, _ in said.pieces)
    return records + pack_record(_HEADING, _TOTALS.pack(said.stdout, said.stderr))


def read_output(directory: Path) -> Said:
    """Return what is kept of the output, both streams in order; nothing when there is none."""
    pieces: list[Piece] = []
    totals, at_ns = {1: 0, 2: 0}, 0
    for stream, piece in _kept(directory):
        if stream == _HEADING:
            totals[1], totals[2] = _TOTALS.unpack(piece)
        elif stream == _STAMP:
            (at_ns,) = _STAMP_BODY.unpack(piece)
        else:
            totals[stream] += len(piece)
            pieces.append(Piece(stream, piece, at_ns))
    return Said(pieces, totals[1], totals[2])


def _kept(directory: Path) -> Iterator[tuple[int, bytes]]:
    for name in ("output.log.1", "output.log"):
        try:
            data = (directory / name).read_bytes()
        except FileNotFoundError:
            continue
        for stream, piece, _ in _records(data):
            yield stream, piece
