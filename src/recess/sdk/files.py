"""Large bodies over the same transport as everything else: to a file or from one, never whole in memory.

It knows paths and sizes, not what the bytes are. Standard library only.
"""

from __future__ import annotations

import http.client
from collections.abc import Callable, Mapping
from typing import BinaryIO, Protocol
from urllib.parse import quote, urlencode

from recess.errors import RecessError, Unavailable
from recess.sdk.transport import Json, Transport, object_of, problem_of

PIECE_BYTES = 1 << 20
OnBytes = Callable[[int], None]  # how many so far


class Sink(Protocol):
    """What a body is written to."""

    def write(self, data: bytes, /) -> int:
        """Take all of `data`."""
        ...


def download(transport: Transport, path: str, target: Sink, *, query: Mapping[str, str], on_bytes: OnBytes) -> int:
    """Write a body to `target`; return its length. Raises the server's error; Unavailable if it breaks off."""
    conn = transport.connection()
    try:
        response = _ask(transport, conn, "GET", f"{quote(path, safe='/:@')}?{urlencode(query)}", None, {})
        total = 0
        while True:
            try:
                piece = response.read(PIECE_BYTES)
            except (OSError, http.client.HTTPException) as exc:
                raise _broken(f"{total} bytes came: {exc}") from exc
            if not piece:
                break
            target.write(piece)
            total += len(piece)
            on_bytes(total)
        if response.length:  # what was announced and did not come
            raise _broken(f"{response.length} bytes are missing")
        return total
    finally:
        conn.close()


def upload(
    transport: Transport, path: str, source: BinaryIO, *, size: int | None, query: Mapping[str, str], on_bytes: OnBytes
) -> Json:
    """Send a file as a body (`size` None: until its end) and return the answer. Raises the server's error."""
    conn = transport.connection()
    headers = {"Content-Type": "application/x-tar"}
    headers |= {"Transfer-Encoding": "chunked"} if size is None else {"Content-Length": str(size)}
    try:
        body = _Counted(source, on_bytes)
        response = _ask(transport, conn, "POST", f"{quote(path, safe='/:@')}?{urlencode(query)}", body, headers)
        return object_of(response.read())
    finally:
        conn.close()


class _Counted:
    """What http.client reads a body from."""

    def __init__(self, source: BinaryIO, on_bytes: OnBytes) -> None:
        self._source = source
        self._on_bytes = on_bytes
        self._sent = 0

    def read(self, _size: int = -1) -> bytes:
        piece = self._source.read(PIECE_BYTES)
        self._sent += len(piece)
        self._on_bytes(self._sent)
        return piece


def _ask(
    transport: Transport, conn: http.client.HTTPConnection, method: str, target: str, body: _Counted | None,
    headers: Mapping[str, str],
) -> http.client.HTTPResponse:  # fmt: skip
    try:
        conn.request(method, target, body=body, headers={**transport.headers(), **headers},
                     encode_chunked="Transfer-Encoding" in headers)  # fmt: skip
        response = conn.getresponse()
    except (OSError, http.client.HTTPException) as exc:
        raise transport.silent(exc) from exc
    if response.status >= 400:
        raise problem_of(response.status, response.read())
    return response


def _broken(how: str) -> RecessError:
    return Unavailable(f"the server's answer broke off: {how}", hint="try again: it goes on where it was")
