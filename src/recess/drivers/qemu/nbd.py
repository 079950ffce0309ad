"""Asking QEMU which blocks a dirty bitmap names: the little of the NBD protocol that takes.

The monitor only tells how many they are. QEMU's NBD server tells which, as "block status" in the context
`qemu:dirty-bitmap:NAME` (QEMU's docs/interop/nbd.rst; the protocol: NetworkBlockDevice/nbd, doc/proto.md: fixed newstyle
negotiation, structured replies). Blocking, with a timeout: use a thread. Whoever answers is QEMU, which a guest may have
taken over: every length is bounded before anything is read for it, and every answer has to move on.

It must know nothing of captures or monitors.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recess.drivers.kept.layout import socket_address
from recess.errors import DriverFailed, Timeout
from recess.units import GIB, PAGE_BYTES

TIMEOUT_S = 30.0

_MAGIC, _OPTION_MAGIC, _REPLY_MAGIC = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
_FLAGS = 3  # fixed newstyle, no zeroes after it
_GO, _STRUCTURED, _SET_CONTEXT = 7, 8, 10  # options
_ACK, _INFO, _CONTEXT = 1, 3, 4  # their replies
_REQUEST, _STRUCTURED_REPLY = 0x25609513, 0x668E33EF
_DISCONNECT, _BLOCK_STATUS = 2, 7  # commands
_DONE = 1
_STATUS_CHUNK = 5
_DIRTY = 1
_OPTION_BYTES_MAX = 64 << 10
_CHUNK_BYTES_MAX = 4 + 8 * (1 << 20)  # QEMU's own limit is an eighth of it
_ASKED_BYTES = 2 * GIB  # at once: a length has 32 bits


def dirty_blocks(run: Path, name: str, export: str, bitmap: str, size: int) -> NDArray[np.uint32]:
    """Return the numbers of the 4 KiB blocks that a bitmap names, ascending. `name`: the server's socket in the folder
    `run`; `size`: of the export in bytes. Raises DriverFailed, Timeout."""
    try:
        with _connected(run, name) as sock:
            context = _negotiate(sock, export, f"qemu:dirty-bitmap:{bitmap}", size)
            runs = np.concatenate([np.empty((0, 2), np.int64), *_dirty_runs(sock, context, size)])
            sock.sendall(struct.pack(">IHHQQI", _REQUEST, 0, _DISCONNECT, 0, 0, 0))
    except TimeoutError as exc:
        raise Timeout(f"QEMU did not tell within {TIMEOUT_S:g} s which blocks changed") from exc
    except OSError as exc:
        raise DriverFailed(f"QEMU cannot be asked which blocks changed: {exc}") from exc
    return numbers_of(runs)


def numbers_of(runs: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return the numbers of the blocks in rows of (first byte, end), ascending and apart; a block touched counts. Pure."""
    first, end = runs[:, 0] // PAGE_BYTES, -(-runs[:, 1] // PAGE_BYTES)
    counts = end - first
    starts = np.repeat(first - np.cumsum(counts) + counts, counts)
    return np.unique((starts + np.arange(int(counts.sum()))).astype(np.uint32))


@contextmanager
def _connected(run: Path, name: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(TIMEOUT_S)
        with socket_address(run, name) as address:
            sock.connect(address)
        yield sock


def _take(sock: socket.socket, count: int) -> bytes:
    out = bytearray()
    while len(out) < count:
        piece = sock.recv(min(count - len(out), 1 << 20))
        if not piece:
            raise DriverFailed("QEMU hung up when it was asked which blocks changed")
        out += piece
    return bytes(out)


def _negotiate(sock: socket.socket, export: str, context: str, size: int) -> int:
    """Return the number that the server gave the context."""
    if _take(sock, 16) != _MAGIC + _OPTION_MAGIC:
        raise DriverFailed("what answers is no NBD server")
    _take(sock, 2)
    sock.sendall(struct.pack(">I", _FLAGS))
    _option(sock, _STRUCTURED, b"")
    said = _option(sock, _SET_CONTEXT, _text(export) + struct.pack(">I", 1) + _text(context))
    ids = [data[:4] for kind, data in said if kind == _CONTEXT and data[4:] == context.encode()]
    exports = _option(sock, _GO, _text(export) + struct.pack(">H", 0))
    sizes = [data[2:10] for kind, data in exports if kind == _INFO and data[:2] == b"\0\0"]
    if len(ids) != 1 or sizes != [struct.pack(">Q", size)]:
        raise DriverFailed("QEMU offers another disk, or no bitmap of it")
    return int.from_bytes(ids[0], "big")


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack(">I", len(data)) + data


def _option(sock: socket.socket, option: int, data: bytes) -> list[tuple[int, bytes]]:
    """Ask for an option; return the replies before the one that agrees."""
    sock.sendall(_OPTION_MAGIC + struct.pack(">II", option, len(data)) + data)
    out: list[tuple[int, bytes]] = []
    while len(out) < 16:
        magic, about, kind, length = struct.unpack(">QIII", _take(sock, 20))
        if magic != _REPLY_MAGIC or about != option or length > _OPTION_BYTES_MAX:
            break
        payload = _take(sock, length)
        if kind == _ACK:
            return out
        if kind >> 31:
            raise DriverFailed(f"QEMU refuses NBD option {option}: {payload[:200].decode(errors='replace')}")
        out.append((kind, payload))
    raise DriverFailed(f"QEMU's answer to NBD option {option} makes no sense")


def _dirty_runs(sock: socket.socket, context: int, size: int) -> Iterator[NDArray[np.int64]]:
    """Yield rows of (first byte, end). A bitmap has a bit for a block: shorter extents would only make the asking endless."""
    at = 0
    while at < size:
        sock.sendall(struct.pack(">IHHQQI", _REQUEST, 0, _BLOCK_STATUS, at, at, min(_ASKED_BYTES, size - at)))
        extents = _status(sock, context, at)
        if not len(extents) or not bool(((extents[:, 0] > 0) & (extents[:, 0] % PAGE_BYTES == 0)).all()):
            raise DriverFailed("QEMU does not say which blocks changed")
        ends = at + np.cumsum(extents[:, 0])
        starts = ends - extents[:, 0]
        dirty = (extents[:, 1] & _DIRTY).astype(np.bool_) & (starts < size)
        yield np.stack((starts[dirty], np.minimum(ends[dirty], size)), axis=1)
        at = int(ends[-1])


def _status(sock: socket.socket, context: int, handle: int) -> NDArray[np.int64]:
    """Return the extents of one reply as rows of (bytes, flags)."""
    found = np.empty((0, 2), np.int64)
    while True:
        magic, flags, kind, about, length = struct.unpack(">IHHQI", _take(sock, 20))
        if magic != _STRUCTURED_REPLY or about != handle or length > _CHUNK_BYTES_MAX:
            raise DriverFailed("QEMU's answer about changed blocks makes no sense")
        payload = _take(sock, length)
        if kind == _STATUS_CHUNK and length % 8 == 4 and int.from_bytes(payload[:4], "big") == context:
            found = np.frombuffer(payload[4:], ">u4").astype(np.int64).reshape(-1, 2)
        elif kind or not flags & _DONE:
            why = payload[6:206].decode(errors="replace")
            raise DriverFailed(f"QEMU does not tell which blocks changed: {why}")
        if flags & _DONE:
            return found
