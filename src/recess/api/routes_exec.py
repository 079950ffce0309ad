"""The exec WebSocket: one process of a machine, its streams both ways (message shapes: docs/internals/http-api.md).

A client that drops never ends the process: the job lives in the guest and can be attached again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from recess.api.context import context_of
from recess.api.wire import field, parse_object, reject_unknown
from recess.errors import BadInput, IllegalState, RecessError
from recess.guestlink.link import ExecRequest, GuestLink, Job
from recess.machines.service import MachineSpec
from recess.node.everywhere import reach

_FIELDS = {"argv", "env", "cwd", "user", "tty", "rows", "cols", "stdin", "detach", "label", "attach", "wake"}


async def exec_socket(ws: WebSocket) -> None:
    """WS /v1/machines/REF/exec."""
    await ws.accept()
    try:
        first = await _first(ws)
        reject_unknown(first, _FIELDS, "exec")
        node = context_of(ws).node
        ref, wake = str(ws.path_params["ref"]), field(first, "wake", bool, True)
        async with reach(node, ref, "exec", wake=wake) as (row, link):  # not frozen under an attached process
            job = await _open(link, first, row.spec)
            try:
                await ws.send_text(json.dumps({"job_id": job.job_id, "pid": job.pid}))
                if not first.get("detach"):
                    await _pump(ws, job)
            finally:
                with contextlib.suppress(RecessError):
                    await job.detach()
    except RecessError as error:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await ws.send_text(json.dumps({"error": error.to_dict()}))
    except WebSocketDisconnect:
        return
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):
        await ws.close()


async def _first(ws: WebSocket) -> dict[str, Any]:
    message = await ws.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1000))
    return parse_object(message.get("text") or "", "the first message")


async def _open(link: GuestLink, first: dict[str, Any], spec: MachineSpec) -> Job:
    if first.get("attach"):
        return await link.attach(field(first, "attach", str, ""))
    argv = field(first, "argv", list, [])
    if not argv or not all(isinstance(a, str) for a in argv):
        raise BadInput("argv: a non-empty list of strings is needed")
    user = field(first, "user", str, "") or spec.user
    request = ExecRequest(
        argv=argv,
        env={str(k): str(v) for k, v in field(first, "env", dict, {}).items()},
        cwd=field(first, "cwd", str, "") or (spec.cwd if user == spec.user else "/"),  # /root is root's alone
        user=user,
        tty=field(first, "tty", bool, False),
        rows=field(first, "rows", int, 24),
        cols=field(first, "cols", int, 80),
        stdin=field(first, "stdin", bool, False),
        label=field(first, "label", str, ""),
    )
    return await link.exec(request)


async def _pump(ws: WebSocket, job: Job) -> None:
    """Carry both ways until the process has ended (its end is what counts, whatever the client said meanwhile), or the
    client is gone or says something wrong: then the process is left alone."""
    reader = asyncio.ensure_future(_from_client(ws, job))
    writer = asyncio.ensure_future(_to_client(ws, job))
    try:
        await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        await (writer if writer.done() else reader)
    finally:
        for task in (reader, writer):
            task.cancel()
        await asyncio.gather(reader, writer, return_exceptions=True)


async def _to_client(ws: WebSocket, job: Job) -> None:
    async for stream, data in job.output():
        await ws.send_bytes(bytes([stream]) + data)
    await ws.send_text(json.dumps({"exit_code": await job.wait()}))


async def _from_client(ws: WebSocket, job: Job) -> None:
    while True:
        message = await ws.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        if message.get("bytes") is not None:
            await job.write(message["bytes"])
            continue
        with contextlib.suppress(IllegalState):  # it has ended meanwhile, which its exit code is about to tell
            await _act(job, parse_object(message.get("text") or "{}", "the message"))


async def _act(job: Job, data: dict[str, Any]) -> None:
    match data.get("op"):
        case "eof":
            await job.close_stdin()
        case "resize":
            await job.resize(field(data, "rows", int, 24), field(data, "cols", int, 80))
        case "signal":
            await job.signal(field(data, "number", int, 15))
        case other:
            raise BadInput(f"op: unknown {other!r}")


ROUTES = [WebSocketRoute("/v1/machines/{ref}/exec", exec_socket)]
