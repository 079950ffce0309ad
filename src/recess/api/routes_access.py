"""Tokens with a scope, and webhooks: how others get to speak to one session. Table of calls: docs/internals/http-api.md."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from recess.api import grants
from recess.api.context import context_of
from recess.api.wire import field, read_body, read_json, reject_unknown
from recess.errors import BadInput, IllegalState, NotFound, Refused
from recess.sessions import signing

HOOK_PREFIX = "/v1/hooks/"  # these calls are guarded by their signature, not by a token
BODY_BYTES_MAX = 1 << 20
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]{0,63}")


async def make_token(request: Request) -> Response:
    """POST /v1/tokens."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"session", "project", "rights", "ttl_s"}, "body")
    now, session = ctx.clock.wall_s(), field(body, "session", str, "")
    if session:
        session = (await ctx.node.sessions.get(session)).id
    grant = grants.Grant(
        rights=field(body, "rights", str, "read"), until=int(now + field(body, "ttl_s", float, grants.TTL_S)),
        session=session, project=field(body, "project", str, ""),
    )  # fmt: skip
    token = grants.make(ctx.key, grants.check(grant, now))
    return JSONResponse({"token": token, **asdict(grant)}, status_code=201)


async def make_hook(request: Request) -> Response:
    """POST /v1/sessions/REF/hooks: where a webhook goes and the secret it is signed with; the same each time."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"name"}, "body")
    name = field(body, "name", str, "")
    if not _NAME.fullmatch(name):
        raise BadInput("name: letters, digits, '_', '.', '-', at most 64")
    row = await ctx.node.sessions.get(str(request.path_params["ref"]))
    secret = signing.shown(signing.hook_key(ctx.key, row.id, name))
    return JSONResponse({"path": f"{HOOK_PREFIX}{row.id}/{name}", "secret": secret}, status_code=201)


async def callback_secret(request: Request) -> Response:
    """GET /v1/sessions/REF/callback: the secret that the session's callbacks are signed with."""
    ctx = context_of(request)
    row = await ctx.node.sessions.get(str(request.path_params["ref"]))
    return JSONResponse(
        {"url": str(row.labels.get("callback", "")), "secret": signing.shown(signing.callback_key(ctx.key, row.id))}
    )


async def take_hook(request: Request) -> Response:
    """POST /v1/hooks/SESSION/NAME: a signed webhook becomes a message. Durable when answered; the same id again is the same
    message, also years later. Who has no valid signature learns nothing of what sessions there are."""
    ctx = context_of(request)
    session, name = str(request.path_params["session"]), str(request.path_params["name"])
    raw = await read_body(request, BODY_BYTES_MAX)
    ident = signing.checked(
        signing.hook_key(ctx.key, session, name), dict(request.headers), raw, now=ctx.clock.wall_s()
    )
    text, more = _message(raw)
    try:
        row = await ctx.node.sessions.get(session)
        if row.id != session:
            raise Refused("webhooks go to a session's id")
        done = await ctx.node.sessions.send(session, text, key=f"hook:{name}:{ident}", body={"hook": name, **more})
    except (NotFound, IllegalState) as exc:
        raise NotFound(f"no session takes this webhook any more: {exc.message}") from exc
    return JSONResponse({"position": done.position, "replayed": done.replayed}, status_code=202)


def _message(raw: bytes) -> tuple[str, dict[str, Any]]:
    """Return what the agent reads: `text` of a JSON object that has one, else the body as it came; and the object."""
    try:
        data = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        data = None
    text = data.get("text") if isinstance(data, dict) else None
    if isinstance(text, str) and text:
        return text, {"payload": data}
    shown = raw.decode("utf-8", "replace").replace("\0", "\ufffd")
    return shown or "(an empty webhook)", {"payload": data} if isinstance(data, dict) else {}


ROUTES = [
    Route("/v1/tokens", make_token, methods=["POST"]),
    Route("/v1/sessions/{ref}/hooks", make_hook, methods=["POST"]),
    Route("/v1/sessions/{ref}/callback", callback_secret, methods=["GET"]),
    Route("/v1/hooks/{session}/{name}", take_hook, methods=["POST"]),
]
