"""Following a session over HTTP: server-sent events that go on by id, and the same by long poll.

What is sent is read from the log, never from the agent: a slow reader holds nobody up, and one that was cut off goes on
by the id it had last, on a restarted server too. What the events mean is `recess.sessions.following`'s business.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from recess.api.context import context_of
from recess.contextlog.contract import Entry
from recess.errors import BadInput
from recess.sessions.following import Feed, Piece, Place, parse_place

KEEPALIVE_S = 15.0
LOOK_S = 5.0  # a machine that does not come up writes no entry, so that is looked for
POLL_MAX_S = 60.0


async def _feed(request: Request) -> Feed:
    last = request.headers.get("last-event-id") or request.query_params.get("after") or "0"
    return await context_of(request).node.sessions.feed(str(request.path_params["ref"]), parse_place(last))


def _kind(item: Entry | Piece) -> str:
    return "entry" if isinstance(item, Entry) else "delta"


def _event(place: Place, item: Entry | Piece) -> str:
    return f"id: {place}\nevent: {_kind(item)}\ndata: {json.dumps(asdict(item))}\n\n"


async def events(request: Request) -> Response:
    """GET /v1/sessions/REF/events: what is new after `Last-Event-ID` (or `after=`), for ever; `trouble` tells why nothing
    comes (its machine does not come up), empty when that is over."""
    return StreamingResponse(_lines(await _feed(request)), media_type="text/event-stream")


async def _lines(feed: Feed) -> AsyncIterator[str]:
    """Write events. A reader that is slow is waited for here, and gets what the log holds by then."""
    loop, told = asyncio.get_running_loop(), ""
    wrote = loop.time()
    while True:
        found = await feed.ready()
        lines = [_event(place, item) for place, item in found]
        if feed.failure != told:
            told = feed.failure
            lines.append(f"event: trouble\ndata: {json.dumps({'failure': told})}\n\n")
        if feed.ended:
            lines.append("event: end\ndata: {}\n\n")
        if not lines and loop.time() - wrote >= KEEPALIVE_S:
            lines.append(": still here\n\n")
        for line in lines:
            wrote = loop.time()
            yield line
        if feed.ended:
            return
        if not found:
            await feed.wait(LOOK_S)


async def poll(request: Request) -> Response:
    """GET /v1/sessions/REF/poll: what is new after `after=`, at once or as soon as there is something within `wait=`
    seconds; `next` is the `after` of the next call."""
    feed = await _feed(request)
    found = await feed.ready()
    if not found and not feed.ended:
        await feed.wait(_seconds(request))
        found = await feed.ready()
    told: list[dict[str, Any]] = [
        {"id": str(place), "event": _kind(item), "data": asdict(item)} for place, item in found
    ]
    return JSONResponse({"events": told, "next": str(feed.place), "end": feed.ended})


def _seconds(request: Request) -> float:
    try:
        seconds = float(request.query_params.get("wait", "25"))
    except ValueError as exc:
        raise BadInput("wait: a number of seconds is needed") from exc
    if not 0 <= seconds <= POLL_MAX_S:
        raise BadInput(f"wait: 0 to {POLL_MAX_S:.0f} seconds")
    return seconds


ROUTES = [
    Route("/v1/sessions/{ref}/events", events, methods=["GET"]),
    Route("/v1/sessions/{ref}/poll", poll, methods=["GET"]),
]
