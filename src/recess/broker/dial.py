"""The broker's way out: names to addresses, addresses to connections. The only place here that opens sockets.

A connection is made to an address that was judged, never to a name: resolving twice would let the second answer
differ from the judged one.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Protocol

from recess.broker.rules import Address, plain_address
from recess.errors import Timeout, Unavailable

CONNECT_TIMEOUT_S = 10.0
RESOLVE_TIMEOUT_S = 10.0
ADDRESSES_MAX = 16
Pipe = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Dialer(Protocol):
    """How names are resolved and connections made; tests give their own."""

    async def resolve(self, host: str, port: int) -> list[Address]:
        """Return a name's addresses, best first. Raises Unavailable (no such name) or Timeout."""
        ...

    async def connect(self, address: Address, port: int, tls_host: str) -> Pipe:
        """Return an open connection, with TLS for `tls_host` unless that is empty. Raises Unavailable or Timeout."""
        ...


class SystemDialer:
    """The host's resolver and network."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self._context = context

    async def resolve(self, host: str, port: int) -> list[Address]:
        """Ask the host's resolver."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT_S):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except TimeoutError:
            raise Timeout(f"resolving {host} took more than {RESOLVE_TIMEOUT_S:.0f} s") from None
        except OSError as exc:
            raise Unavailable(f"cannot resolve {host}: {exc.strerror or exc}") from None
        seen = dict.fromkeys(plain_address(str(info[4][0])) for info in found)
        return list(seen)[:ADDRESSES_MAX]

    async def connect(self, address: Address, port: int, tls_host: str) -> Pipe:
        """Connect by address; TLS verifies the name against the host's trust store."""
        context = None
        if tls_host:
            self._context = context = self._context or ssl.create_default_context()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await asyncio.open_connection(
                    str(address), port, ssl=context, server_hostname=tls_host or None, limit=64 * 1024
                )
        except TimeoutError:
            raise Timeout(f"connecting to {address} port {port} took more than {CONNECT_TIMEOUT_S:.0f} s") from None
        except OSError as exc:  # ssl.SSLError is one
            raise Unavailable(f"cannot connect to {address} port {port}: {exc.strerror or exc}") from None


async def connect_socket(path: str) -> Pipe:
    """Connect to a Unix socket of this host. Raises Unavailable or Timeout."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            return await asyncio.open_unix_connection(path, limit=64 * 1024)
    except TimeoutError:
        raise Timeout(f"connecting to {path} took more than {CONNECT_TIMEOUT_S:.0f} s") from None
    except OSError as exc:
        raise Unavailable(f"cannot connect to {path}: {exc.strerror or exc}") from None


async def connect_any(dialer: Dialer, addresses: list[Address], port: int, tls_host: str) -> Pipe:
    """Connect to the first address that answers. Raises the last error."""
    last: Unavailable | Timeout = Unavailable("no address to connect to")
    for address in addresses:
        try:
            return await dialer.connect(address, port, tls_host)
        except (Unavailable, Timeout) as exc:
            last = exc
    raise last


def abort(writer: asyncio.StreamWriter) -> None:
    """Drop a connection at once, whatever is still buffered; safe to call twice."""
    writer.transport.abort()
