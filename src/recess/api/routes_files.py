"""Files and jobs of a machine over HTTP: read, write, list, stat, remove, make folders; the job table and signals.

Every path is the guest's; nothing here touches the host's file system. Table of calls: docs/internals/http-api.md.
"""

from __future__ import annotations

import contextlib
import io
import posixpath
import tarfile
from collections.abc import AsyncIterator
from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from recess.api.context import guest_of
from recess.api.wire import field, read_body, read_json, reject_unknown
from recess.errors import BadInput, IllegalState, RecessError
from recess.guestlink.link import FileStat, GuestLink
from recess.units import MIB

FILE_BYTES_MAX = 64 * MIB
LIST_MAX = 10_000  # entries of one answer, whatever the depth
DEPTH_MAX = 32
SIGNALS = range(1, 65)


def _path(request: Request) -> str:
    path = request.query_params.get("path", "")
    if not path.startswith("/"):
        raise BadInput("path: an absolute path in the machine is needed")
    return path


def _count(request: Request, name: str, default: int, most: int) -> int:
    try:
        value = int(request.query_params.get(name, default))
    except ValueError as exc:
        raise BadInput(f"{name}: a number is needed") from exc
    if not 1 <= value <= most:
        raise BadInput(f"{name}: from 1 to {most}")
    return value


async def read_file(request: Request) -> Response:
    """GET /v1/machines/REF/files."""
    async with guest_of(request, "files") as (_, link):
        data = await link.read_file(_path(request), FILE_BYTES_MAX)
    return Response(data, media_type="application/octet-stream")


async def write_file(request: Request) -> Response:
    """PUT /v1/machines/REF/files."""
    try:
        mode = int(request.query_params.get("mode", "644"), 8)
    except ValueError as exc:
        raise BadInput("mode: octal digits are needed") from exc
    data = await read_body(request, FILE_BYTES_MAX)
    async with guest_of(request, "files") as (_, link):
        await link.write_file(_path(request), data, mode)
    return Response(status_code=204)


async def remove_file(request: Request) -> Response:
    """DELETE /v1/machines/REF/files: a file or, with `recursive=1`, a folder; absent is no error."""
    async with guest_of(request, "files") as (_, link):
        await link.remove(_path(request), recursive=request.query_params.get("recursive") == "1")
    return Response(status_code=204)


async def stat_file(request: Request) -> Response:
    """GET /v1/machines/REF/files/stat."""
    async with guest_of(request, "files") as (_, link):
        return JSONResponse(asdict(await link.stat(_path(request))))


async def list_files(request: Request) -> Response:
    """GET /v1/machines/REF/files/list: what is in a folder, to `depth` (1), sorted by path; links are not followed."""
    depth, root = _count(request, "depth", 1, DEPTH_MAX), _path(request)
    found: list[FileStat] = []
    async with guest_of(request, "files") as (_, link):
        level = [root]
        for _ in range(depth):
            below = [entry for folder in level for entry in await _list_dir(link, folder, folder == root)]
            found += below
            level = [entry.path for entry in below if entry.kind == "dir"]
            if len(found) > LIST_MAX:
                raise BadInput(f"{root} holds more than {LIST_MAX} files", hint="list a folder further down")
    return JSONResponse({"entries": [asdict(one) for one in sorted(found, key=lambda one: one.path)]})


async def _list_dir(link: GuestLink, folder: str, asked_for: bool) -> list[FileStat]:
    """A folder below that went away while we walked is empty; the one that was asked for must be there."""
    try:
        return await link.list_dir(folder)
    except RecessError:
        if asked_for:
            raise
        return []


async def make_folder(request: Request) -> Response:
    """PUT /v1/machines/REF/folders: with its parents; one that is there is no error."""
    path = posixpath.normpath(_path(request)).lstrip("/")
    if path:
        async with guest_of(request, "files") as (_, link):
            await link.put_tar("/", _one_folder(path))
    return Response(status_code=204)


async def _one_folder(path: str) -> AsyncIterator[bytes]:
    """A tar archive with one folder: guestd unpacks it without a shell, so images that have none work too."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo(path)
        member.type, member.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(member)
    yield out.getvalue()


async def list_jobs(request: Request) -> Response:
    """GET /v1/machines/REF/jobs: the guest's job table, ended ones too while it keeps them."""
    async with guest_of(request, "jobs") as (_, link):
        return JSONResponse({"jobs": [asdict(one) for one in await link.jobs()]})


async def signal_job(request: Request) -> Response:
    """POST /v1/machines/REF/jobs/JOB/signal: `{"number"}` to the process group; 409 for one that has ended."""
    body = await read_json(request)
    reject_unknown(body, {"number"}, "body")
    number = field(body, "number", int, 15)
    if number not in SIGNALS:
        raise BadInput(f"number: a signal is 1 to {SIGNALS[-1]}")
    job_id = str(request.path_params["job"])
    async with guest_of(request, "jobs") as (_, link):
        if any(one.job_id == job_id and one.exit_code is not None for one in await link.jobs()):
            raise IllegalState(f"job {job_id} has ended")
        job = await link.attach(job_id)
        try:
            await job.signal(number)
        finally:
            with contextlib.suppress(RecessError):
                await job.detach()
    return Response(status_code=204)


ROUTES = [
    Route("/v1/machines/{ref}/files", read_file, methods=["GET"]),
    Route("/v1/machines/{ref}/files", write_file, methods=["PUT"]),
    Route("/v1/machines/{ref}/files", remove_file, methods=["DELETE"]),
    Route("/v1/machines/{ref}/files/stat", stat_file, methods=["GET"]),
    Route("/v1/machines/{ref}/files/list", list_files, methods=["GET"]),
    Route("/v1/machines/{ref}/folders", make_folder, methods=["PUT"]),
    Route("/v1/machines/{ref}/jobs", list_jobs, methods=["GET"]),
    Route("/v1/machines/{ref}/jobs/{job}/signal", signal_job, methods=["POST"]),
]
