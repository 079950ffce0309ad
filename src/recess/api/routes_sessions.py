"""Agents and sessions over HTTP: deploy, start, messages (202 before any machine exists), log, fork. Following a session
is in `routes_sessions_events`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from recess.api.access import grant_of, project_of
from recess.api.context import context_of, once
from recess.api.grants import PROJECT, reaches
from recess.api.wire import field, read_json, reject_unknown, with_progress
from recess.contextlog.contract import SessionRow
from recess.errors import BadInput, Refused
from recess.sessions.ledger import as_of

PAGE_MAX = 1000


def session_json(row: SessionRow) -> dict[str, Any]:
    """Return a session as JSON; `machine` is its machine's id, "" before it has one."""
    return {**asdict(row), "machine": str(row.meta.get("machine", ""))}


def _ref(request: Request) -> str:
    return str(request.path_params["ref"])


async def deploy(request: Request) -> Response:
    """POST /v1/agents."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"name", "files", "config"}, "body")
    files = field(body, "files", dict, {})
    if not all(isinstance(v, str) for v in files.values()):
        raise BadInput("files: expected an object of path to text")
    version = await ctx.node.sessions.deploy(field(body, "name", str, ""), files, field(body, "config", dict, {}))
    return JSONResponse({"name": version.agent, **asdict(version)}, status_code=201)


async def list_agents(request: Request) -> Response:
    """GET /v1/agents."""
    versions = await context_of(request).node.catalog.agents.list_current()
    return JSONResponse({"agents": [{"name": v.agent, **asdict(v)} for v in versions]})


async def start(request: Request) -> Response:
    """POST /v1/sessions."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"agent", "name", "labels", "eager"}, "body")
    labels = {str(k): str(v) for k, v in field(body, "labels", dict, {}).items()}
    labels = _of_project(request, labels)
    agent, name, eager = field(body, "agent", str, ""), field(body, "name", str, ""), field(body, "eager", bool, True)

    async def work() -> dict[str, Any]:
        return session_json(await ctx.node.sessions.start(agent, name=name, labels=labels, eager=eager))

    asked = {**body, "labels": labels}
    return await with_progress(request, ctx.hub, lambda: once(request, asked, work), 201)


def _of_project(request: Request, labels: dict[str, str]) -> dict[str, str]:
    """A session that a project's token makes belongs to the project, and calls nobody: where to is the operator's choice."""
    grant = grant_of(request)
    if grant is None:
        return labels
    if "callback" in labels:
        raise Refused("a callback is set by the server's own token")
    return {**labels, PROJECT: grant.project}


async def list_sessions(request: Request) -> Response:
    """GET /v1/sessions."""
    everything = request.query_params.get("all") in ("1", "true")
    rows = await context_of(request).node.sessions.list_sessions(everything=everything)
    grant = grant_of(request)
    if grant is not None:
        rows = [row for row in rows if reaches(grant, row.id, project_of(row))]
    return JSONResponse({"sessions": [session_json(r) for r in rows]})


async def get_session(request: Request) -> Response:
    """GET /v1/sessions/REF."""
    return JSONResponse(session_json(await context_of(request).node.sessions.get(_ref(request))))


async def send(request: Request) -> Response:
    """POST /v1/sessions/REF/messages: durable when answered, before any machine exists."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"text", "mode", "contract"}, "body")
    text = field(body, "text", str, None)
    if not text:
        raise BadInput("text: a message needs one")
    appended = await ctx.node.sessions.send(
        _ref(request), text, key=request.headers.get("idempotency-key", ""), mode=field(body, "mode", str, "queue"),
        contract=field(body, "contract", int, 0),
    )  # fmt: skip
    return JSONResponse(asdict(appended), status_code=202)


async def cancel(request: Request) -> Response:
    """POST /v1/sessions/REF/cancel: stop the turn at work; durable when answered."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"reason", "turn"}, "body")
    appended = await ctx.node.sessions.cancel(
        _ref(request), reason=field(body, "reason", str, ""), turn=field(body, "turn", int, None),
        key=request.headers.get("idempotency-key", ""),
    )  # fmt: skip
    return JSONResponse(asdict(appended), status_code=202)


async def questions(request: Request) -> Response:
    """GET /v1/sessions/REF/questions: what waits for a human."""
    found = await context_of(request).node.sessions.questions(_ref(request))
    return JSONResponse({"questions": [{**asdict(one), "body": dict(one.body)} for one in found]})


async def answer(request: Request) -> Response:
    """POST /v1/sessions/REF/answers: the first answer stands; durable when answered."""
    body = await read_json(request)
    reject_unknown(body, {"question", "text"}, "body")
    question, text = field(body, "question", str, ""), field(body, "text", str, None)
    if not question or text is None:
        raise BadInput("question and text are needed", hint="open ones: GET /v1/sessions/REF/questions")
    appended = await context_of(request).node.sessions.answer(_ref(request), question, text)
    return JSONResponse(asdict(appended), status_code=202)


def _number(request: Request, name: str, default: int) -> int:
    try:
        value = int(request.query_params.get(name, default))
    except ValueError as exc:
        raise BadInput(f"{name}: a number is needed") from exc
    if value < 0:
        raise BadInput(f"{name}: not below 0")
    return value


async def read_log(request: Request) -> Response:
    """GET /v1/sessions/REF/log."""
    sessions = context_of(request).node.sessions
    limit = min(_number(request, "limit", PAGE_MAX), PAGE_MAX)
    entries = await sessions.read(_ref(request), after=_number(request, "after", 0), limit=limit)
    row = await sessions.get(_ref(request))
    return JSONResponse({"entries": [asdict(e) for e in entries], "head": row.head})


async def snapshots(request: Request) -> Response:
    """GET /v1/sessions/REF/snapshots: oldest first, with the turn each is of and what it cost."""
    found = await context_of(request).node.sessions.snapshots(_ref(request))
    cost = {"new_bytes": sum(k.new_bytes for k in found), "standstill_s": sum(k.standstill_s for k in found)}
    return JSONResponse({"snapshots": [asdict(one) for one in found], "cost": cost})


async def cost(request: Request) -> Response:
    """GET /v1/sessions/REF/cost: what it has stored, moved and computed, and the hours in which no machine was held for it."""
    found = await context_of(request).node.sessions.cost(_ref(request))
    return JSONResponse({**asdict(found), "machine_hours_saved": found.machine_hours_saved})


async def diff(request: Request) -> Response:
    """GET /v1/sessions/REF/diff?from=TURN&to=TURN: what changed in the machine between the ends of two turns."""
    node = context_of(request).node
    found = await node.sessions.snapshots(_ref(request))
    left, right = (as_of(found, _number(request, name, -1)) for name in ("from", "to"))
    changes = await node.machines.looks.diff(left.snapshot, right.snapshot)
    return JSONResponse({**changes, "from": asdict(left), "to": asdict(right)})


async def act_on_session(request: Request) -> Response:
    """POST /v1/sessions/REF/{suspend,resume,close}."""
    sessions, verb = context_of(request).node.sessions, request.path_params["verb"]
    acts = {"suspend": sessions.suspend, "resume": sessions.resume, "close": sessions.close}
    if verb not in acts:
        raise BadInput(f"no such act on a session: {verb!r}", hint=f"one of {', '.join(acts)}")
    return JSONResponse(session_json(await acts[verb](_ref(request))))


async def take(request: Request) -> Response:
    """POST /v1/sessions/REF/take: a human takes the session over; answered when no turn is open."""
    body = await read_json(request)
    reject_unknown(body, {"why"}, "body")
    return JSONResponse(
        session_json(await context_of(request).node.sessions.take(_ref(request), why=field(body, "why", str, "")))
    )


async def hand_back(request: Request) -> Response:
    """POST /v1/sessions/REF/hand-back: the agent goes on, with `text` as a message to it."""
    body = await read_json(request)
    reject_unknown(body, {"text"}, "body")
    row = await context_of(request).node.sessions.hand_back(
        _ref(request), text=field(body, "text", str, ""), key=request.headers.get("idempotency-key", "")
    )
    return JSONResponse(session_json(row))


async def fork(request: Request) -> Response:
    """POST /v1/sessions/REF/fork."""
    ctx, body = context_of(request), await read_json(request)
    reject_unknown(body, {"at", "name", "eager"}, "body")

    async def work() -> dict[str, Any]:
        child = await ctx.node.sessions.fork(
            _ref(request), at=field(body, "at", int, None), name=field(body, "name", str, ""),
            eager=field(body, "eager", bool, False),
        )  # fmt: skip
        return session_json(child)

    return JSONResponse(await once(request, body, work), status_code=201)


async def rewind(request: Request) -> Response:
    """POST /v1/sessions/REF/rewind."""
    body = await read_json(request)
    reject_unknown(body, {"to"}, "body")
    to = field(body, "to", int, None)
    if to is None:
        raise BadInput("to: a log position is needed")
    return JSONResponse(session_json(await context_of(request).node.sessions.rewind(_ref(request), to=to)))


ROUTES = [
    Route("/v1/agents", deploy, methods=["POST"]),
    Route("/v1/agents", list_agents, methods=["GET"]),
    Route("/v1/sessions", start, methods=["POST"]),
    Route("/v1/sessions", list_sessions, methods=["GET"]),
    Route("/v1/sessions/{ref}", get_session, methods=["GET"]),
    Route("/v1/sessions/{ref}/messages", send, methods=["POST"]),
    Route("/v1/sessions/{ref}/cancel", cancel, methods=["POST"]),
    Route("/v1/sessions/{ref}/questions", questions, methods=["GET"]),
    Route("/v1/sessions/{ref}/answers", answer, methods=["POST"]),
    Route("/v1/sessions/{ref}/log", read_log, methods=["GET"]),
    Route("/v1/sessions/{ref}/snapshots", snapshots, methods=["GET"]),
    Route("/v1/sessions/{ref}/cost", cost, methods=["GET"]),
    Route("/v1/sessions/{ref}/diff", diff, methods=["GET"]),
    Route("/v1/sessions/{ref}/fork", fork, methods=["POST"]),
    Route("/v1/sessions/{ref}/rewind", rewind, methods=["POST"]),
    Route("/v1/sessions/{ref}/take", take, methods=["POST"]),
    Route("/v1/sessions/{ref}/hand-back", hand_back, methods=["POST"]),
    Route("/v1/sessions/{ref}/{verb}", act_on_session, methods=["POST"]),
]
