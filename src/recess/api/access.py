"""What a token with a scope reaches, between the guard and the application: the session it names is looked up and judged.

A session that is not there and one that is out of reach get the same answer. It must know nothing of what calls do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from recess.api.grants import PROJECT, Grant, need_of, reaches
from recess.api.guard import GRANT
from recess.contextlog.contract import SessionRow
from recess.errors import NotFound, Refused

FindSession = Callable[[str], Awaitable[SessionRow]]


def grant_of(request: HTTPConnection) -> Grant | None:
    """Return the grant a request came with, None for the server's own token (or socket)."""
    found = request.scope.get(GRANT)
    return found if isinstance(found, Grant) else None


def project_of(row: SessionRow) -> str:
    """Return the project a session belongs to, "" for none."""
    return str(row.labels.get(PROJECT, ""))


async def admit(grant: Grant, scope: Scope, find: FindSession) -> None:
    """Return if the request is within its grant. Raises Refused."""
    if scope["type"] != "http":
        raise Refused("this token opens no terminal")
    need = need_of(grant, str(scope["method"]), str(scope["path"]))
    if not need.ref:
        return
    try:
        row = await find(need.ref)
    except NotFound:
        row = None
    if row is None or not reaches(grant, row.id, project_of(row)):
        raise Refused("this token does not reach that session")


class Access:
    """ASGI wrapper: passes on what the grant of `scope` (see `recess.api.guard.GRANT`) covers, and everything that has none."""

    def __init__(self, app: ASGIApp, find: FindSession) -> None:
        self._app = app
        self._find = find

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; the guard turns what is raised into an answer."""
        grant = scope.get(GRANT)
        if isinstance(grant, Grant):
            await admit(grant, scope, self._find)
        await self._app(scope, receive, send)
