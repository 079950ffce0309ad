"""A session's blobs over HTTP: what its agent kept beside its log, listed and fetched. Reading only: an agent puts them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from recess.api.context import context_of
from recess.contextlog.contract import Blob
from recess.sessions.service import Sessions


def blob_json(blob: Blob) -> dict[str, Any]:
    """Return a blob as JSON: `position` is that of the entry that names it."""
    return {
        "hash": blob.hash, "size": blob.size, "media_type": blob.media_type, "name": blob.name,
        "position": blob.position,
    }  # fmt: skip


async def list_blobs(request: Request) -> Response:
    """GET /v1/sessions/REF/blobs: newest first."""
    found = await context_of(request).node.sessions.blobs(str(request.path_params["ref"]))
    return JSONResponse({"blobs": [blob_json(one) for one in found]})


async def get_blob(request: Request) -> Response:
    """GET /v1/sessions/REF/blobs/HASH: the bytes. Never as what they say they are: an agent made them, a browser must not run
    them."""
    sessions = context_of(request).node.sessions
    blob = await sessions.blob(str(request.path_params["ref"]), str(request.path_params["hash"]))
    headers = {
        "content-length": str(blob.size), "etag": f'"{blob.hash}"', "x-content-type-options": "nosniff",
        "content-disposition": "attachment",
    }  # fmt: skip
    # The length is sent first: a client notices bytes that break off because a piece is damaged.
    return StreamingResponse(_bytes(sessions, blob), headers=headers, media_type="application/octet-stream")


async def _bytes(sessions: Sessions, blob: Blob) -> AsyncIterator[bytes]:
    for piece in blob.pieces:
        yield await sessions.blob_piece(piece)


ROUTES = [
    Route("/v1/sessions/{ref}/blobs", list_blobs, methods=["GET"]),
    Route("/v1/sessions/{ref}/blobs/{hash}", get_blob, methods=["GET"]),
]
