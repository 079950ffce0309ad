"""Machines over HTTP. Table of calls: docs/internals/http-api.md."""

from __future__ import annotations

from collections.abc import Mapping
from signal import SIGKILL
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from recess.api.context import context_of, lasting, once
from recess.api.imagespec import with_image
from recess.api.routes_acts import signal_number
from recess.api.routes_egress import check_secrets
from recess.api.wire import (
    field,
    machine_json,
    number_of,
    parse_spec,
    read_json,
    reject_unknown,
    resume_json,
    snapshot_json,
    with_progress,
)
from recess.errors import BadInput
from recess.images import BASE_IMAGE
from recess.machines.ladder import RUNGS
from recess.machines.loglines import Wanted
from recess.machines.outputlog import pack_said
from recess.node import everywhere


def _ref(request: Request) -> str:
    return str(request.path_params["ref"])


async def list_machines(request: Request) -> Response:
    """GET /v1/machines."""
    everything = request.query_params.get("all") in ("1", "true")
    rows = await everywhere.list_machines(context_of(request).node, everything=everything)
    return JSONResponse({"machines": [machine_json(r) for r in rows]})


async def create_machine(request: Request) -> Response:
    """POST /v1/machines."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"name", "spec", "start", "shell", "pull"}, "body")
    pull = field(body, "pull", str, "never")
    asked, name = field(body, "spec", dict, {}), field(body, "name", str, "")
    shell = [str(word) for word in field(body, "shell", list, [])]
    machines, key = ctx.node.machines, lasting(request, body)

    async def work() -> dict[str, Any]:
        made = await machines.acts.made(key)
        if made is not None:
            return machine_json(made)
        image = field(asked, "image", str, BASE_IMAGE)
        await ctx.node.images.ensure(image, pull)
        config = await ctx.node.images.config(image)
        spec = parse_spec(with_image(asked, config, shell))
        await check_secrets(ctx, spec)
        if not field(body, "start", bool, True):
            return machine_json(await machines.acts.prepare(spec, name=name, once=key))
        return machine_json(await machines.create(spec, name=name, once=key))

    return await with_progress(request, ctx.hub, lambda: once(request, body, work), 201)


async def get_machine(request: Request) -> Response:
    """GET /v1/machines/REF."""
    node = context_of(request).node
    machines = node.machines
    row = await everywhere.get_machine(node, _ref(request))
    out = machine_json(row)
    if everywhere.plain_of(node, row.id) is not None:
        return JSONResponse(out)
    if node.info()["capabilities"]["own_kernel"]:
        out["kernel"] = await node.images.kernel(row.meta)
    if row.state == "running":
        out["stats"] = await machines.stats(row.id)
    return JSONResponse(out)


async def delete_machine(request: Request) -> Response:
    """DELETE /v1/machines/REF: 204, or 200 with the folder that stays of a machine whose row was damaged."""
    force = request.query_params.get("force") == "1"
    left = await everywhere.remove(context_of(request).node, _ref(request), force=force)
    return JSONResponse({"left": left}) if left else Response(status_code=204)


async def act_on_machine(request: Request) -> Response:
    """POST /v1/machines/REF/{stop,kill,pause,unpause}: the machine afterwards. `kill` takes `signal`, for the main process."""
    machines, ref, verb = context_of(request).node.machines, _ref(request), request.path_params["verb"]
    body = await read_json(request)
    plain = await everywhere.act_on_plain(context_of(request).node, ref, verb)
    if plain is not None:
        return JSONResponse(machine_json(plain))
    row = await machines.get(ref)
    if verb == "stop":
        await machines.stop(row.id, timeout_s=field(body, "timeout_s", float, 10.0))
    elif verb == "kill":
        number = signal_number(body.get("signal") or SIGKILL)
        if number == SIGKILL:
            await machines.kill(row.id, why="killed by the user")
        else:
            await machines.acts.signal(row.id, number)
    elif verb == "pause":
        await machines.pause(row.id)
    elif verb == "unpause":
        await machines.unpause(row.id)
    else:
        raise BadInput(f"no such act on a machine: {verb!r}")
    if row.spec.remove_on_exit and verb in ("stop", "kill"):
        return JSONResponse(machine_json(row))
    return JSONResponse(machine_json(await machines.get(row.id)))


async def machine_of_token(request: Request) -> Response:
    """POST /v1/machine-tokens: the machine that runs with this token; 403 for any other."""
    body = await read_json(request)
    reject_unknown(body, {"token"}, "body")
    row = await context_of(request).node.machines.acts.whose(field(body, "token", str, ""))
    told = {"machine": row.id, "name": row.name, "session": row.session, "labels": dict(row.spec.labels)}
    return JSONResponse({**told, "epoch": row.meta.get("epoch", 0)})


async def suspend_machine(request: Request) -> Response:
    """POST /v1/machines/REF/suspend."""
    return JSONResponse(snapshot_json(await context_of(request).node.machines.suspend(_ref(request))))


async def resume_machine(request: Request) -> Response:
    """POST /v1/machines/REF/resume: by the best rung that works; `disk`: cold, from its newest disk."""
    body = await read_json(request)
    reject_unknown(body, {"disk"}, "body")
    rungs = (4,) if field(body, "disk", bool, False) else RUNGS
    return JSONResponse(resume_json(await context_of(request).node.machines.bring_back(_ref(request), rungs=rungs)))


async def fork_machine(request: Request) -> Response:
    """POST /v1/machines/REF/fork."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"count", "names"}, "body")
    count, names = field(body, "count", int, 1), field(body, "names", list, [])
    if not 1 <= count <= 64:
        raise BadInput(f"count: from 1 to 64, got {count}")

    async def work() -> dict[str, Any]:
        rows = await ctx.node.machines.fork(_ref(request), count, names=[str(n) for n in names])
        return {"machines": [machine_json(r) for r in rows]}

    return JSONResponse(await once(request, body, work), status_code=201)


async def machine_logs(request: Request) -> Response:
    """GET /v1/machines/REF/logs?since=&until=&tail=&timestamps=1: `framed=1` tells the streams apart, and how much of the
    process's output it is."""
    query = request.query_params
    wanted = Wanted(
        since_ns=_moment(query, "since"), until_ns=_moment(query, "until"), timestamps=query.get("timestamps") == "1",
        tail=number_of(query["tail"], "tail") if "tail" in query else None,
    )  # fmt: skip
    said = await everywhere.output_of(context_of(request).node, _ref(request), wanted)
    data = pack_said(said) if query.get("framed") == "1" else said.data
    return Response(data, media_type="application/octet-stream")


def _moment(query: Mapping[str, str], name: str) -> int | None:
    """A wall time in seconds since the epoch, as ns."""
    if name not in query:
        return None
    try:
        return round(float(query[name]) * 1e9)
    except (ValueError, OverflowError) as exc:
        raise BadInput(f"{name}: seconds since 1970 are needed") from exc


ROUTES = [
    Route("/v1/machine-tokens", machine_of_token, methods=["POST"]),
    Route("/v1/machines", list_machines, methods=["GET"]),
    Route("/v1/machines", create_machine, methods=["POST"]),
    Route("/v1/machines/{ref}", get_machine, methods=["GET"]),
    Route("/v1/machines/{ref}", delete_machine, methods=["DELETE"]),
    Route("/v1/machines/{ref}/suspend", suspend_machine, methods=["POST"]),
    Route("/v1/machines/{ref}/resume", resume_machine, methods=["POST"]),
    Route("/v1/machines/{ref}/fork", fork_machine, methods=["POST"]),
    Route("/v1/machines/{ref}/logs", machine_logs, methods=["GET"]),
    Route("/v1/machines/{ref}/{verb}", act_on_machine, methods=["POST"]),
]
