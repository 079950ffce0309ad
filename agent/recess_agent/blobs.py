"""Blobs: bytes too large, or of the wrong kind, for an entry of the log. They are kept beside it, by their SHA-256.

A blob is durable when `put` returns, and a fork has those of before it. The host makes the hash and lets a session read what its
own log names, nothing else. Bytes go over the session's socket in pieces; one that is begun anew, because the server or the
machine changed underneath, is sent from the start again, and stored once.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Union

from recess_agent.wire import SessionError

PIECE_BYTES = 1024 * 1024
GET_BYTES_MAX = 64 * 1024 * 1024
AGAIN_MAX = 20

Json = dict[str, Any]
Request = Callable[..., Awaitable[Json]]
Source = Union[bytes, bytearray, memoryview, "os.PathLike[str]", str]


class Blob(NamedTuple):
    """A blob's name: `hash` is the SHA-256 of its bytes, in hex. Put `ref()` wherever an entry should point at it."""

    hash: str
    size: int
    media_type: str = ""
    name: str = ""

    def ref(self) -> Json:
        """Return it as plain data, for a note, a record, a tool's result; `Blob.of` reads it back."""
        return {"blob": self.hash, "size": self.size, "media_type": self.media_type, "name": self.name}

    @classmethod
    def of(cls, ref: Json) -> Blob:
        """Return the blob that `ref()` described. Raises KeyError, ValueError for anything else."""
        return cls(str(ref["blob"]), int(ref["size"]), str(ref.get("media_type", "")), str(ref.get("name", "")))

    def __str__(self) -> str:
        """Return what the model is shown of it."""
        about = [one for one in (self.name, self.media_type, f"{self.size} bytes") if one]
        return f"[blob {self.hash}: {', '.join(about)}]"


class Attachment(NamedTuple):
    """What a tool returns to have it kept as a blob: bytes, or the path of a file in the machine."""

    source: Source
    media_type: str = ""
    name: str = ""


class Blobs:
    """`session.blobs`."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._one_at_a_time = asyncio.Lock()  # the memory of a machine is in its snapshots

    async def put(self, data: bytes, *, media_type: str = "", name: str = "") -> Blob:
        """Keep these bytes; the same bytes under the same name are kept once. Raises SessionError (a limit, no room)."""
        return await self._send(lambda at: bytes(data[at : at + PIECE_BYTES]), media_type, name)

    async def put_file(self, path: os.PathLike[str] | str, *, media_type: str = "", name: str = "") -> Blob:
        """Keep a file of this machine, under its own name without another. Raises OSError, SessionError."""
        source = Path(path)
        file = await asyncio.to_thread(source.open, "rb")
        try:
            return await self._send(_reader(file), media_type, name or source.name)
        finally:
            file.close()

    async def attach(self, one: Attachment) -> Blob:
        """Keep what a tool returned. Raises OSError, SessionError."""
        if isinstance(one.source, (bytes, bytearray, memoryview)):
            return await self.put(bytes(one.source), media_type=one.media_type, name=one.name)
        return await self.put_file(one.source, media_type=one.media_type, name=one.name)

    async def get(self, blob: Blob | str, *, max_bytes: int = GET_BYTES_MAX) -> bytes:
        """Return a blob's bytes, given the blob or its hash. Raises SessionError: "not_found" if this session's log names no
        such blob, "too_large" if it has more than `max_bytes` (see `save`)."""
        out = bytearray()
        await self._receive(blob, out.extend, max_bytes)
        return bytes(out)

    async def save(self, blob: Blob | str, path: os.PathLike[str] | str) -> None:
        """Write a blob's bytes to a file, which is there whole or as it was before. Raises OSError, SessionError."""
        target = Path(path)
        temp = target.with_name(f".{target.name}.{os.urandom(4).hex()}.part")
        file = await asyncio.to_thread(temp.open, "wb")
        try:
            with file:
                await self._receive(blob, file.write, None)
            await asyncio.to_thread(temp.replace, target)
        except BaseException:
            _remove(temp)
            raise

    async def _send(self, read: Callable[[int], bytes], media_type: str, name: str) -> Blob:
        facts = {"media_type": media_type, "name": name, "upload": os.urandom(8).hex()}
        async with self._one_at_a_time:
            for _ in range(AGAIN_MAX):
                sent = n = 0
                data = await asyncio.to_thread(read, 0)
                while True:
                    following = await asyncio.to_thread(read, sent + len(data)) if data else b""
                    text = base64.b64encode(data).decode("ascii")
                    answer = await self._request("put", n=n, data=text, last=not following, **facts)
                    if answer.get("again"):
                        break
                    if not following:
                        return Blob(answer["hash"], answer["size"], answer["media_type"], answer["name"])
                    sent, n, data = sent + len(data), n + 1, following
        raise SessionError("unavailable", f"a blob was begun {AGAIN_MAX} times and never came through whole")

    async def _receive(self, blob: Blob | str, take: Callable[[bytes], Any], max_bytes: int | None) -> None:
        wanted = blob if isinstance(blob, str) else blob.hash
        n, pieces, found = 0, 1, hashlib.sha256()
        while n < pieces:
            answer = await self._request("get", hash=wanted, n=n)
            if max_bytes is not None and int(answer["size"]) > max_bytes:
                raise SessionError("too_large", f"blob {wanted} has {answer['size']} bytes, more than {max_bytes}")
            data = base64.b64decode(answer["data"])
            found.update(data)
            await asyncio.to_thread(take, data)
            n, pieces = n + 1, int(answer["pieces"])
        if found.hexdigest() != wanted:
            raise SessionError("corrupt", f"blob {wanted}: its bytes are not what was put")


def _reader(file: BinaryIO) -> Callable[[int], bytes]:
    def read(at: int) -> bytes:
        file.seek(at)
        return file.read(PIECE_BYTES)

    return read


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
