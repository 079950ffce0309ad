"""A session's blobs: bytes that an agent puts beside its log under their SHA-256, in pieces. The rules; pure.

A piece is a body of the body store, durable before the `blob` entry that names it. So a crash in between leaves garbage that the
sweep takes, never an entry without its bytes. Who may read a blob is who has its entry in his log: found by position in the
ranges that make up a session's log, never by the hash alone. A fork inherits what it inherits of the log, at no cost.

A blob is kept as long as a session that is not closed has it in its log, and `KEEP_S` longer; its entry stays for good. The
sweep notes that time in the row first and takes the row in a later round: a fork that was made meanwhile takes the note back
(`sql_blobs`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from blake3 import blake3

from recess.contextlog.contract import Draft, Piece
from recess.errors import BadInput, NotFound

KIND = "blob"
PIECE_BYTES_MAX = 4 << 20
PIECES_MAX = 8192
WORD_CHARS_MAX = 200
KEEP_S = 86_400.0
LIST_MAX = 1000

_HASH = re.compile(r"[0-9a-f]{64}")


def draft(digest: str, size: int, pieces: Sequence[Piece], *, media_type: str, name: str) -> Draft:
    """Return the entry that names a blob. The same bytes under the same name are one entry, whoever puts them again."""
    body = {"hash": digest, "size": size, "media_type": media_type, "name": name}
    key = "blob/" + blake3(msgspec.json.encode([digest, media_type, name])).hexdigest(length=16)
    return Draft(KIND, body, key=key, pieces=tuple(pieces))


def check(kind: str, body: Mapping[str, Any], pieces: Sequence[Piece]) -> None:
    """Raise BadInput unless a draft's body and pieces belong together; a draft of another kind has none."""
    if kind != KIND:
        if pieces:
            raise BadInput(f"{kind!r}: only a blob has pieces")
        return
    digest, size = body.get("hash"), body.get("size")
    if not isinstance(digest, str) or not _HASH.fullmatch(digest):
        raise BadInput("blob: hash must be a SHA-256 in hex")
    if len(pieces) > PIECES_MAX or size != sum(one.size for one in pieces):
        raise BadInput("blob: size must be the sum of its pieces")
    for name in ("media_type", "name"):
        check_word(body.get(name), name)


def check_word(value: object, what: str) -> str:
    """Return a media type or a name of a blob: a short line of text. Raises BadInput."""
    if not isinstance(value, str) or len(value) > WORD_CHARS_MAX or not (value.isprintable() or not value):
        raise BadInput(f"blob: {what} must be a line of at most {WORD_CHARS_MAX} printable characters")
    return value


def gone(session: str, digest: str) -> NotFound:
    """Return the error for a blob that this session's log does not name, or that was given back."""
    return NotFound(
        f"session {session} has no blob {digest[:64]}",
        hint="blobs go a day after the last session that has them was closed: recess session blobs",
        kind="blob",
        ref=digest[:64],
    )
