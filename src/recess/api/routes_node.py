"""The node itself, images and agent versions over HTTP."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from recess.api.context import context_of
from recess.api.exposition import CONTENT_TYPE, expose
from recess.api.wire import field, read_json, reject_unknown, with_progress
from recess.errors import BadInput
from recess.node.gauges import gauges
from recess.node.install_firecracker import install_firecracker
from recess.version import __version__


async def info(request: Request) -> Response:
    """GET /v1/info."""
    node = context_of(request).node
    about = {"version": __version__, "pid": os.getpid(), "home": str(node.config.home)}
    return JSONResponse({**about, **node.info(), "kept_ready": await node.kept_ready()})


async def metrics(request: Request) -> Response:
    """GET /metrics: figures of this node in Prometheus's text format."""
    node = context_of(request).node
    samples = [*node.counters.samples(), *await gauges(node)]
    return Response(expose(samples), media_type=CONTENT_TYPE)


async def shutdown(request: Request) -> Response:
    """POST /v1/shutdown: machines keep running under their keepers unless `detach` is false."""
    body = await read_json(request)
    ctx = context_of(request)
    ctx.node.detach_on_close = field(body, "detach", bool, True)
    ctx.end()
    return JSONResponse({}, status_code=202)


async def doctor(request: Request) -> Response:
    """POST /v1/doctor: check the host, then run a guest under the driver and say what level was reached. With
    `install_firecracker` its release is fetched into the home instead."""
    body = await read_json(request)
    reject_unknown(body, {"install_firecracker"}, "doctor")
    node = context_of(request).node
    if field(body, "install_firecracker", bool, False):
        path = await asyncio.to_thread(install_firecracker, node.config.home)
        return JSONResponse({"installed": str(path)})
    return JSONResponse(await node.doctor())


async def list_images(request: Request) -> Response:
    """GET /v1/images."""
    return JSONResponse({"images": await context_of(request).node.list_images()})


async def create_image(request: Request) -> Response:
    """POST /v1/images."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"name", "packages"}, "body")
    name, packages = field(body, "name", str, ""), field(body, "packages", list, [])
    if not name:
        raise BadInput("name: an image needs one")

    async def work() -> dict[str, Any]:
        return await ctx.node.create_image(name, [str(p) for p in packages])

    return await with_progress(request, ctx.hub, work, 201)


ROUTES = [
    Route("/v1/info", info, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
    Route("/v1/shutdown", shutdown, methods=["POST"]),
    Route("/v1/doctor", doctor, methods=["POST"]),
    Route("/v1/images", list_images, methods=["GET"]),
    Route("/v1/images", create_image, methods=["POST"]),
]
