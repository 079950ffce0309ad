"""Volumes over HTTP: named ones of this node, and exchanging a machine's with the host. Table: docs/internals/http-api.md."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from recess.api.context import context_of, guest_of
from recess.api.wire import field, read_json, reject_unknown
from recess.machines.mounting import summary
from recess.node.local import LocalNode


async def _users(node: LocalNode) -> dict[str, list[str]]:
    """Return the names of the machines that have each volume, those that do not run too."""
    users: dict[str, list[str]] = {}
    for row in await node.machines.list_machines(everything=True):
        for source in {mount.source for mount in row.spec.volumes if not mount.source.startswith("/")}:
            users.setdefault(source, []).append(row.name or row.id)
    return users


async def list_volumes(request: Request) -> Response:
    """GET /v1/volumes."""
    node = context_of(request).node
    users = await _users(node)
    found = await asyncio.to_thread(node.volumes.list_all)
    return JSONResponse({"volumes": [{**asdict(one), "machines": users.get(one.name, [])} for one in found]})


async def create_volume(request: Request) -> Response:
    """POST /v1/volumes: one that is there is no error."""
    node, body = context_of(request).node, await read_json(request)
    reject_unknown(body, {"name"}, "body")
    made = await asyncio.to_thread(node.volumes.create, field(body, "name", str, ""))
    return JSONResponse({**asdict(made), "machines": (await _users(node)).get(made.name, [])}, status_code=201)


async def get_volume(request: Request) -> Response:
    """GET /v1/volumes/NAME."""
    node = context_of(request).node
    found = await asyncio.to_thread(node.volumes.get, str(request.path_params["name"]))
    return JSONResponse({**asdict(found), "machines": (await _users(node)).get(found.name, [])})


async def delete_volume(request: Request) -> Response:
    """DELETE /v1/volumes/NAME: 409 while a machine has it."""
    node, name = context_of(request).node, str(request.path_params["name"])
    users = (await _users(node)).get(name, [])
    await asyncio.to_thread(lambda: node.volumes.remove(name, users=users))
    return Response(status_code=204)


async def sync_machine(request: Request) -> Response:
    """POST /v1/machines/REF/sync: exchange its volumes now."""
    reject_unknown(await read_json(request), set(), "body")
    async with guest_of(request, "sync") as (row, _):
        done: dict[str, Any] = summary(await context_of(request).node.machines.acts.sync(row.id))
    return JSONResponse(done)


ROUTES = [
    Route("/v1/volumes", list_volumes, methods=["GET"]),
    Route("/v1/volumes", create_volume, methods=["POST"]),
    Route("/v1/volumes/{name}", get_volume, methods=["GET"]),
    Route("/v1/volumes/{name}", delete_volume, methods=["DELETE"]),
    Route("/v1/machines/{ref}/sync", sync_machine, methods=["POST"]),
]
