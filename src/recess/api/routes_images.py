"""Images over HTTP: from registries, files and Dockerfiles, their names. Table of calls: docs/internals/http-api.md."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from recess.api.context import context_of
from recess.api.wire import field, read_json, reject_unknown, with_progress


async def pull_image(request: Request) -> Response:
    """POST /v1/image-pulls: take an image from a registry."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"ref", "name", "insecure"}, "body")
    ref, name = field(body, "ref", str, ""), field(body, "name", str, "")
    insecure = field(body, "insecure", bool, False)

    async def work() -> dict[str, Any]:
        return await ctx.node.images.pull(ref, name=name, insecure=insecure)

    return await with_progress(request, ctx.hub, work, 201)


async def import_image(request: Request) -> Response:
    """POST /v1/image-imports: take an image from a file or folder of the server's host."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"path", "name"}, "body")
    path, name = field(body, "path", str, ""), field(body, "name", str, "")
    return await with_progress(request, ctx.hub, lambda: ctx.node.images.take_in(path, name), 201)


async def build_image(request: Request) -> Response:
    """POST /v1/image-builds: build a Dockerfile of the server's host."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"context", "dockerfile", "name", "arguments", "target"}, "body")
    context, name = field(body, "context", str, ""), field(body, "name", str, "")
    dockerfile = field(body, "dockerfile", str, "") or f"{context}/Dockerfile"
    arguments = [str(one) for one in field(body, "arguments", list, [])]
    target = field(body, "target", str, "")

    async def work() -> dict[str, Any]:
        return await ctx.node.images.build(context, dockerfile, name, arguments, target=target)

    return await with_progress(request, ctx.hub, work, 201)


async def tag_image(request: Request) -> Response:
    """POST /v1/image-tags: give an image a further name."""
    body = await read_json(request)
    reject_unknown(body, {"image", "name"}, "body")
    image, name = field(body, "image", str, ""), field(body, "name", str, "")
    return JSONResponse(await context_of(request).node.images.tag(image, name), status_code=201)


async def get_image(request: Request) -> Response:
    """GET /v1/images/NAME, slashes and all."""
    return JSONResponse(await context_of(request).node.get_image(str(request.path_params["name"])))


async def delete_image(request: Request) -> Response:
    """DELETE /v1/images/NAME."""
    await context_of(request).node.remove_image(str(request.path_params["name"]))
    return Response(status_code=204)


ROUTES = [
    Route("/v1/image-pulls", pull_image, methods=["POST"]),
    Route("/v1/image-imports", import_image, methods=["POST"]),
    Route("/v1/image-builds", build_image, methods=["POST"]),
    Route("/v1/image-tags", tag_image, methods=["POST"]),
    Route("/v1/images/{name:path}", get_image, methods=["GET"]),
    Route("/v1/images/{name:path}", delete_image, methods=["DELETE"]),
]
