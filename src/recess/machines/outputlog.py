"""The host's copy of what a machine's main process said: two capped files, readable after the machine is gone.

Records: u8 stream (1 stdout, 2 stderr, 0xFF heading), u32 little-endian length, bytes. A heading opens each file and
holds two u64: how many bytes of stdout and stderr of this run came before it (zeros within a file: a new run began). So the totals survive rotation, which is what lets
a re-attached reader skip the part of the guest's ring that is here already. A torn last record (the host crashed in a
write) is cut off when the log is opened. Synchronous; writes are small and buffered by the kernel, never fsynced.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from recess.errors import OutOfSpace
from recess.units import MIB

FILE_BYTES_MAX = 4 * MIB
_HEAD = struct.Struct("<BI")
_TOTALS = struct.Struct("<QQ")
_HEADING = 0xFF


def _records(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield (stream, bytes, end offset) of every whole record."""
    at = 0
    while at + _HEAD.size <= len(data):
        stream, length = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length
        if stream not in (1, 2, _HEADING) or end > len(data):
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
        self._open()

    def _open(self) -> None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        for stream, piece, end in _records(data):
            if stream == _HEADING:
                self.totals[1], self.totals[2] = _TOTALS.unpack(piece)
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

    def append(self, stream: int, data: bytes) -> None:
        """Add output. Raises OutOfSpace; what was there stays."""
        try:
            if self._size >= FILE_BYTES_MAX:
                self._path.replace(self._old)
                self._size = 0
            with self._path.open("ab") as file:
                if self._size == 0:
                    heading = _TOTALS.pack(self.totals[1], self.totals[2])
                    self._size += file.write(_HEAD.pack(_HEADING, len(heading)) + heading)
                self._size += file.write(_HEAD.pack(stream, len(data)) + data)
        except OSError as exc:
            raise OutOfSpace(f"cannot keep the machine's output: {exc.strerror or exc}") from exc
        self.totals[stream] += len(data)


def pack_record(stream: int, data: bytes) -> bytes:
    """Return one record of a framed output."""
    return _HEAD.pack(stream, len(data)) + data


def pack_totals(stdout: int, stderr: int) -> bytes:
    """Return the last record of a framed output: how many bytes of each stream this run has said."""
    return pack_record(_HEADING, _TOTALS.pack(stdout, stderr))


def read_output(directory: Path) -> bytes:
    """Return what is kept of the output, both streams in order; b"" when there is none."""
    return b"".join(piece for stream, piece in _kept(directory) if stream != _HEADING)


def read_framed(directory: Path) -> bytes:
    """Return the same as records (u8 stream, u32 little-endian length, bytes), and last one of stream 0xFF: two u64, how
    many bytes of stdout and stderr this run of the process has said up to here."""
    out, totals = bytearray(), {1: 0, 2: 0}
    for stream, piece in _kept(directory):
        if stream == _HEADING:
            totals[1], totals[2] = _TOTALS.unpack(piece)
            continue
        totals[stream] += len(piece)
        out += pack_record(stream, piece)
    return bytes(out) + pack_totals(totals[1], totals[2])


def _kept(directory: Path) -> Iterator[tuple[int, bytes]]:
    for name in ("output.log.1", "output.log"):
        try:
            data = (directory / name).read_bytes()
        except FileNotFoundError:
            continue
        for stream, piece, _ in _records(data):
            if stream != _HEADING or len(piece) == _TOTALS.size:
                yield stream, piece
