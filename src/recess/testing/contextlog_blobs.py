"""The part of the log's suite about blobs; see `contextlog_suite`."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from recess.contextlog import ContextLog, Draft, SessionRow
from recess.contextlog.blobs import draft
from recess.contextlog.contract import Blob, Piece
from recess.errors import BadInput, Corrupt, NotFound
from recess.testing.contextlog_bounds import FAR_S, owned


async def put(log: ContextLog, row: SessionRow, *parts: bytes, name: str = "plot.png") -> int:
    """Keep a blob of these pieces; return its entry's position."""
    pieces = [await log.put_piece(one) for one in parts]
    data = b"".join(parts)
    one = draft(hashlib.sha256(data).hexdigest(), len(data), pieces, media_type="image/png", name=name)
    return (await log.append(row.id, row.epoch, [one]))[0].position


async def read(log: ContextLog, blob: Blob) -> bytes:
    """Return a blob's bytes."""
    return b"".join([await log.get_piece(one) for one in blob.pieces])


class BlobsSuite:
    """Tests of `ContextLogSuite`."""

    async def test_a_blob_is_what_was_put_and_its_entry_names_no_piece(self, log: ContextLog) -> None:
        row = await owned(log)
        position = await put(log, row, b"one" * 9000, b"two", name="\u00e9.png")
        (found,) = await log.find_blobs(row.id)
        assert (found.session, found.position, found.size, found.name) == (row.id, position, 27_003, "\u00e9.png")
        assert await read(log, found) == b"one" * 9000 + b"two"
        (entry,) = await log.read(row.id)
        facts = {"hash": found.hash, "size": 27_003, "media_type": "image/png", "name": "\u00e9.png"}
        assert (entry.kind, dict(entry.body)) == ("blob", facts)
        assert await log.find_blobs(row.id, found.hash) == [found]
        assert await log.find_blobs(row.id, "0" * 64) == []
        assert await log.blob_bytes(row.id) == 27_003

    async def test_the_same_bytes_under_the_same_name_are_one_entry(self, log: ContextLog) -> None:
        row = await owned(log)
        first = await put(log, row, b"abc", b"def")
        assert await put(log, row, b"abcdef") == first  # cut in other pieces
        assert await put(log, row, b"abcdef", name="other") == first + 1
        assert [one.name for one in await log.find_blobs(row.id)] == ["other", "plot.png"]
        await put(log, row, name="empty")
        assert await read(log, (await log.find_blobs(row.id))[0]) == b""

    async def test_a_fork_has_those_of_before_it_and_nobody_else_any(self, log: ContextLog) -> None:
        row = await owned(log)
        await put(log, row, b"before")
        cut = (await log.get(row.id)).head
        child = await log.fork(row.id)
        await put(log, row, b"after")
        mine = await log.claim(child.id, "n", FAR_S, now=0.0)
        await put(log, mine, b"the child's")
        grandchild = await log.fork(child.id, at=cut + 1)
        other = await owned(log)
        of = {}
        for session in (row.id, child.id, grandchild.id, other.id):
            of[session] = [await read(log, one) for one in await log.find_blobs(session)]
        assert list(of.values()) == [
            [b"after", b"before"],
            [b"the child's", b"before"],
            [b"the child's", b"before"],
            [],
        ]
        known = (await log.find_blobs(row.id))[0].hash
        assert await log.find_blobs(child.id, known) == []
        assert await log.blob_bytes(child.id) == len(b"the child's")  # what it inherited is not its own

    async def test_a_blob_that_does_not_add_up_is_refused(self, log: ContextLog) -> None:
        row = await owned(log)
        piece = await log.put_piece(b"abc")
        good = draft("a" * 64, 3, [piece], media_type="", name="")
        bad: list[Draft] = [
            replace(good, body={**good.body, "size": 4}),
            replace(good, body={**good.body, "hash": "A" * 64}),
            replace(good, body={**good.body, "name": "two\nlines"}),
            replace(good, body={**good.body, "media_type": "x" * 201}),
            replace(good, pieces=()),
            replace(good, kind="note"),
        ]
        for one in bad:
            with pytest.raises(BadInput):
                await log.append(row.id, row.epoch, [one])
        assert await log.read(row.id) == []
        with pytest.raises(Corrupt):
            await log.get_piece(Piece("b" * 64, 3))
        with pytest.raises(NotFound):
            await log.find_blobs("ses_none")
