"""Segments: runs of old entries in one seekable blob each, proven by their hash. It must know no database.

A segment is a file of `recess.frames`, kind "LOGS": frames of about 64 KiB of JSON lines, so that `zstd -d` prints it. A line
is one entry, in the order of the columns of `log_entry`:

    [position, kind, turn, ref, key, epoch, code_version, ts, schema, size, blob, body]

`body` is the entry's JSON, or null when it is in the body store under `blob`. The index's extra bytes are JSON too:
`{"version": 1, "session": S, "first": N, "last": N, "starts": [first position of each frame]}`. The hash of the index is in the
database's row; so a reader trusts no byte, and reads only the frames it wants.
"""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from recess.blobs import BlobStore
from recess.db import Row
from recess.errors import Corrupt
from recess.frames import SeekableFile, SeekableReader, WorkPool, build_seekable

KIND = b"LOGS"
VERSION = 1
FOLDER = "log"
FRAME_BYTES = 64 << 10
LEVEL = 6

RawEntry = tuple[int, str, int, str, str, int, str, float, int, int, str, msgspec.Raw]

_LINE = msgspec.json.Decoder(RawEntry)


@dataclass(frozen=True)
class Segment:
    """A run of a session's entries in a blob: `key` and `hash` name it, `size` counts its bytes."""

    session: str
    first: int
    last: int
    key: str
    hash: str
    size: int


class _Extra(msgspec.Struct):
    version: int
    session: str
    first: int
    last: int
    starts: list[int]


@dataclass(frozen=True)
class Built:
    """A segment before it is stored: its file, and what of it must be found without reading it."""

    segment: Segment
    file: SeekableFile
    inbox: list[int]
    bodies: list[str]


def build(identity: str, session: str, rows: Sequence[Row], inbox_kinds: Iterable[str], pool: WorkPool) -> Built:
    """Make a segment of neighbouring rows of one session (at least one). `identity` is the log's name in its store."""
    frames: list[list[bytes]] = []
    starts: list[int] = []
    held = FRAME_BYTES
    for row in rows:
        line = _line(row)
        if held >= FRAME_BYTES:
            frames.append([])
            starts.append(int(row["position"]))
            held = 0
        frames[-1].append(line)
        held += len(line)
    first, last = int(rows[0]["position"]), int(rows[-1]["position"])
    extra = msgspec.json.encode(_Extra(VERSION, session, first, last, starts))
    file = build_seekable(KIND, len(frames), lambda i: b"".join(frames[i]), extra, level=LEVEL, pool=pool)
    # Never the name of one that a crash left: that may be swept at the very moment when this one is named.
    key = f"{FOLDER}/{identity}/{session}/{first}-{last}.{file.index_hash}.{secrets.token_hex(4)}"
    kinds = frozenset(inbox_kinds)
    return Built(
        Segment(session, first, last, key, file.index_hash, file.size_bytes),
        file,
        [int(row["position"]) for row in rows if row["kind"] in kinds],
        sorted({str(row["blob"]) for row in rows if row["blob"]}),
    )


def read(blobs: BlobStore, segment: Segment, first: int, last: int) -> Iterator[RawEntry]:
    """Yield the entries `first` to `last` of a segment, reading a frame at a time. Raises Corrupt, NotFound, Unavailable."""
    name = f"log segment {segment.key}"
    reader = SeekableReader(
        lambda offset, length: blobs.get_range(segment.key, offset, length), segment.size, segment.hash, KIND, name
    )
    try:
        extra = msgspec.json.decode(reader.extra, type=_Extra)
    except msgspec.MsgspecError as exc:
        raise Corrupt(f"{name}: unreadable index: {exc}", blob=segment.key) from exc
    if extra.version != VERSION or (extra.session, extra.first, extra.last) != (
        segment.session, segment.first, segment.last,
    ) or len(extra.starts) != reader.table.count:  # fmt: skip
        raise Corrupt(f"{name}: it is not the one that the database means", blob=segment.key)
    wanted = first
    begin = max(0, bisect_right(extra.starts, first) - 1)
    for number in range(begin, reader.table.count):
        if extra.starts[number] > last:
            break
        for line in reader.frame(number).splitlines():
            entry = _decode(line, name)
            if entry[0] < first:
                continue
            if entry[0] > last:
                break
            if entry[0] != wanted:
                raise Corrupt(f"{name}: position {wanted} is missing", blob=segment.key)
            wanted += 1
            yield entry
    if wanted != last + 1:
        raise Corrupt(f"{name}: position {wanted} is missing", blob=segment.key)


def _line(row: Row) -> bytes:
    body: Any = None if row["body"] is None else msgspec.Raw(_bytes(row["body"]))
    values = (
        int(row["position"]), row["kind"], int(row["turn"]), row["ref"], row["key"], int(row["epoch"]),
        row["code_version"], float(row["ts"]), int(row["schema"]), int(row["size"]), row["blob"], body,
    )  # fmt: skip
    return msgspec.json.encode(values) + b"\n"


def _bytes(body: str | bytes) -> bytes:
    return body.encode() if isinstance(body, str) else bytes(body)


def _decode(line: bytes, name: str) -> RawEntry:
    try:
        entry: RawEntry = _LINE.decode(line)
    except msgspec.MsgspecError as exc:
        raise Corrupt(f"{name}: unreadable line: {exc}", blob=name) from exc
    return entry
