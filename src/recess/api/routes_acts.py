"""Docker's everyday acts on machines over HTTP: start, wait, rename, rewind, processes, and the stream of events."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from recess.api.context import context_of
from recess.api.wire import (
    field,
    machine_json,
    number_of,
    read_json,
    reject_unknown,
    resume_json,
    snapshot_json,
    with_progress,
)
from recess.errors import BadInput

WAIT_S_MAX = 60.0
SIGNAL_MAX = 64


def _ref(request: Request) -> str:
    return str(request.path_params["ref"])


async def start_machine(request: Request) -> Response:
    """POST /v1/machines/REF/start: `resume` is null for one that runs already or was started for the first time."""
    ctx = context_of(request)
    reject_unknown(await read_json(request), set(), "body")

    async def work() -> dict[str, Any]:
        report = await ctx.node.machines.acts.start(_ref(request))
        row = await ctx.node.machines.get(_ref(request))
        return {"machine": machine_json(row), "resume": resume_json(report) if report else None}

    return await with_progress(request, ctx.hub, work, 200)


async def wait_machine(request: Request) -> Response:
    """POST /v1/machines/REF/wait: the exit code, null when `timeout_s` (at most 60) have passed."""
    body = await read_json(request)
    reject_unknown(body, {"timeout_s"}, "body")
    limit = min(field(body, "timeout_s", float, WAIT_S_MAX), WAIT_S_MAX)
    try:
        async with asyncio.timeout(max(0.0, limit)):
            code: int | None = await context_of(request).node.machines.acts.wait(_ref(request))
    except TimeoutError:
        code = None
    return JSONResponse({"exit_code": code})


async def rename_machine(request: Request) -> Response:
    """POST /v1/machines/REF/rename."""
    body = await read_json(request)
    reject_unknown(body, {"name"}, "body")
    row = await context_of(request).node.machines.acts.rename(_ref(request), field(body, "name", str, ""))
    return JSONResponse(machine_json(row))


async def rewind_machine(request: Request) -> Response:
    """POST /v1/machines/REF/rewind: `kept` is the snapshot of what it was before, null if it did not run."""
    body = await read_json(request)
    reject_unknown(body, {"to"}, "body")
    kept, report = await context_of(request).node.machines.acts.rewind(_ref(request), field(body, "to", str, ""))
    return JSONResponse({"kept": snapshot_json(kept) if kept else None, "resume": resume_json(report)})


async def machine_processes(request: Request) -> Response:
    """GET /v1/machines/REF/top."""
    found = await context_of(request).node.machines.processes(_ref(request))
    return JSONResponse({"processes": [asdict(one) for one in found]})


async def events(request: Request) -> Response:
    """GET /v1/events?after=N&wait=SECONDS: the newest events after number N (`now`: only what comes), by long poll."""
    told, after = context_of(request).node.machines.events, request.query_params.get("after", "0")
    number = told.newest if after == "now" else number_of(after, "after")
    limit = min(float(number_of(request.query_params.get("wait", "25"), "wait")), WAIT_S_MAX)
    try:
        async with asyncio.timeout(limit):
            found = await told.wait(number)
    except TimeoutError:
        found = ()
    return JSONResponse({"events": [asdict(one) for one in found], "next": found[-1].number if found else number})


async def disk_usage(request: Request) -> Response:
    """GET /v1/df."""
    return JSONResponse(await context_of(request).node.usage())


async def empty_caches(request: Request) -> Response:
    """POST /v1/caches/prune."""
    return JSONResponse(await context_of(request).node.empty_caches())


def signal_number(value: Any) -> int:
    """Return the signal that a number, "KILL" or "SIGKILL" names. Raises BadInput."""
    text = str(value).upper()
    if text.isdigit() and 1 <= int(text) <= SIGNAL_MAX:
        return int(text)
    try:
        return int(signal.Signals[text if text.startswith("SIG") else f"SIG{text}"])
    except KeyError as exc:
        raise BadInput(f"signal: unknown signal {str(value)[:40]!r}") from exc


ROUTES = [
    Route("/v1/df", disk_usage, methods=["GET"]),
    Route("/v1/caches/prune", empty_caches, methods=["POST"]),
    Route("/v1/events", events, methods=["GET"]),
    Route("/v1/machines/{ref}/start", start_machine, methods=["POST"]),
    Route("/v1/machines/{ref}/wait", wait_machine, methods=["POST"]),
    Route("/v1/machines/{ref}/rename", rename_machine, methods=["POST"]),
    Route("/v1/machines/{ref}/rewind", rewind_machine, methods=["POST"]),
    Route("/v1/machines/{ref}/top", machine_processes, methods=["GET"]),
]
