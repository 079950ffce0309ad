"""Egress and secrets over HTTP: what a machine may reach and what it tried, and the host's secrets by name. Values come
in here and never go out. Table of calls: docs/internals/http-api.md."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from recess.api.context import Context, context_of
from recess.api.wire import field, read_json, reject_unknown
from recess.broker import parse_bindings
from recess.errors import BadInput, NotFound
from recess.machines.service import MachineSpec


async def machine_egress(request: Request) -> Response:
    """GET /v1/machines/REF/egress; `after`: only decisions with a higher number."""
    ctx = context_of(request)
    row = await ctx.node.machines.get(str(request.path_params["ref"]))
    after = request.query_params.get("after", "0")
    if not (after.isascii() and after.isdigit() and len(after) < 16):
        raise BadInput("after: expected the number of a decision")
    spec = row.spec
    return JSONResponse(
        {
            "machine": row.id, "network": spec.network, "allow": list(spec.allow), "routes": dict(spec.routes),
            "secrets": list(spec.secrets), **ctx.node.egress(row.id, after=int(after)),
        }
    )  # fmt: skip


async def change_egress(request: Request) -> Response:
    """PATCH /v1/machines/REF/egress: rules to add (`allow`) and to take away (`deny`), at once."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"allow", "deny"}, "body")
    lists = [field(body, name, list, []) for name in ("allow", "deny")]
    if not all(isinstance(rule, str) for rules in lists for rule in rules):
        raise BadInput("allow, deny: lists of rules", hint="like example.org, *.example.org:443, 10.0.0.0/8")
    row = await ctx.node.machines.change_egress(str(request.path_params["ref"]), add=lists[0], remove=lists[1])
    return JSONResponse({"machine": row.id, "allow": list(row.spec.allow)})


async def check_secrets(ctx: Context, spec: MachineSpec) -> None:
    """Raise NotFound for a secret that a new machine is to use and this host does not have: said now, not at its first
    call."""
    names = await asyncio.to_thread(ctx.node.secrets.names)
    for binding in parse_bindings(spec.secrets):
        if binding.name not in names:
            raise NotFound(
                f"the secret {binding.name} is not set on this host", hint=f"recess secrets set {binding.name}",
                kind="secret", ref=binding.name,
            )  # fmt: skip


async def list_secrets(request: Request) -> Response:
    """GET /v1/secrets: names and where they are kept."""
    secrets = context_of(request).node.secrets
    return JSONResponse({"secrets": await asyncio.to_thread(secrets.describe)})


async def put_secret(request: Request) -> Response:
    """PUT /v1/secrets/NAME: a `value`, or `source`, where it is kept."""
    secrets, name = context_of(request).node.secrets, str(request.path_params["name"])
    body = await read_json(request)
    reject_unknown(body, {"value", "source"}, "body")
    value, source = field(body, "value", str, ""), field(body, "source", str, "")
    if bool(value) == bool(source):
        raise BadInput("either a value or a source")
    await (
        asyncio.to_thread(secrets.put, name, value) if value else asyncio.to_thread(secrets.put_source, name, source)
    )
    return JSONResponse({"name": name, "kept": source or "here"})


async def remove_secret(request: Request) -> Response:
    """DELETE /v1/secrets/NAME."""
    name = str(request.path_params["name"])
    if not await asyncio.to_thread(context_of(request).node.secrets.remove, name):
        raise NotFound(f"no secret {name!r}", hint="recess secrets ls", kind="secret", ref=name)
    return JSONResponse({"name": name})


ROUTES = [
    Route("/v1/machines/{ref}/egress", machine_egress, methods=["GET"]),
    Route("/v1/machines/{ref}/egress", change_egress, methods=["PATCH"]),
    Route("/v1/secrets", list_secrets, methods=["GET"]),
    Route("/v1/secrets/{name}", put_secret, methods=["PUT"]),
    Route("/v1/secrets/{name}", remove_secret, methods=["DELETE"]),
]
