"""Callbacks: signed, at least once, in order, also over a restart and a side that was away."""

import asyncio
import json

import pytest

from recess.errors import BadInput
from recess.sessions import signing
from recess.sessions.callbacks import Callbacks, check_url, post
from recess.testing.http_server import HttpRequest, HttpResponse, LoopbackServer
from recess.testing.session_world import world

ROOT = b"r" * 32
URL = "http://other.side/hook"
AGENT = """
from recess_agent import agent

@agent(idle="30s")
async def me(s):
    async for turn in s:
        if turn.text == "ask":
            await s.ask("go on?", ["yes"])
        await s.say("done")
"""


class Side:
    """Who is called: answers `statuses`, then 200."""

    def __init__(self, *statuses):
        self.statuses = list(statuses)
        self.heard = asyncio.Queue()

    async def __call__(self, url, headers, body):
        assert url == URL
        status = self.statuses.pop(0) if self.statuses else 200
        self.heard.put_nowait((status, headers, body))
        return status

    async def next(self):
        return await asyncio.wait_for(self.heard.get(), 30)


async def open_world(w, side, folder):
    w.sessions.callbacks = Callbacks(w.log, w.clock, ROOT, folder, side)
    await w.sessions.deploy("me", {"agent.py": AGENT})


async def test_ends_of_turns_and_questions_are_told_and_signed(tmp_path):
    async with world() as w:
        side = Side()
        await open_world(w, side, tmp_path / "c")
        row = await w.sessions.start("me", labels={"callback": URL})
        await w.sessions.send(row.id, "ask")
        _, headers, body = await side.next()
        told = json.loads(body)
        assert (told["type"], told["session"], told["data"]["text"]) == ("session.ask", row.id, "go on?")
        ident = signing.checked(signing.callback_key(ROOT, row.id), headers, body, now=w.clock.wall_s())
        assert ident == f"{row.id}:{told['position']}"
        await w.sessions.answer(row.id, told["ref"], "yes")
        _, _, body = await side.next()
        told = json.loads(body)
        assert (told["type"], told["turn"], told["data"]["status"]) == ("session.turn_end", 1, "done")


async def test_who_was_away_is_asked_again(tmp_path):
    async with world() as w:
        side = Side(0, 500, 302)
        await open_world(w, side, tmp_path / "c")
        row = await w.sessions.start("me", labels={"callback": URL})
        await w.sessions.send(row.id, "hi")
        heard = [await side.next()]
        while heard[-1][0] != 200:
            w.clock.jump(3600)  # past any patience
            heard.append(await side.next())
        assert [status for status, _, _ in heard] == [0, 500, 302, 200]
        assert len({headers["webhook-id"] for _, headers, _ in heard}) == 1


async def test_the_next_server_goes_on_where_it_was(tmp_path):
    async with world() as w:
        side = Side()
        await open_world(w, side, tmp_path / "c")
        row = await w.sessions.start("me", labels={"callback": URL})
        await w.sessions.send(row.id, "one")
        first = json.loads((await side.next())[2])
        assert first["turn"] == 1
        while not (tmp_path / "c" / row.id).exists():  # it is written after it was told, by a task
            await asyncio.sleep(0.01)
        await w.sessions.callbacks.close()
        await w.say(row.id, "two", turn=2)  # while nobody tells
        after = await w.crash_server()
        after.callbacks = Callbacks(w.log, w.clock, ROOT, tmp_path / "c", side)
        await after.recover()
        assert json.loads((await side.next())[2])["turn"] == 2
        assert side.heard.empty()


async def test_a_side_that_is_gone_for_a_day_does_not_hold_the_others_up(tmp_path):
    async with world() as w:
        side = Side(*[503] * 2)
        await open_world(w, side, tmp_path / "c")
        row = await w.sessions.start("me", labels={"callback": URL})
        await w.sessions.send(row.id, "one")
        await side.next()
        w.clock.jump(2 * 86400)
        await side.next()  # the last try; it is passed then
        await w.sessions.send(row.id, "two")
        status, _, body = await side.next()
        assert (status, json.loads(body)["turn"]) == (200, 2)


async def test_only_who_asks_is_called(tmp_path):
    async with world() as w:
        side = Side()
        await open_world(w, side, tmp_path / "c")
        row = await w.sessions.start("me")
        await w.say(row.id, "hi", turn=1)
        assert side.heard.empty()
        with pytest.raises(BadInput, match="callback"):
            await w.sessions.start("me", labels={"callback": "file:///etc/passwd"})


@pytest.mark.parametrize("url", ["", "ftp://a/", "http://", "http://u:p@a/", "https://a/" + "x" * 3000])
def test_where_no_callback_goes(url):
    with pytest.raises(BadInput):
        check_url(url)


class Redirecting(LoopbackServer):
    async def answer(self, request: HttpRequest) -> HttpResponse:
        return (
            HttpResponse(302, headers={"location": "http://127.0.0.1:1/"})
            if request.path == "/away"
            else HttpResponse(204)
        )


async def test_a_real_post_is_made_and_no_redirect_followed():
    async with Redirecting() as server:
        assert await post(f"{server.url}/hook?x=1", {"webhook-id": "a"}, b"{}") == 204
        assert await post(f"{server.url}/away", {}, b"{}") == 302
        gone = server.url
    assert await post(gone, {}, b"{}") == 0
