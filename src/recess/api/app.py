"""The ASGI application and the server around it.

`serve` owns the process: it opens the node (which takes the home's lock), listens on the unix socket (mode 0600) and on
SIGTERM or SIGINT stops accepting, then closes the node; machines go on under their keepers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from recess.api import (
    grants,
    routes_access,
    routes_acts,
    routes_archive,
    routes_blobs,
    routes_egress,
    routes_exec,
    routes_files,
    routes_images,
    routes_machines,
    routes_node,
    routes_sessions,
    routes_sessions_events,
    routes_snapshots,
    routes_transfer,
    routes_volumes,
)
from recess.api.access import Access
from recess.api.context import Context
from recess.api.guard import Guard, tcp_socket
from recess.api.wire import ProgressHub, problem
from recess.config import Config
from recess.errors import BadInput, NotFound, RecessError
from recess.node.local import LocalNode
from recess.sessions.signing import root_key

log = logging.getLogger(__name__)


async def _on_error(request: Request, exc: Exception) -> Response:
    if not isinstance(exc, RecessError):  # registered for this class only
        raise exc
    return problem(exc)


async def _on_defect(request: Request, exc: Exception) -> Response:
    # A defect of ours: the trace goes to the server's log (the middleware raises it again), the client gets one line.
    log.error("%s %s failed", request.method, request.url.path, exc_info=exc)
    what = f"the server failed at {request.method} {request.url.path}: {type(exc).__name__}: {exc}"
    return problem(RecessError(what, hint="a defect in recess; the trace is in server.log in the home"))


async def _on_http(request: Request, exc: Exception) -> Response:
    if not isinstance(exc, HTTPException):  # registered for this class only
        raise exc
    if exc.status_code == 404:
        return problem(NotFound(f"no such call: {request.method} {request.url.path}"))
    if exc.status_code == 405:
        return problem(BadInput(f"{request.url.path} does not take {request.method}"))
    return JSONResponse({"code": "http", "message": str(exc.detail)}, status_code=exc.status_code)


def _no_end() -> None:
    return


def make_app(
    node: LocalNode, hub: ProgressHub, *, end: Callable[[], None] = _no_end, key: bytes | None = None
) -> Starlette:
    """Return the application over an open node. `end` is what a call to shut down does, `key` the root of tokens and
    signatures (default: one that nobody knows)."""
    routes: list[BaseRoute] = [*routes_acts.ROUTES, *routes_egress.ROUTES, *routes_node.ROUTES, *routes_images.ROUTES]
    routes += [*routes_archive.ROUTES, *routes_volumes.ROUTES]
    routes += [*routes_blobs.ROUTES, *routes_sessions_events.ROUTES, *routes_sessions.ROUTES, *routes_exec.ROUTES]
    routes += [*routes_transfer.ROUTES, *routes_snapshots.ROUTES, *routes_machines.ROUTES]  # the first that fits
    app = Starlette(
        routes=[*routes_access.ROUTES, *routes_files.ROUTES, *routes],
        exception_handlers={RecessError: _on_error, HTTPException: _on_http, Exception: _on_defect},
    )
    context = Context(node=node, hub=hub, end=end)
    if key is not None:
        context.key = key
    app.state.context = context
    return app


def _unix_socket(config: Config) -> socket.socket:
    path = config.socket_path
    # The home's lock is ours, so a socket file that is there belongs to a server that died.
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(old)
    sock.listen(128)
    sock.setblocking(False)
    return sock


@contextlib.asynccontextmanager
async def open_node(config: Config, hub: ProgressHub) -> AsyncIterator[LocalNode]:
    """Open the node and close it whatever happens."""
    node = await LocalNode.open(config, progress=hub.publish)
    try:
        yield node
    finally:
        await node.close(detach=node.detach_on_close)


async def serve(
    config: Config,
    *,
    tcp: tuple[str, int] | None = None,
    on_ready: Callable[[], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Run the server until SIGTERM or SIGINT, or, inside somebody else's process, until `stop`. Raises HomeLocked when
    another server owns the home, Unavailable when `tcp` cannot be listened on."""
    if tcp is not None and not config.token:
        # Also on a loopback address: every user and every page of this host reaches that.
        raise BadInput("listening on TCP needs a token", hint="set RECESS_TOKEN")
    hub = ProgressHub()
    async with open_node(config, hub) as node:
        sock = _unix_socket(config)
        try:
            stop = _until_signal() if stop is None else stop
            key = root_key(config.token, config.home)
            app = make_app(node, hub, end=stop.set, key=key)
            servers = [_server(app)]
            sockets = [[sock]]
            if tcp is not None:
                servers.append(_server(_guarded(app, config.token, key, node)))
                sockets.append([tcp_socket(*tcp)])
            ender = asyncio.create_task(_end_on(stop, servers), name="end")
            on_ready()
            try:
                await asyncio.gather(*(s.serve(sockets=k) for s, k in zip(servers, sockets, strict=True)))
            finally:
                ender.cancel()
                await asyncio.gather(ender, return_exceptions=True)
        finally:
            with contextlib.suppress(FileNotFoundError):
                config.socket_path.unlink()
            sock.close()


def _guarded(app: Starlette, token: str, key: bytes, node: LocalNode) -> Guard:
    def grant(given: str) -> grants.Grant:
        return grants.read(key, given, time.time())

    return Guard(Access(app, node.sessions.get), token, grant=grant, signed=routes_access.HOOK_PREFIX)


class _Server(uvicorn.Server):
    """uvicorn raises a signal it caught once more when it ends, which would kill us before the node is closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `_until_signal`."""
        yield


async def _end_on(stop: asyncio.Event, servers: Sequence[uvicorn.Server]) -> None:
    await stop.wait()
    for server in servers:
        server.should_exit = True


def _until_signal() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _server(app: Callable[..., Awaitable[None]] | Starlette) -> uvicorn.Server:
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, ws="websockets-sansio", lifespan="off",
        timeout_graceful_shutdown=3, ws_max_size=4 << 20,
    )  # fmt: skip
    return _Server(settings)
