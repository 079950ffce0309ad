"""Snapshots to and from elsewhere over HTTP: push, pull, archives as streams. Table of calls: docs/internals/http-api.md."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from recess.api.context import context_of
from recess.api.wire import field, read_json, reject_unknown, with_progress
from recess.errors import BadInput
from recess.snapshots.archive_v1 import Announcement


class BodyReader:
    """A request's body for a thread that reads it piece by piece: nothing is buffered but the piece at hand."""

    def __init__(self, request: Request) -> None:
        self._stream: AsyncIterator[bytes] = request.stream()
        self._loop = asyncio.get_running_loop()
        self._left = b""

    def read(self, size: int) -> bytes:
        """Return 1 to `size` bytes, b"" at the end (also of a client that went away). Not from the event loop."""
        while not self._left:
            piece = asyncio.run_coroutine_threadsafe(self._next(), self._loop).result()
            if piece is None:
                return b""
            self._left = piece
        out, self._left = self._left[:size], self._left[size:]
        return out

    async def _next(self) -> bytes | None:
        try:
            return await anext(self._stream, None)
        except ClientDisconnect:
            return None

    async def drain(self) -> None:
        """Read what is left: a client that is still sending would not see an answer."""
        while await self._next() is not None:
            pass


async def push_snapshot(request: Request) -> Response:
    """POST /v1/snapshots/REF/push."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"remote", "check", "with_image"}, "body")
    remote, ref = field(body, "remote", str, ""), str(request.path_params["ref"])
    check, with_image = field(body, "check", bool, False), field(body, "with_image", bool, False)

    async def work() -> dict[str, Any]:
        return await ctx.node.transfers.push(ref, remote, check=check, with_image=with_image)

    return await with_progress(request, ctx.hub, work, 200)


async def pull_snapshot(request: Request) -> Response:
    """POST /v1/snapshot-pulls."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"ref", "remote", "name"}, "body")
    ref, remote, name = (field(body, key, str, "") for key in ("ref", "remote", "name"))
    if not ref:
        raise BadInput("ref: which snapshot?")
    return await with_progress(request, ctx.hub, lambda: ctx.node.transfers.pull(ref, remote, name=name), 201)


async def describe_archive(request: Request) -> Response:
    """GET /v1/snapshots/REF/archive?image=1&as_stored=1: size and tag of the file that an export would be."""

    async def work() -> dict[str, Any]:
        head, size, tag = await _announce(request)
        return {"snapshot": head.snapshot_id, "name": head.name, "bytes": size, "tag": tag}

    return await with_progress(request, context_of(request).hub, work, 200)


async def _announce(request: Request) -> tuple[Announcement, int, str]:
    query = request.query_params
    transfers = context_of(request).node.transfers
    return await transfers.announce(
        str(request.path_params["ref"]), with_image=query.get("image") == "1", as_stored=query.get("as_stored") == "1"
    )


async def export_snapshot(request: Request) -> Response:
    """GET /v1/snapshots/REF/export?offset=N&image=1&as_stored=1."""
    transfers = context_of(request).node.transfers
    try:
        offset = int(request.query_params.get("offset", "0"))
    except ValueError as exc:
        raise BadInput("offset: a number is needed") from exc
    head, size, tag = await _announce(request)
    if not 0 <= offset <= size:
        raise BadInput(f"offset: from 0 to {size}")
    # The length is sent first, so that a client notices an archive that breaks off because a blob is damaged.
    headers = {"content-length": str(size - offset), "etag": f'"{tag}"'}
    return StreamingResponse(transfers.pieces(head, offset), headers=headers, media_type="application/x-tar")


async def import_snapshot(request: Request) -> Response:
    """POST /v1/snapshot-imports?name=NAME&trust=1, the archive as the body."""
    transfers, query = context_of(request).node.transfers, request.query_params
    body = BodyReader(request)
    try:
        done = await transfers.take_in(body.read, name=query.get("name", ""), trust=query.get("trust") == "1")
    finally:
        with suppress(RuntimeError):  # of a request that was cancelled the thread still reads
            await body.drain()
    return JSONResponse(done, status_code=201)


ROUTES = [
    Route("/v1/snapshots/{ref}/push", push_snapshot, methods=["POST"]),
    Route("/v1/snapshots/{ref}/archive", describe_archive, methods=["GET"]),
    Route("/v1/snapshots/{ref}/export", export_snapshot, methods=["GET"]),
    Route("/v1/snapshot-pulls", pull_snapshot, methods=["POST"]),
    Route("/v1/snapshot-imports", import_snapshot, methods=["POST"]),
]
