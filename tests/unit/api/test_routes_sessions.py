"""Sessions over HTTP: real routes, a real session runtime, agents as processes; the requests are made in process."""

import json
from types import SimpleNamespace

import pytest

from recess.api.app import make_app
from recess.api.wire import ProgressHub
from recess.testing.session_world import world

AGENT = """
from recess_agent import agent

@agent(image="base", idle="30s")
async def me(s):
    async for turn in s:
        answer = await s.ask("go on?", ["yes", "no"]) if turn.text == "ask" else "no question"
        await s.say(turn.text + ": " + answer)
"""


class Http:
    """A client of the application that needs no socket."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, method, path, body=None, *, key="", expect=200):
        sent, data = [], b"" if body is None else json.dumps(body).encode()
        path, _, query = path.partition("?")
        headers = [(b"content-type", b"application/json"), (b"idempotency-key", key.encode())]
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": headers,
            "query_string": query.encode(), "http_version": "1.1", "scheme": "http", "server": ("x", 1), "root_path": "",
        }  # fmt: skip

        async def receive():
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message):
            sent.append(message)

        await self.app(scope, receive, send)
        answer = json.loads(b"".join(one.get("body", b"") for one in sent))
        assert sent[0]["status"] == expect, answer
        return answer


@pytest.fixture
async def http():
    async with world() as w:
        await w.sessions.deploy("me", {"agent.py": AGENT})
        client = Http(make_app(SimpleNamespace(sessions=w.sessions), ProgressHub()))
        client.world = w
        yield client


async def started(http):
    row = await http.world.sessions.start("me")
    return row.id, f"/v1/sessions/{row.id}"


async def test_a_question_is_listed_and_answered_once(http):
    s, base = await started(http)
    sent = await http("POST", f"{base}/messages", {"text": "ask"}, key="m1", expect=202)
    assert sent == {"position": 1, "replayed": False}
    await http.world.until(s, "ask")
    (question,) = (await http("GET", f"{base}/questions"))["questions"]
    assert (question["text"], question["choices"], question["turn"]) == ("go on?", ["yes", "no"], 1)
    body = {"question": question["ref"], "text": "yes"}
    first = await http("POST", f"{base}/answers", body, expect=202)
    assert (await http("POST", f"{base}/answers", body, expect=202))["position"] == first["position"]
    wrong = await http("POST", f"{base}/answers", {**body, "text": "maybe"}, expect=400)
    assert "yes, no" in wrong["message"]
    await http("POST", f"{base}/answers", {**body, "text": "no"}, expect=409)
    await http("POST", f"{base}/answers", {"question": "nothing", "text": "yes"}, expect=404)
    await http("POST", f"{base}/answers", {"question": question["ref"]}, expect=400)
    await http.world.until(s, "turn.end")
    assert (await http("GET", f"{base}/questions"))["questions"] == []


async def test_a_turn_is_cancelled(http):
    s, base = await started(http)
    await http("POST", f"{base}/cancel", {}, expect=409)
    await http("POST", f"{base}/messages", {"text": "ask"}, expect=202)
    await http.world.until(s, "ask")
    sent = await http("POST", f"{base}/cancel", {"reason": "wrong question", "turn": 1}, key="c1", expect=202)
    assert (await http("POST", f"{base}/cancel", {"turn": 7}, expect=409))["code"] == "illegal_state"
    end = await http.world.until(s, "turn.end")
    assert (end.body["status"], end.body["error"]) == ("cancelled", "wrong question")
    assert sent["replayed"] is False


async def test_a_message_has_a_mode(http):
    s, base = await started(http)
    await http("POST", f"{base}/messages", {"text": "ask"}, expect=202)
    await http.world.until(s, "ask")
    await http("POST", f"{base}/messages", {"text": "never mind", "mode": "interrupt"}, expect=202)
    await http.world.until(s, "turn.end", count=2)
    assert (await http("POST", f"{base}/messages", {"text": "x", "mode": "shout"}, expect=400))["code"] == "bad_input"
    await http("POST", f"{base}/messages", {"text": "x", "loud": True}, expect=400)
    entries = (await http("GET", f"{base}/log?after=0"))["entries"]
    assert [e["body"]["status"] for e in entries if e["kind"] == "turn.end"] == ["cancelled", "done"]


async def test_a_key_stands_for_one_call(http):
    first, second = await http.world.sessions.start("me"), await http.world.sessions.start("me")
    child = await http("POST", f"/v1/sessions/{first.id}/fork", {}, key="k", expect=201)
    assert await http("POST", f"/v1/sessions/{first.id}/fork", {}, key="k", expect=201) == child
    refused = await http("POST", f"/v1/sessions/{second.id}/fork", {}, key="k", expect=409)
    assert refused["code"] == "key_reused"


async def test_odd_words_are_the_callers_fault(http):
    _, base = await started(http)
    await http("POST", "/v1/agents", {"name": "\ud800", "files": None, "config": None}, expect=400)
    await http("POST", f"{base}/rewind", {"to": 10**30}, expect=400)
    await http("POST", f"{base}/fork", {"at": -1}, expect=400)


def test_the_log_can_be_read_and_added_to_and_nothing_else(tmp_path):
    """No route changes or removes an entry: under a session there is GET, and POST of what appends or acts."""
    app = make_app(SimpleNamespace(), ProgressHub())
    while not hasattr(app, "routes"):
        app = app.app
    methods = {(route.path, method) for route in app.routes if "/sessions" in route.path for method in route.methods}
    assert ("/v1/sessions/{ref}/log", "GET") in methods
    assert {method for _, method in methods} == {"GET", "HEAD", "POST"}
    assert {method for path, method in methods if path.endswith("/log")} == {"GET", "HEAD"}
