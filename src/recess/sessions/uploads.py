"""Blobs that an agent puts and gets through its session's socket, a piece at a time.

The host sees every byte and makes the hash itself: a session names what it has had in its own hands, never what it merely knows a
hash of. What was sent of a blob that is not whole is kept in this process alone. After a restart of the server, or a move, the agent is
told to begin again; the pieces that are stored already are found by their hashes, and the entry by its key. So a crash
anywhere leaves pieces that the log's sweep takes after a day, or the blob whole.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recess.contextlog import blobs
from recess.contextlog.contract import ContextLog, Draft, Piece
from recess.crashpoints import crash_point
from recess.errors import BadInput, OutOfSpace
from recess.sessions.limits import Limits
from recess.sessions.protocol import Request
from recess.units import format_bytes

UPLOADS_MAX = 4  # of one agent at once; of a fifth the one that was begun first is forgotten
AGAIN = {"again": True}


@dataclass
class Upload:
    """What came of one blob: `mark` tells a piece that is sent once more from another one."""

    digest: Any = field(default_factory=hashlib.sha256)
    size: int = 0
    pieces: list[Piece] = field(default_factory=list)
    mark: bytes = b""


@dataclass(frozen=True)
class Whole:
    """A blob that is stored and not yet named: what its entry says."""

    draft: Draft
    answer: Mapping[str, Any]


class Uploads:
    """The blobs of one session that are on their way in."""

    def __init__(self, log: ContextLog, session: str) -> None:
        self._log = log
        self._session = session
        self._open: dict[str, Upload] = {}

    async def put(self, request: Request, limits: Limits) -> Whole | Mapping[str, Any]:
        """Take a piece; return what to answer, or the whole blob after its last one. Raises BadInput, OutOfSpace (a limit)."""
        data, n = _decoded(request), request.n
        if n == 0 and request.token not in self._open:
            self._open[request.token] = Upload()
            while len(self._open) > UPLOADS_MAX:
                del self._open[next(iter(self._open))]
        one, mark = self._open.get(request.token), hashlib.sha256(data).digest()
        if one is None or not (n == len(one.pieces) or (n == len(one.pieces) - 1 and mark == one.mark)):
            self._open.pop(request.token, None)
            return AGAIN
        if n == len(one.pieces):
            await self._check_room(one.size + len(data), limits)
            piece = await self._log.put_piece(data)
            crash_point("blob.after_piece")
            one.digest.update(data)
            one.size, one.mark = one.size + len(data), mark
            one.pieces.append(piece)
        if not request.last:
            return {}
        digest = one.digest.hexdigest()
        facts = {"media_type": str(request.body["media_type"]), "name": str(request.body["name"])}
        draft = blobs.draft(digest, one.size, one.pieces, **facts)
        return Whole(draft, {"hash": digest, "size": one.size, **facts})

    def ended(self, token: str) -> None:
        """Forget an upload whose entry is written."""
        self._open.pop(token, None)

    async def get(self, request: Request) -> dict[str, Any]:
        """Return a piece of a blob that the session's log names. Raises NotFound, BadInput (no such piece)."""
        found = await self._log.find_blobs(self._session, request.ref)
        if not found:
            raise blobs.gone(self._session, request.ref)
        one = found[0]
        if not 0 <= request.n < max(1, len(one.pieces)):
            raise BadInput(f"blob {one.hash}: it has {len(one.pieces)} pieces, no number {request.n}")
        data = await self._log.get_piece(one.pieces[request.n]) if one.pieces else b""
        facts = {"size": one.size, "pieces": len(one.pieces), "media_type": one.media_type, "name": one.name}
        return {**facts, "data": base64.b64encode(data).decode()}

    async def _check_room(self, size: int, limits: Limits) -> None:
        if size > limits.blob_bytes:
            raise OutOfSpace(f"a blob of more than {format_bytes(limits.blob_bytes)} (limits: blob)")
        held = await self._log.blob_bytes(self._session)
        if held + size > limits.blobs_bytes:
            raise OutOfSpace(
                f"the session holds {format_bytes(held)} of blobs, and more than {format_bytes(limits.blobs_bytes)} with this "
                "one (limits: blobs)"
            )


def _decoded(request: Request) -> bytes:
    try:
        data = base64.b64decode(str(request.body["data"]), validate=True)
    except ValueError as exc:
        raise BadInput(f"put: the data is not base64: {exc}") from exc
    if len(data) > blobs.PIECE_BYTES_MAX or (not data and not request.last):
        raise BadInput(f"put: a piece has 1 to {blobs.PIECE_BYTES_MAX} bytes, not {len(data)}")
    return data
