"""JSON shapes of the API: records to JSON, JSON to specs, errors to problem+json, progress to lines.

Pure translation; validation errors are BadInput naming the field.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from recess.errors import BadInput, RecessError
from recess.machines.service import Changes, MachineRow, MachineSpec, Mount, Port, ResumeReport, SnapshotRow
from recess.units import MIB, parse_duration, parse_size

log = logging.getLogger(__name__)

BODY_BYTES_MAX = 16 * MIB
NUMBER_MAX = 1 << 53  # what every JSON parser carries exactly, and every column holds
NDJSON = "application/x-ndjson"


def problem(error: RecessError) -> JSONResponse:
    """Return an error as problem+json."""
    body = {"title": type(error).__name__, "status": error.http_status, **error.to_dict()}
    return JSONResponse(body, status_code=error.http_status, media_type="application/problem+json")


async def read_json(request: Request) -> dict[str, Any]:
    """Return the body as an object; empty means {}. Raises BadInput."""
    raw = await read_body(request, BODY_BYTES_MAX)
    if not raw:
        return {}
    return parse_object(raw, "the body")


def parse_object(raw: bytes | str, what: str) -> dict[str, Any]:
    """Return a JSON object. Strict: no NaN, no half of a surrogate pair (no database takes either), no bottomless nesting.
    Raises BadInput."""
    try:
        data = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise BadInput(f"{what} is not JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise BadInput(f"{what} must be a JSON object")
    return data


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body's bytes, at most `limit`; raises BadInput beyond it."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limit:
            raise BadInput(f"the body is larger than {limit} bytes")
    return bytes(data)


def field(data: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """Return a typed field of a body; null is as good as absent. Raises BadInput naming it."""
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, int) and abs(value) > NUMBER_MAX:
        raise BadInput(f"{name}: a number of that size means nothing here")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadInput(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def number_of(text: str, name: str) -> int:
    """Return a number of a query, 0 or more. Raises BadInput naming it."""
    if not (text.isascii() and text.isdigit()) or int(text) > NUMBER_MAX:
        raise BadInput(f"{name}: a number is needed")
    return int(text)


def reject_unknown(data: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise BadInput for the first key nobody knows: a typo must not be silently ignored."""
    unknown = sorted(set(data) - known)
    if unknown:
        raise BadInput(f"{where}: unknown field {unknown[0]!r}", hint=f"known fields: {', '.join(sorted(known))}")


def _str_map(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        raise BadInput(f"spec.{name}: expected an object of strings")
    return dict(value)


def _str_tuple(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise BadInput(f"spec.{name}: expected a list of strings")
    return tuple(value)


def _ports(value: Any) -> tuple[Port, ...]:
    out: list[Port] = []
    for item in value if isinstance(value, list) else [None]:
        if not isinstance(item, list | tuple) or len(item) != 3:
            raise BadInput("spec.ports: expected a list of [host_ip, host_port, guest_port]")
        ip, host, guest = item
        inner = (guest,) if not isinstance(guest, str) else ()
        if not isinstance(ip, str) or not all(type(p) is int and 0 <= p < 65536 for p in (host, *inner)):
            raise BadInput("spec.ports: a port is a number from 0 to 65535, or in the machine the path of a socket")
        out.append((ip, host, guest))
    return tuple(out)


def _sockets(value: Any) -> tuple[tuple[str, str], ...]:
    out = []
    for item in value if isinstance(value, list) else [None]:
        if not isinstance(item, list | tuple) or len(item) != 2 or not all(isinstance(path, str) for path in item):
            raise BadInput("spec.sockets: expected a list of [host_path, guest_path]")
        out.append((str(item[0]), str(item[1])))
    return tuple(out)


def _volumes(value: Any) -> tuple[Mount, ...]:
    out = []
    for item in value if isinstance(value, list) else [None]:
        if not isinstance(item, dict):
            raise BadInput("spec.volumes: expected a list of {source, target, readonly, size_bytes}")
        reject_unknown(item, {"source", "target", "readonly", "size_bytes"}, "spec.volumes")
        source, target = field(item, "source", str, ""), field(item, "target", str, "")
        size = parse_size(field(item, "size_bytes", str if isinstance(item.get("size_bytes"), str) else int, 1 << 30))
        if not source or not target:
            raise BadInput("spec.volumes: source and target are needed")
        out.append(Mount(source, target, field(item, "readonly", bool, False), size))
    return tuple(out)


def parse_spec(data: Mapping[str, Any]) -> MachineSpec:
    """Return a machine spec from JSON; sizes may be written "512M". Raises BadInput."""
    known = {f.name for f in fields(MachineSpec)}
    reject_unknown(data, known, "spec")
    out: dict[str, Any] = {}
    for name, value in data.items():
        if value is None:
            continue  # as good as absent
        if name in ("memory_bytes", "disk_bytes"):
            out[name] = parse_size(field(data, name, str if isinstance(value, str) else int, None))
        elif name in ("argv", "allow", "secrets"):
            out[name] = _str_tuple(value, name)
        elif name in ("env", "labels", "routes"):
            out[name] = _str_map(value, name)
        elif name == "ports":
            out[name] = _ports(value)
        elif name == "sockets":
            out[name] = _sockets(value)
        elif name == "idle_s":
            out[name] = parse_duration(field(data, name, str if isinstance(value, str) else float, None))
        elif name == "volumes":
            out[name] = _volumes(value)
        else:
            kind = {"cpus": int, "tty": bool, "stdin": bool, "remove_on_exit": bool}.get(name, str)
            out[name] = field(data, name, kind, None)
    return MachineSpec(**out)


def parse_changes(data: Mapping[str, Any]) -> Changes:
    """Return what a restore changes, from the body's env, labels and ports. Raises BadInput."""
    ports = data.get("ports")
    return Changes(
        env=_str_map(data.get("env") or {}, "env"), labels=_str_map(data.get("labels") or {}, "labels"),
        ports=None if ports is None else _ports(ports),
    )  # fmt: skip


def machine_json(row: MachineRow) -> dict[str, Any]:
    """Return a machine as JSON."""
    return asdict(row)


def snapshot_json(row: SnapshotRow) -> dict[str, Any]:
    """Return a snapshot as JSON."""
    return asdict(row)


def resume_json(report: ResumeReport) -> dict[str, Any]:
    """Return a resume report as JSON."""
    return asdict(report)


class ProgressHub:
    """Lines of progress from below (a template being made, packages unpacked), fanned out to waiting requests."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[str]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def publish(self, line: str) -> None:
        """Give a line to everybody who listens; may be called from any thread."""
        if self._loop is not None and self._loop.is_running():
            self._loop.call_soon_threadsafe(self._fan_out, line)

    def _fan_out(self, line: str) -> None:
        for queue in self._queues:
            if queue.qsize() < 1000:
                queue.put_nowait(line)

    def subscribe(self) -> asyncio.Queue[str]:
        """Return a queue that gets every line from now on."""
        self._loop = asyncio.get_running_loop()
        queue: asyncio.Queue[str] = asyncio.Queue()
        self._queues.add(queue)
        return queue

    def unsubscribe(self, queue: asyncio.Queue[str]) -> None:
        """Stop a queue."""
        self._queues.discard(queue)


async def with_progress(
    request: Request, hub: ProgressHub, work: Callable[[], Awaitable[dict[str, Any]]], status: int
) -> Response:
    """Run `work`; answer plain JSON, or lines of progress and then the result when the client asked for them.

    A client that goes away does not cancel the work: creation is finished and stays visible.
    """
    if NDJSON not in request.headers.get("accept", ""):
        return JSONResponse(await work(), status_code=status)
    return StreamingResponse(_progress_lines(hub, work), status_code=status, media_type=NDJSON)


async def _progress_lines(hub: ProgressHub, work: Callable[[], Awaitable[dict[str, Any]]]) -> AsyncIterator[str]:
    queue = hub.subscribe()
    task = asyncio.ensure_future(work())
    try:
        while not task.done() or not queue.empty():
            getter = asyncio.ensure_future(queue.get())
            await asyncio.wait({task, getter}, return_when=asyncio.FIRST_COMPLETED)
            if getter.done():
                yield json.dumps({"progress": getter.result()}) + "\n"
            else:
                getter.cancel()
        try:
            yield json.dumps({"result": await task}) + "\n"
        except RecessError as error:
            yield json.dumps({"error": error.to_dict()}) + "\n"
        except Exception as exc:  # a defect of ours: the client gets one line, the log has the trace
            log.exception("a call failed after it had begun to answer")
            defect = RecessError(f"the server failed: {type(exc).__name__}: {exc}", hint="the trace is in server.log")
            yield json.dumps({"error": defect.to_dict()}) + "\n"
    finally:
        hub.unsubscribe(queue)
