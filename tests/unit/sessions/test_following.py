"""Readers of a session: places, marks, and no piece missing or doubled wherever a reader stops and goes on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recess.contextlog import MemoryLog
from recess.contextlog.contract import Delta, Draft, Entry
from recess.errors import BadInput
from recess.sessions.following import Feed, Place, parse_place, pieces_of


def test_a_place_survives_being_an_id():
    for place in (Place(), Place(12), Place(12, 3, 1, 40, 0xDEADBEEF)):
        assert parse_place(str(place)) == place


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1.2", "1.2.3.4", "1.2.3.4.zz", "1.2.3.-4.ff", "1.2.3.4.5.6", "٣", "1" * 200]
)
def test_what_is_no_id_is_refused(text):
    with pytest.raises(BadInput):
        parse_place(text)


def test_pieces_end_at_the_first_gap():
    found = pieces_of([Delta(1, 0, 0, "a"), Delta(1, 0, 3, "d"), Delta(1, 0, 1, "b"), Delta(1, 1, 1, "y")])
    assert {key: [one.text for one in pieces] for key, pieces in found.items()} == {(1, 0): ["a", "b"], (1, 1): []}
    assert found[(1, 0)][1].mark != found[(1, 0)][0].mark


class Client:
    """Shows what it gets by the one rule: piece 0 begins afresh, the entry replaces."""

    def __init__(self):
        self.place = Place()
        self.shown = {}
        self.positions = []

    def take(self, place, item):
        self.place = place
        if isinstance(item, Entry):
            self.positions.append(item.position)
            if item.kind == "assistant":
                self.shown.pop(item.body["part"], None)
            return
        if item.n == 0:
            self.shown[item.part] = []
        assert len(self.shown[item.part]) == item.n, "a piece is missing or doubled"
        self.shown[item.part].append(item.text)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("piece"), st.sampled_from(["a", "b", "cc"])),
        st.tuples(st.sampled_from(["lose", "fill", "afresh", "entry", "end", "read", "drop"]), st.integers(0, 3)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(STEPS)
async def test_a_reader_shows_what_was_said_wherever_it_was_cut_off(steps):
    log = MemoryLog()
    row = await log.claim((await log.create(agent="a", code_version="1")).id, "me", 60.0, now=0.0)
    client, feed, text, part, lost = Client(), None, [], 0, set()
    feed = Feed(log, row.id)

    async def put(n):
        await log.put_delta(row.id, row.epoch, Delta(1, part, n, text[n]))

    async def fill():
        """As an agent does that has its connection back: everything from the first piece that was lost."""
        for n in range(min(lost), len(text)) if lost else ():
            await put(n)
        lost.clear()

    for what, how in steps:
        if what in ("piece", "lose"):
            text.append(how if what == "piece" else "lost")
            if what == "piece":
                await put(len(text) - 1)
            else:
                lost.add(len(text) - 1)
        elif what == "fill":
            await fill()
        elif what == "afresh" and text:
            text, lost = ["z" * how + "."], set()
            await put(0)
        elif what == "entry":
            await log.append(row.id, row.epoch, [Draft("note", {})])
        elif what == "end":
            await log.append(row.id, row.epoch, [Draft("assistant", {"text": "".join(text), "part": part}, turn=1)])
            part, text, lost = part + 1, [], set()
        else:
            found = await feed.ready()
            for place, item in found[:how] if what == "drop" else found:
                client.take(place, item)
            if what == "drop":
                feed = Feed(log, row.id, parse_place(str(client.place)))
    await fill()
    while found := await feed.ready():
        for place, item in found:
            client.take(place, item)
    assert client.positions == list(range(1, len(client.positions) + 1))
    assert client.shown.get(part, []) == text
    assert set(client.shown) <= {part}


async def test_a_closed_session_is_read_to_its_end():
    log = MemoryLog()
    row = await log.create(agent="a", code_version="1")
    await log.append_inbox(row.id, Draft("user", {"text": "hi"}, key="1"))
    await log.close(row.id)
    assert [item.kind async for _place, item in Feed(log, row.id).items(1.0)] == ["user"]


async def test_why_nothing_comes_is_known_until_it_is_over():
    log = MemoryLog()
    row = await log.create(agent="a", code_version="v")
    mine = await log.claim(row.id, "n", 10.0, now=0.0)
    feed = Feed(log, row.id)
    await log.update(row.id, mine.epoch, meta={"failure": "no such image"})
    assert (await feed.ready(), feed.failure) == ([], "no such image")
    await log.update(row.id, mine.epoch, meta={"failure": ""}, state="running")
    assert (await feed.ready(), feed.failure) == ([], "")
