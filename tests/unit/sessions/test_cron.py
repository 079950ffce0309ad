"""Times by the clock: what an expression means, and that each time is one message, whatever restarts in between."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recess.errors import BadInput
from recess.sessions.cron import parse_cron
from recess.testing.session_world import world

AGENT = """
from recess_agent import agent

@agent(image="base", idle="100ms", cron={"0 9 * * *": "report", "*/30 10 * * *": "look"})
async def me(s):
    async for turn in s:
        await s.say("did " + turn.text)
"""


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("text", "now", "after", "before"),
    [
        ("0 9 * * *", "2026-11-23 09:00", "2026-11-24 09:00", "2026-11-23 09:00"),
        ("*/15 8-10,20 * * *", "2026-11-23 10:50", "2026-11-23 20:00", "2026-11-23 10:45"),
        ("0 0 29 2 *", "2026-11-23 00:00", "2028-02-29 00:00", "2024-02-29 00:00"),
        ("30 6 * * 7", "2026-11-23 00:00", "2026-11-29 06:30", "2026-11-22 06:30"),
        ("0 0 13 * 5", "2026-11-23 00:00", "2026-11-27 00:00", "2026-11-20 00:00"),  # the 13th, or a Friday
        ("5/20 * * 12 *", "2026-11-23 00:00", "2026-12-01 00:05", "2025-12-31 23:45"),
    ],
)
def test_times(text, now, after, before):
    cron = parse_cron(text)
    assert (cron.next_after(at(now)), cron.last_until(at(now))) == (at(after), at(before))


def test_a_time_that_never_comes():
    cron = parse_cron("0 0 30 2 *")
    assert (cron.next_after(at("2026-11-23")), cron.last_until(at("2026-11-23"))) == (None, None)


@pytest.mark.parametrize(
    "text",
    ["", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 8", "5-1 * * * *", "*/0 * * * *",
     "a * * * *", "-1 * * * *", "1- * * * *", "٣ * * * *", ",1 * * * *", "*/ * * * *", "1 " * 200],
)  # fmt: skip
def test_what_is_no_expression(text):
    with pytest.raises(BadInput, match="cron"):
        parse_cron(text)


FIELD = st.one_of(st.just("*"), st.sampled_from(["*/7", "*/2"]))
MINUTES = st.integers(0, 59).map(str)


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(st.one_of(FIELD, MINUTES), st.one_of(FIELD, st.integers(0, 23).map(str)), FIELD, FIELD, FIELD),
    st.integers(0, 10**9),
)
def test_next_and_last_are_what_counting_minutes_finds(words, minute):
    cron, now = parse_cron(" ".join(words)), minute * 60 + 17.0

    def on(moment):
        days = moment.day in cron.days and moment.isoweekday() % 7 in cron.weekdays
        return moment.month in cron.months and days and moment.hour in cron.hours and moment.minute in cron.minutes

    here = datetime.fromtimestamp(minute * 60, UTC)
    after = cron.next_after(now)
    assert after is not None
    assert on(datetime.fromtimestamp(after, UTC))
    assert after > now
    for n in range(1, 2000):
        moment = here + timedelta(minutes=n)
        if on(moment):
            assert after == moment.timestamp()
            break
    last = cron.last_until(now)
    assert last is None or (last <= now and on(datetime.fromtimestamp(last, UTC)))
    if last is not None:
        assert cron.last_until(cron.next_after(last) - 1) == last, "nothing is between the two"


def to(w, text):
    """Let it be this time of the next day."""
    now = datetime.fromtimestamp(w.clock.wall_s(), UTC)
    hour, minute = map(int, text.split(":"))
    wanted = now.replace(hour=hour, minute=minute, second=1, microsecond=0)
    w.clock.jump((wanted - now).total_seconds() + (86400 if wanted <= now else 0))


async def begun(w):
    to(w, "08:00")
    await w.sessions.deploy("me", {"agent.py": AGENT})
    return (await w.sessions.start("me")).id


async def said(w, s):
    return [e.body["text"] for e in await w.entries(s, "assistant")]


async def test_a_frozen_session_gets_its_message_and_no_machine_waits_for_it():
    async with world() as w:
        s = await begun(w)
        assert (await w.log.get(s)).state == "cold"
        to(w, "09:00")
        await w.until(s, "turn.end")
        await w.until_state(s, "frozen")
        to(w, "10:00")
        await w.until(s, "turn.end", count=2)
        await w.until_state(s, "frozen")
        to(w, "10:30")
        await w.until(s, "turn.end", count=3)
        assert await said(w, s) == ["did report", "did look", "did look"]


async def test_a_restart_neither_loses_nor_doubles_a_time():
    async with world() as w:
        s = await begun(w)
        await w.sessions.abandon()
        to(w, "09:00")
        to(w, "09:00")  # two of them have passed while no server ran: the newest counts
        w.new_server()
        await w.sessions.recover()
        await w.until(s, "turn.end")
        await w.crash_server()
        await w.sessions.recover()
        to(w, "10:00")
        await w.until(s, "turn.end", count=2)
        texts = [e.body["text"] for e in await w.entries(s, "user")]
        assert sorted(texts) in (["look", "report"], ["look", "look", "report"]), (
            "yesterday's look may have been missed too"
        )
        assert texts.count("report") == 1


async def test_what_was_before_the_session_or_its_code_is_nobodys_wish():
    async with world() as w:
        to(w, "09:30")
        await w.sessions.deploy("me", {"agent.py": AGENT})
        s = (await w.sessions.start("me")).id
        await w.sessions.recover()
        assert await w.entries(s) == []


async def test_forks_and_closed_sessions_and_agents_without_a_schedule_get_none():
    async with world() as w:
        s = await begun(w)
        other = (await w.sessions.start("me")).id
        await w.sessions.close(other)
        child = await w.sessions.fork(s)
        to(w, "09:00")
        await w.until(s, "turn.end")
        assert await w.entries(child.id, "user") == []
        assert await w.entries(other, "user") == []
        await w.sessions.deploy("me", {"agent.py": AGENT}, {"cron": {}})
        to(w, "10:00")
        await w.say(s, "are you there", turn=2)
        assert len(await w.entries(s, "user")) == 2
