"""The log against a list: any sequence of appends, inbox messages, forks and readings, on both implementations."""

import asyncio
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from recess.contextlog import SCHEMA, Draft, MemoryBodies, MemoryLog, SqlLog
from recess.db import Database
from recess.errors import BadInput, KeyReused

FAR_S = 1e12
KEYS = st.sampled_from(["", "k1", "k2", "k3"])
VALUES = st.integers(0, 3)
WHICH = st.integers(0, 3)
OPS = st.one_of(
    st.tuples(st.just("append"), WHICH, st.lists(st.tuples(KEYS, VALUES), max_size=4)),
    st.tuples(st.just("inbox"), WHICH, KEYS, VALUES),
    st.tuples(st.just("fork"), WHICH, st.integers(-1, 12)),
    st.tuples(st.just("read"), WHICH, st.integers(-1, 12), st.integers(0, 12), st.integers(0, 5)),
    st.tuples(st.just("freeze"), WHICH, st.integers(0, 12)),
    st.tuples(st.just("claim"), WHICH),
)


class Model:
    """A session as a list of (kind, value); `keys` maps a key to (position, content)."""

    def __init__(self, entries=()):
        self.entries = list(entries)
        self.keys = {}

    def append(self, kind, items):
        """Return positions, or None if a key was reused; nothing changes then."""
        entries, keys, done = list(self.entries), dict(self.keys), []
        for key, value in items:
            content = (kind, value)
            if key and key in keys:
                position, old = keys[key]
                if old != content:
                    return None
                done.append(position)
                continue
            entries.append(content)
            if key:
                keys[key] = (len(entries), content)
            done.append(len(entries))
        self.entries, self.keys = entries, keys
        return done


async def play(log, ops):
    row = await log.create(agent="a", code_version="v")
    sessions = [(row.id, Model())]
    epochs = {}
    for op in ops:
        session, model = sessions[op[1] % len(sessions)]
        if session not in epochs:
            epochs[session] = (await log.claim(session, "n", FAR_S, now=0.0)).epoch
        match op:
            case ("append", _, items):
                drafts = [Draft("note", {"v": value}, key=key) for key, value in items]
                expected = model.append("note", items)
                try:
                    got = [a.position for a in await log.append(session, epochs[session], drafts)]
                except KeyReused:
                    got = None
                assert got == expected
            case ("inbox", _, key, value):
                expected = model.append("user", [(key, value)]) if key else "bad"
                try:
                    got = [(await log.append_inbox(session, Draft("user", {"v": value}, key=key))).position]
                except KeyReused:
                    got = None
                except BadInput:
                    got = "bad"
                assert got == expected
            case ("fork", _, at):
                try:
                    child = await log.fork(session, at=at)
                except BadInput:
                    assert not 0 <= at <= len(model.entries)
                    continue
                sessions.append((child.id, Model(model.entries[:at])))
            case ("read", _, after, to, limit):
                got = [(e.kind, e.body["v"]) for e in await log.read(session, after=after, to=to, limit=limit)]
                assert got == model.entries[max(after, 0) : to][:limit]
            case ("freeze", _, consumed):
                waiting = any(kind == "user" for kind, _ in model.entries[consumed:])
                done = await log.freeze(session, epochs[session], consumed=consumed, snapshot="s", position=-1)
                assert done == (not waiting)
                if done:
                    del epochs[session]
            case ("claim", _):
                epochs[session] = (await log.claim(session, "n", FAR_S, now=0.0)).epoch
    for session, model in sessions:
        entries = await log.read(session)
        assert [(e.kind, e.body["v"]) for e in entries] == model.entries
        assert [e.position for e in entries] == list(range(1, len(entries) + 1))
        assert (await log.get(session)).head == len(entries)
        assert [e.position for e in await log.inbox_after(session, 0)] == [
            i for i, (kind, _) in enumerate(model.entries, 1) if kind == "user"
        ]


@settings(max_examples=150, deadline=None)
@given(st.lists(OPS, max_size=25))
def test_memory_log_is_a_list(ops):
    asyncio.run(play(MemoryLog(), ops))


@settings(max_examples=40, deadline=None)
@given(st.lists(OPS, max_size=25))
def test_sqlite_log_is_a_list(ops):
    async def run(folder):
        db = Database.open(Path(folder) / "recess.db", [SCHEMA])
        try:
            await play(SqlLog(db, MemoryBodies()), ops)
        finally:
            await db.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(folder))
