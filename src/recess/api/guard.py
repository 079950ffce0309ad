"""What stands before the application where it listens on TCP: the token, and no calls that pages of other sites make.

A browser on this host reaches our port on behalf of any page it shows: by a form or a script (which cannot read the
answer, but the act is done), by a WebSocket (which it can read and write), or through a name of its own that it lets point
here (DNS rebinding). The unix socket has none of this: no browser opens one. This module must know nothing of routes.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from recess.api.wire import problem
from recess.errors import BadInput, RecessError, Refused, Unavailable

_HERE = frozenset({"localhost", "127.0.0.1", "::1"})
_UNAUTHORIZED = 401
GRANT = "recess.grant"  # of a request's scope: what a token with a scope allows
_WS_POLICY_VIOLATION = 1008  # RFC 6455, section 7.4.1


class Guard:
    """ASGI wrapper for TCP. With a token every request must carry it, or one that `grant` knows (it returns what that one
    allows, which is put into the request's scope); without one the host must be named as this host. Paths that begin with
    `signed` carry a signature instead, which is the application's business."""

    def __init__(
        self, app: ASGIApp, token: str, *, grant: Callable[[str], object] | None = None, signed: str = ""
    ) -> None:
        self._app = app
        self._token = token
        self._grant = grant
        self._signed = signed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse: 401, 403, a WebSocket by its close."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        error, granted = judge(headers, token=bool(self._token)), None
        status = error.http_status if error is not None else _UNAUTHORIZED
        if error is None and not self._is_signed(scope) and not _has_token(headers, self._token):
            try:
                granted = self._granted(headers)
            except Refused as exc:
                error = exc
        if error is not None:
            await _refuse(scope, receive, send, error, status)
            return
        if granted is not None:
            scope[GRANT] = granted
        try:
            await self._app(scope, receive, send)
        except Refused as exc:  # out of the grant's reach: nothing was sent yet
            if granted is None:
                raise
            await _refuse(scope, receive, send, exc, exc.http_status)

    def _is_signed(self, scope: Scope) -> bool:
        return bool(self._signed) and scope["type"] == "http" and str(scope["path"]).startswith(self._signed)

    def _granted(self, headers: Mapping[bytes, bytes]) -> object:
        kind, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if self._grant is None or kind.lower() != "bearer" or not token:
            raise Refused("a token is needed", hint="set RECESS_TOKEN")
        return self._grant(token)


def _has_token(headers: Mapping[bytes, bytes], token: str) -> bool:
    given = headers.get(b"authorization", b"")
    return not token or secrets.compare_digest(given, f"Bearer {token}".encode())


def judge(headers: Mapping[bytes, bytes], *, token: bool) -> RecessError | None:
    """Return why a request must not pass, or None. Browsers set Origin on all that acts, and pages cannot change it."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    origin = headers.get(b"origin")
    if origin is not None and _place(origin.decode("latin-1").lower()) != host:
        return Refused("pages of other sites may not call this server")
    if not token and _name(host) not in _HERE:
        return Refused(f"without a token this server is called by its local name, not {host[:80]!r}",
                       hint="use 127.0.0.1 or localhost, or set RECESS_TOKEN")  # fmt: skip
    return None


def _place(origin: str) -> str:
    """Return the host and port of an origin; "?", which is nobody's, for `null` and what is none."""
    try:
        return urlsplit(origin).netloc or "?"
    except ValueError:
        return "?"


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def _refuse(scope: Scope, receive: Receive, send: Send, error: RecessError, status: int) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": _WS_POLICY_VIOLATION})
        return
    answer = problem(error)
    answer.status_code = status
    await answer(scope, receive, send)


def tcp_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises BadInput (not a port), Unavailable (the address is taken or not ours)."""
    bare = host.strip("[]")
    if not 0 <= port < 65536:
        raise BadInput(f"not a port: {port}")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    try:
        return socket.create_server((bare, port), family=family)
    except OSError as exc:
        raise Unavailable(
            f"cannot listen on {host}:{port}: {exc.strerror or exc}", hint="choose another address or port"
        ) from exc
