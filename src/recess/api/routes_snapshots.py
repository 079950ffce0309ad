"""Snapshots over HTTP: taking, naming, listing, comparing, verifying, removing. Table: docs/internals/http-api.md."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from recess.api.context import context_of, lasting, once
from recess.api.wire import (
    field,
    machine_json,
    parse_changes,
    read_json,
    reject_unknown,
    resume_json,
    snapshot_json,
    with_progress,
)
from recess.errors import BadInput
from recess.machines.keeping import Removed


def _ref(request: Request) -> str:
    return str(request.path_params["ref"])


def _removed(rows: list[Removed]) -> dict[str, Any]:
    return {"removed": [asdict(one) for one in rows], "bytes": sum(one.bytes for one in rows)}


async def snapshot_machine(request: Request) -> Response:
    """POST /v1/machines/REF/snapshot."""
    machines, body = context_of(request).node.machines, await read_json(request)
    reject_unknown(body, {"name", "ttl_s", "keep_last"}, "body")
    ttl_s, keep_last = field(body, "ttl_s", float, 0.0), field(body, "keep_last", int, 0)
    if ttl_s < 0 or keep_last < 0:
        raise BadInput("ttl_s and keep_last cannot be negative")
    row = await machines.snapshot(_ref(request), name=field(body, "name", str, ""))
    if ttl_s:
        await machines.keeping.expire(row.id, ttl_s)
    gone = await machines.keeping.keep_newest(row.session or row.machine, keep_last) if keep_last else []
    return JSONResponse({**snapshot_json(row), **_removed(gone)}, status_code=201)


async def list_snapshots(request: Request) -> Response:
    """GET /v1/snapshots."""
    return JSONResponse({"snapshots": await context_of(request).node.machines.views.list_all()})


async def snapshot_tree(request: Request) -> Response:
    """GET /v1/snapshots/tree."""
    return JSONResponse(await context_of(request).node.machines.views.tree())


async def get_snapshot(request: Request) -> Response:
    """GET /v1/snapshots/REF."""
    return JSONResponse(await context_of(request).node.machines.views.inspect(_ref(request)))


async def delete_snapshot(request: Request) -> Response:
    """DELETE /v1/snapshots/REF."""
    force = request.query_params.get("force") == "1"
    return JSONResponse(asdict(await context_of(request).node.machines.keeping.remove(_ref(request), force=force)))


async def tag_snapshot(request: Request) -> Response:
    """POST /v1/snapshots/REF/tag."""
    body = await read_json(request)
    reject_unknown(body, {"name"}, "body")
    row, before = await context_of(request).node.machines.keeping.tag(_ref(request), field(body, "name", str, ""))
    return JSONResponse({"id": row.id, "name": body.get("name", ""), "moved_from": before if before != row.id else ""})


async def untag_snapshot(request: Request) -> Response:
    """DELETE /v1/snapshot-names/NAME."""
    await context_of(request).node.machines.keeping.untag(_ref(request))
    return Response(status_code=204)


async def prune_snapshots(request: Request) -> Response:
    """POST /v1/snapshots/prune."""
    machines, body = context_of(request).node.machines, await read_json(request)
    reject_unknown(body, {"keep_last", "older_than_s", "all", "dry_run"}, "body")
    keep_last, older = field(body, "keep_last", int, None), field(body, "older_than_s", float, None)
    if (keep_last or 0) < 0 or (older or 0.0) < 0:
        raise BadInput("keep_last and older_than_s cannot be negative")
    dry_run = field(body, "dry_run", bool, False)
    pruned = await machines.keeping.prune(
        keep_last=keep_last, older_than_s=older, everything=field(body, "all", bool, False), dry_run=dry_run
    )
    swept = {"bytes": 0} if dry_run else dict(await machines.keeping.collect())
    out = _removed(pruned)
    return JSONResponse({**out, "swept": swept, "bytes": out["bytes"] + swept["bytes"], "dry_run": dry_run})


async def verify_snapshot(request: Request) -> Response:
    """POST /v1/snapshots/REF/verify."""
    machines, body = context_of(request).node.machines, await read_json(request)
    reject_unknown(body, {"restore"}, "body")
    out = dict(await machines.verify_snapshot(_ref(request)))
    if field(body, "restore", bool, False):
        out["restored"] = await machines.looks.check(_ref(request))
    return JSONResponse(out)


async def diff_snapshots(request: Request) -> Response:
    """GET /v1/snapshots/REF/diff?to=REF."""
    to = request.query_params.get("to", "")
    if not to:
        raise BadInput("to: the other snapshot is needed")
    return JSONResponse(await context_of(request).node.machines.looks.diff(_ref(request), to))


async def restore_snapshot(request: Request) -> Response:
    """POST /v1/snapshots/REF/restore."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"name", "disk", "env", "labels", "ports"}, "body")
    name, disk_only = field(body, "name", str, ""), field(body, "disk", bool, False)
    changes, key, machines = parse_changes(body), lasting(request, body), ctx.node.machines

    async def work() -> dict[str, Any]:
        made = await machines.acts.made(key)
        if made is not None:
            return {"machine": machine_json(made), "resume": None}
        row, report = await machines.restore(_ref(request), name=name, disk_only=disk_only, changes=changes, once=key)
        return {"machine": machine_json(row), "resume": resume_json(report)}

    return await with_progress(request, ctx.hub, lambda: once(request, body, work), 201)


ROUTES = [
    Route("/v1/machines/{ref}/snapshot", snapshot_machine, methods=["POST"]),
    Route("/v1/snapshots", list_snapshots, methods=["GET"]),
    Route("/v1/snapshots/tree", snapshot_tree, methods=["GET"]),
    Route("/v1/snapshots/prune", prune_snapshots, methods=["POST"]),
    Route("/v1/snapshots/{ref}", get_snapshot, methods=["GET"]),
    Route("/v1/snapshots/{ref}", delete_snapshot, methods=["DELETE"]),
    Route("/v1/snapshots/{ref}/tag", tag_snapshot, methods=["POST"]),
    Route("/v1/snapshots/{ref}/diff", diff_snapshots, methods=["GET"]),
    Route("/v1/snapshots/{ref}/verify", verify_snapshot, methods=["POST"]),
    Route("/v1/snapshots/{ref}/restore", restore_snapshot, methods=["POST"]),
    Route("/v1/snapshot-names/{ref}", untag_snapshot, methods=["DELETE"]),
]
