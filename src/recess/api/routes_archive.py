"""Folders of a machine as tar streams over HTTP: what `recess cp`, `export` and `commit` are made of.

Nothing is held: what the guest gives goes to the client as it comes, and the other way round.
"""

from __future__ import annotations

import posixpath
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from recess.api.context import context_of, guest_of
from recess.api.wire import field, read_json, reject_unknown, with_progress
from recess.errors import BadInput, NotFound, Unsupported
from recess.guestlink.link import GuestLink, TarReader

NOT_FILES = ("/proc", "/sys", "/dev", "/run", "/tmp")
_TAR = "application/x-tar"


def _path(request: Request) -> str:
    path = request.query_params.get("path", "")
    if not path.startswith("/"):
        raise BadInput("path: an absolute path in the machine is needed")
    return posixpath.normpath(path)


async def read_archive(request: Request) -> Response:
    """GET /v1/machines/REF/archive?path=P&name=N&follow=1&sparse=1: what is at P, called N; `path=/` without what is no file.
    `sparse`: files with holes in GNU's format 1.0."""
    path, query = _path(request), request.query_params
    async with guest_of(request, "files") as (_, link):
        if not isinstance(link, TarReader):
            raise Unsupported("this driver's machines cannot be read as archives")
        name = query.get("name", posixpath.basename(path))
        skip = NOT_FILES if path == "/" else ()
        follow, sparse = query.get("follow") == "1", query.get("sparse") == "1"
        stream = link.get_tar(path, name=name, follow=follow, sparse=sparse, skip=skip)
        first = await anext(stream)  # what is wrong is said before the answer begins

    async def pieces() -> AsyncIterator[bytes]:
        # A client that goes away ends the guest's reading, too. (An answer that is never begun holds nobody.)
        async with guest_of(request, "files"), aclosing(stream):
            yield first
            async for piece in stream:
                yield piece

    return StreamingResponse(pieces(), media_type=_TAR)


async def write_archive(request: Request) -> Response:
    """POST /v1/machines/REF/archive?path=P&sparse=1: unpack the body below the folder P, which must be there. `sparse`: it has
    files with holes (501 before it is read, for a machine whose guestd is of before that)."""
    path = _path(request)
    async with guest_of(request, "files") as (_, link):
        if not await is_folder(link, path):
            await link.stat(path)  # raises NotFound
            raise BadInput(f"{path} in the machine is a file, no folder")
        await link.put_tar(path, _body(request), sparse=request.query_params.get("sparse") == "1")
    return Response(status_code=204)


async def is_folder(link: GuestLink, path: str) -> bool:
    """Tell whether there is a folder, links followed: only a folder can be listed."""
    try:
        await link.list_dir(path)
    except (NotFound, BadInput):
        return False
    return True


async def commit_machine(request: Request) -> Response:
    """POST /v1/machines/REF/commit: the machine's files, as they are now, as an image."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"name"}, "body")
    name = field(body, "name", str, "")

    async def work() -> dict[str, Any]:
        async with guest_of(request, "files") as (row, link):
            if not isinstance(link, TarReader):
                raise Unsupported("this driver's machines cannot be read as archives")
            return await ctx.node.images.commit(link.get_tar("/", skip=NOT_FILES), name, image=row.spec.image)

    return await with_progress(request, ctx.hub, work, 201)


async def _body(request: Request) -> AsyncIterator[bytes]:
    async for piece in request.stream():
        if piece:
            yield piece


ROUTES = [
    Route("/v1/machines/{ref}/archive", read_archive, methods=["GET"]),
    Route("/v1/machines/{ref}/archive", write_archive, methods=["POST"]),
    Route("/v1/machines/{ref}/commit", commit_machine, methods=["POST"]),
]
