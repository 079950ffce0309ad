"""Frames of the guest protocol: bytes in, frames out, and back (format: docs/internals/guest-protocol.md).

Pure: no I/O, no asyncio. The other implementation is `guest/guestd/src/frame.rs`; both read `guest/vectors/frames.json`.
Input is hostile: a decoder holds at most one unfinished frame, lengths are capped before anything is kept, and no
input raises. It must know nothing of what frames mean.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

MAGIC = b"RcG1"
HEADER_LEN = 16
MAX_PAYLOAD = 32 * 1024
WINDOW = 64 * 1024  # credit a stream starts with in each direction; outstanding credit never exceeds it
PUT_WINDOW = 256 * 1024  # but for `write` and `untar`, towards the guest, where guestd knows how
MAX_BODY = 256 * 1024  # a request or reply that spans frames
PAD = bytes(HEADER_LEN + MAX_PAYLOAD)  # completes any frame an earlier connection left unfinished
FLAG_RETRY = 1  # on HELLO: the earlier try stayed unanswered
FLAG_MORE = 1  # on REQUEST and REPLY: the body goes on

_HEAD = struct.Struct("<BBHI")
_CRC = struct.Struct("<I")
_NO_PADDING = re.compile(rb"[^\0]")
_MAY_BEGIN = re.compile(rb"[R\0]")  # a frame or padding


class Kind(IntEnum):
    """The type byte of a frame."""

    HELLO = 1
    REQUEST = 2
    REPLY = 3
    OPEN = 4
    DATA = 5
    CREDIT = 6
    EOF = 7
    RESET = 8
    EXIT = 9
    PING = 10
    PONG = 11
    LISTEN = 12
    DESYNC = 13


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole, checked frame. `kind` may be a number that `Kind` does not know."""

    kind: int
    flags: int
    stream: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Garbage:
    """Bytes were skipped that are neither a frame nor padding; reported once per run."""


def encode(kind: int, flags: int, stream: int, payload: bytes | memoryview = b"") -> bytes:
    """Return the frame's bytes. The payload holds at most MAX_PAYLOAD bytes (ValueError: the caller's mistake)."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"payload of {len(payload)} bytes")
    head = _HEAD.pack(kind, flags, len(payload), stream)
    crc = zlib.crc32(payload, zlib.crc32(head))
    return b"".join((MAGIC, head, _CRC.pack(crc), payload))


class Decoder:
    """Turns bytes into frames; skips padding; reports garbage once per run and goes on behind it."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._pos = 0
        self._in_garbage = False

    @property
    def held_bytes(self) -> int:
        """Bytes that wait for more to come."""
        return len(self._buffer) - self._pos

    def feed(self, data: bytes) -> None:
        """Add received bytes; call `next` until None before feeding again."""
        del self._buffer[: self._pos]
        self._pos = 0
        self._buffer += data

    def next(self) -> Frame | Garbage | None:
        """Return the next frame or notice of garbage; None when more bytes are needed."""
        while self._pos < len(self._buffer):
            if self._buffer[self._pos] == 0:
                self._skip_padding()
                continue
            found = self._look()
            if found is None:
                return None
            if isinstance(found, Frame):
                self._in_garbage = False
                return found
            self._skip_garbage()
            if not self._in_garbage:
                self._in_garbage = True
                return found
        return None

    # Each skip looks only at what it skips: the bytes are hostile, and the rest of the buffer must not be read again for
    # every two of them.

    def _skip_padding(self) -> None:
        self._pos = self._first(_NO_PADDING, self._pos)

    def _skip_garbage(self) -> None:
        self._pos = self._first(_MAY_BEGIN, self._pos + 1)

    def _first(self, wanted: re.Pattern[bytes], start: int) -> int:
        found = wanted.search(self._buffer, start)
        return len(self._buffer) if found is None else found.start()

    def _look(self) -> Frame | Garbage | None:
        """Judge the bytes at a place where a frame should start; None: more are needed."""
        view, pos = self._buffer, self._pos
        have = len(view) - pos
        if view[pos : pos + 4] != MAGIC[: min(have, 4)]:
            return Garbage()
        if have < HEADER_LEN:
            return None
        kind, flags, length, stream = _HEAD.unpack_from(view, pos + 4)
        if length > MAX_PAYLOAD:
            return Garbage()
        end = pos + HEADER_LEN + length
        if len(view) < end:
            return None
        payload = bytes(view[pos + HEADER_LEN : end])
        if zlib.crc32(payload, zlib.crc32(view[pos + 4 : pos + 12])) != _CRC.unpack_from(view, pos + 12)[0]:
            return Garbage()
        self._pos = end
        return Frame(kind, flags, stream, payload)
