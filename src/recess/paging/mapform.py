"""The stored form of a layout: one small file a memory, checked as a whole before anything in it is believed.

    "RCPF" + version (u32) | BLAKE3-256 of all that follows | length of the JSON (u32) | JSON | runs | strays

The JSON: `boot` (the host's boot), `ground` (the template that gaps mean), `pages` (of the whole memory), `runs`, `strays`
(how many rows of each), `files` (per file: name, pages, inode, change time in ns). A row is four u32, little endian: first
page, count, file, first page in it. What a damaged, cut or foreign file says is never used: `decode` raises Corrupt.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec
import numpy as np
from blake3 import blake3

from recess.errors import Corrupt
from recess.paging.layout import FILES_MAX, RUNS_MAX, STRAYS_MAX, Layout, Rows, places_of

MAGIC = b"RCPF" + struct.pack("<I", 1)
_ROW = 16
_JSON_MAX = 65536
BYTES_MAX = len(MAGIC) + 36 + _JSON_MAX + _ROW * (RUNS_MAX + STRAYS_MAX)


class Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A data file as it was when it had been written. Whoever changes or cuts it changes its change time."""

    name: str
    pages: int
    inode: int
    changed_ns: int


class _About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    boot: str
    ground: str
    pages: int
    runs: int
    strays: int
    files: list[Sealed]


@dataclass(frozen=True, eq=False)
class Map:
    """One memory: over which ground, how many pages in all, and where those are that differ. Strays are copied over what
    the runs put there."""

    boot: str
    ground: str
    pages: int
    files: tuple[Sealed, ...]
    runs: Rows
    strays: Rows

    def layout(self) -> Layout:
        """Return the places of every page."""
        return Layout(places_of(self.runs), places_of(self.strays))


def encode(found: Map) -> bytes:
    """Return the bytes of a map."""
    about = _About(found.boot, found.ground, found.pages, len(found.runs), len(found.strays), list(found.files))
    head = msgspec.json.encode(about)
    body = struct.pack("<I", len(head)) + head + found.runs.tobytes() + found.strays.tobytes()
    return MAGIC + blake3(body).digest() + body


def decode(data: bytes) -> Map:
    """Return the map that these bytes are. Raises Corrupt."""
    body = data[len(MAGIC) + 32 :]
    if len(data) > BYTES_MAX or data[: len(MAGIC)] != MAGIC or blake3(body).digest() != data[len(MAGIC) :][:32]:
        raise Corrupt("not a map of page files, or a damaged one")
    (length,) = struct.unpack_from("<I", body.ljust(4, b"\0"))
    try:
        about = msgspec.json.decode(body[4 : 4 + length], type=_About)
    except msgspec.DecodeError as exc:
        raise Corrupt(f"a map of page files that makes no sense: {exc}") from exc
    table = body[4 + length :]
    if len(table) != _ROW * (about.runs + about.strays) or len(about.files) > FILES_MAX:
        raise Corrupt("a map of page files is wrong about its size")
    rows = np.frombuffer(table, "<u4").reshape(-1, 4)
    runs, strays = rows[: about.runs], rows[about.runs :]
    _check(runs, about)
    _check(strays, about)
    return Map(about.boot, about.ground, about.pages, tuple(about.files), runs, strays)


def _check(rows: Rows, about: _About) -> None:
    """Every run ascends, and lies in the memory and in its file."""
    if not len(rows):
        return
    first, count, file, at = (rows[:, n].astype(np.int64) for n in range(4))
    if int(file.max()) >= len(about.files):
        raise Corrupt("a map of page files names a file that is not there")
    sizes = np.array([one.pages for one in about.files], np.int64)[file]
    ends = first + count
    fine = (count > 0) & (ends <= about.pages) & (at + count <= sizes)
    if not fine.all() or (first[1:] < ends[:-1]).any():
        raise Corrupt("a map of page files has pages out of place")
