"""TLS over a guest's stream: our end is the server's. The plain side is a byte stream again, so HTTP is read from it as
from any other connection. This module must know nothing of HTTP, policies or secrets."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

from recess.errors import BadInput, Unavailable
from recess.guestlink.link import ByteStream

READ_BYTES = 64 * 1024
HANDSHAKE_S = 30.0
HANDSHAKE_BYTES_MAX = 256 * 1024
_RECORD_HANDSHAKE = 0x16  # RFC 8446 section 5.1


class TlsStream:
    """The plain side of a guest's TLS connection. One reader and one writer at a time, as with the stream below it."""

    def __init__(self, below: ByteStream, context: ssl.SSLContext) -> None:
        self._below = below
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        self._lock = asyncio.Lock()  # a reader may have to write (key updates), and a writer writes
        self._ended = False

    async def handshake(self, early: bytes = b"") -> None:
        """Do the handshake; `early` is what has been read already. Raises BadInput (not TLS, or the client gave up: it
        does not trust us), Unavailable (it took too long), GuestFailed."""
        taken = len(early)
        self._in.write(early)
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                first = early[:1]
                while True:
                    try:
                        self._tls.do_handshake()
                        await self._flush()
                        return
                    except ssl.SSLWantReadError:
                        await self._flush()
                    data = await self._below.read(READ_BYTES)
                    first, taken = first or data[:1], taken + len(data)
                    if not data or first[0] != _RECORD_HANDSHAKE or taken > HANDSHAKE_BYTES_MAX:
                        raise BadInput("a secret's host is spoken to by TLS here, and this is none")
                    self._in.write(data)
        except ssl.SSLError as exc:
            with contextlib.suppress(ssl.SSLError):
                await self._flush()  # the alert that says why
            raise BadInput(
                f"the TLS handshake failed: {exc.reason or exc}",
                hint="the client must trust /etc/ssl/certs/ca-certificates.crt",
            ) from exc
        except TimeoutError:
            raise Unavailable(f"the TLS handshake took more than {HANDSHAKE_S:.0f} s") from None

    async def read(self, limit: int = READ_BYTES) -> bytes:
        """Return some bytes, b"" at the end. Raises GuestFailed; BadInput for records that are damaged."""
        while not self._ended:
            try:
                data = self._tls.read(limit)
            except ssl.SSLWantReadError:
                await self._flush()
                more = await self._below.read(READ_BYTES)
                if more:
                    self._in.write(more)
                else:
                    self._in.write_eof()
                continue
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                data = b""
            except ssl.SSLError as exc:
                raise BadInput(f"TLS from the guest broke: {exc.reason or exc}") from exc
            self._ended = not data
            return data
        return b""

    async def write(self, data: bytes) -> None:
        """Send all, waiting for credit."""
        for at in range(0, len(data), READ_BYTES):
            try:
                self._tls.write(data[at : at + READ_BYTES])
            except ssl.SSLError as exc:
                raise BadInput(f"TLS to the guest broke: {exc.reason or exc}") from exc
            await self._flush()

    async def close_write(self) -> None:
        """Say the end (close_notify), then half-close."""
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        await self._flush()
        await self._below.close_write()

    async def close(self) -> None:
        """Close both ways."""
        await self._below.close()

    async def _flush(self) -> None:
        async with self._lock:
            while data := self._out.read(READ_BYTES):
                await self._below.write(data)
