"""What a request handler gets: the node and the progress hub, from the application's state."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import HTTPConnection, Request

from recess.api.idempotency import KeyedResults, check_key, digest_of
from recess.api.wire import ProgressHub
from recess.catalog.once import Once
from recess.clock import Clock, SystemClock
from recess.guestlink.link import GuestLink
from recess.machines.service import MachineRow
from recess.node.everywhere import reach
from recess.node.local import LocalNode


@dataclass
class Context:
    """The services behind one application."""

    node: LocalNode
    hub: ProgressHub
    end: Callable[[], None]  # shuts the server down
    keys: KeyedResults = field(default_factory=KeyedResults)
    key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)  # see recess.sessions.signing
    clock: Clock = field(default_factory=SystemClock)


def context_of(request: HTTPConnection) -> Context:
    """Return the application's context."""
    context: Context = request.app.state.context  # set once when the application is made
    return context


@asynccontextmanager
async def guest_of(request: Request, why: str) -> AsyncIterator[tuple[MachineRow, GuestLink]]:
    """A machine's row and link, for the path's `ref`: it is neither frozen nor put away meanwhile. One that sleeps because
    nobody used it is woken, unless the query says `wake=0`."""
    ref, wake = str(request.path_params["ref"]), request.query_params.get("wake") != "0"
    async with reach(context_of(request).node, ref, why, wake=wake) as found:
        yield found


async def once(request: Request, body: object, work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """Run the work of a creating call once for its Idempotency-Key, if it has one. A key stands for one call: the same
    under another path or with another body is KeyReused, never the other call's answer."""
    key = request.headers.get("idempotency-key", "")
    return await context_of(request).keys.run(key, _asked(request, body), work)


def lasting(request: Request, body: object) -> Once | None:
    """Return the call's key as the catalog keeps it with the machine that is made; None without one."""
    key = check_key(request.headers.get("idempotency-key", ""))
    return Once(key, digest_of(_asked(request, body))) if key else None


def _asked(request: Request, body: object) -> list[object]:
    return [request.method, request.url.path, body]
