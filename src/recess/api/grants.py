"""Tokens with a scope: what one may do is written in it and signed; nothing is stored. Pure.

    recess_BASE64(json {"session"|"project": NAME, "rights": "read"|"write", "until": Unix seconds}).BASE64(hmac)

One cannot be taken back alone, so each has an end (a day by default, 90 days at most); changing the server's token ends all.
What each right reaches is the table below: what is not in it needs the server's own token.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
from dataclasses import asdict, dataclass

from recess.errors import BadInput, Refused
from recess.sessions.signing import derived

MARK = "recess_"
RIGHTS = ("read", "write")
TTL_S = 86400.0
TTL_MOST_S = 90 * 86400.0
TOKEN_CHARS_MAX = 1024
NAME_CHARS_MAX = 200
PROJECT = "project"  # the label of a session that says which project it belongs to

_SESSION = re.compile(r"/v1/sessions/(?P<ref>[^/]+)(?P<rest>/.*)?")
_READ = frozenset({"", "/log", "/events", "/poll", "/questions", "/snapshots", "/cost", "/blobs"})
_BLOB = re.compile(r"/blobs/[0-9a-f]{64}")
_WRITE = frozenset({"/messages", "/answers", "/cancel"})
_MANAGE = frozenset({"/suspend", "/resume", "/close", "/take", "/hand-back"})  # a project's own


@dataclass(frozen=True)
class Grant:
    """What a token allows: one session or one project, to `rights`, `until` a wall time."""

    rights: str
    until: int
    session: str = ""
    project: str = ""


@dataclass(frozen=True)
class Need:
    """What a request touches: the session `ref`, or, with "", the list of sessions (of which a project sees its own)."""

    ref: str = ""


def make(root: bytes, grant: Grant) -> str:
    """Return the token of a grant."""
    text = _encoded(json.dumps(asdict(grant), separators=(",", ":")).encode())
    return f"{MARK}{text}.{_encoded(_seal(root, text))}"


def check(grant: Grant, now: float) -> Grant:
    """Return a grant that may be given. Raises BadInput."""
    if bool(grant.session) == bool(grant.project):
        raise BadInput("a token is for one session or for one project")
    if max(len(grant.session), len(grant.project)) > NAME_CHARS_MAX:
        raise BadInput(f"project: at most {NAME_CHARS_MAX} characters")
    if grant.rights not in RIGHTS:
        raise BadInput(f"rights must be one of {', '.join(RIGHTS)}, not {grant.rights[:40]!r}")
    if not 0 < grant.until - now <= TTL_MOST_S + 1:
        raise BadInput(f"ttl_s: more than 0 and at most {TTL_MOST_S:.0f}")
    return grant


def read(root: bytes, token: str, now: float) -> Grant:
    """Return what a token allows. Raises Refused: not ours, changed, or over."""
    text, _, seal = token.removeprefix(MARK).partition(".")
    if len(token) > TOKEN_CHARS_MAX or not token.startswith(MARK):
        raise Refused("this token is not one of this server's")
    try:
        fits = hmac.compare_digest(_decoded(seal), _seal(root, text))
        grant = Grant(**json.loads(_decoded(text))) if fits else None
    except (ValueError, TypeError) as exc:
        raise Refused("this token is not one of this server's") from exc
    if grant is None:
        raise Refused("this token is not one of this server's")
    if now >= grant.until:
        raise Refused("this token is over", hint="ask for a new one")
    return grant


def need_of(grant: Grant, method: str, path: str) -> Need:
    """Return what must be judged of a request once its session is known. Raises Refused for what no such token reaches."""
    if path == "/v1/sessions" and grant.project and (method == "GET" or (method == "POST" and grant.rights == "write")):
        return Need()
    match = _SESSION.fullmatch(path)
    rest = (match["rest"] or "") if match else ""
    reads = method in ("GET", "HEAD") and (rest in _READ or _BLOB.fullmatch(rest) is not None)
    writes = (
        method == "POST" and grant.rights == "write" and (rest in _WRITE or (bool(grant.project) and rest in _MANAGE))
    )
    if match is None or not (reads or writes):
        raise Refused(f"this token does not reach {method} {path[:200]}")
    return Need(match["ref"])


def reaches(grant: Grant, session: str, project: str) -> bool:
    """Tell whether a session of this id and project is within the grant."""
    return session == grant.session if grant.session else project == grant.project


def _seal(root: bytes, text: str) -> bytes:
    return hmac.digest(derived(root, "token"), text.encode(), "sha256")


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
