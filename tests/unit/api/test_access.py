"""Tokens with a scope and webhooks, over the guard as TCP has it: what each reaches, and that nothing else does."""

import asyncio
import json
import re
import time
from types import SimpleNamespace

import pytest

from recess.api import grants, routes_access
from recess.api.access import Access
from recess.api.app import make_app
from recess.api.grants import Grant
from recess.api.guard import Guard
from recess.api.wire import ProgressHub
from recess.config import load_config
from recess.errors import BadInput, Refused
from recess.sessions import signing
from recess.testing.session_world import world

ROOT = b"r" * 32
AGENT = """
from recess_agent import agent

@agent(idle="30s")
async def me(s):
    async for turn in s:
        if turn.text == "put":
            await s.blobs.put(b"<script>", media_type="text/html", name="page.html")
        await s.say(turn.text + " " + str((turn.body.get("payload") or {}).get("n")))
"""


class Server:
    """The application behind its guard, with the server's token `master`."""

    def __init__(self, w):
        self.world = w
        app = make_app(SimpleNamespace(sessions=w.sessions), ProgressHub(), key=ROOT)

        def grant(token):
            return grants.read(ROOT, token, time.time())

        self.guarded = Guard(Access(app, w.sessions.get), "master", grant=grant, signed=routes_access.HOOK_PREFIX)

    async def __call__(self, token, method, path, body=None, *, raw=None, headers=None, kind="http"):
        """Return (status, answer)."""
        data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        path, _, query = path.partition("?")
        sent = []
        lines = {"host": "x", **({"authorization": f"Bearer {token}"} if token else {}), **(headers or {})}
        scope = {
            "type": kind, "method": method, "path": path, "raw_path": path.encode(), "http_version": "1.1",
            "headers": [(name.encode(), value.encode()) for name, value in lines.items()], "query_string": query.encode(),
            "scheme": "http", "server": ("x", 1), "root_path": "", "subprotocols": [],
        }  # fmt: skip

        asked = False

        async def receive():
            nonlocal asked
            if asked:
                await asyncio.Event().wait()  # a client that stays
            asked = True
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message):
            sent.append(message)

        await self.guarded(scope, receive, send)
        if kind == "websocket":
            return sent[0]["type"], sent[0].get("code")
        text = b"".join(one.get("body", b"") for one in sent)
        answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        if answered.get("content-type") == "application/octet-stream":
            return sent[0]["status"], (text, answered)
        return sent[0]["status"], json.loads(text) if text else {}


@pytest.fixture
async def server():
    async with world() as w:
        await w.sessions.deploy("me", {"agent.py": AGENT})
        yield Server(w)


async def session(server, **labels):
    return (await server.world.sessions.start("me", labels=labels)).id


async def token(server, **scope):
    status, made = await server("master", "POST", "/v1/tokens", scope)
    assert status == 201, made
    return made["token"]


READS = ["", "/log", "/poll?wait=0", "/questions", "/snapshots", "/cost", "/blobs"]
WRITES = [("/messages", {"text": "x"}), ("/answers", {"question": "q", "text": "x"}), ("/cancel", {})]
MANAGES = ["/suspend", "/close"]
NEVER = [
    ("GET", "/v1/info"), ("POST", "/v1/shutdown"), ("POST", "/v1/tokens"), ("GET", "/v1/machines"), ("POST", "/v1/machines"),
    ("GET", "/v1/agents"), ("POST", "/v1/agents"), ("GET", "/v1/snapshots"), ("DELETE", "/v1/snapshots/x"), ("GET", "/v1/images"),
    ("POST", "/v1/snapshot-imports"), ("GET", "/v1/sessions/{s}/callback"), ("POST", "/v1/sessions/{s}/hooks"),
    ("POST", "/v1/sessions/{s}/fork"), ("POST", "/v1/sessions/{s}/rewind"), ("GET", "/v1/sessions/{s}/diff"), ("DELETE", "/v1/sessions/{s}"),
    ("GET", "/v1/sessions/{s}/log/more"), ("GET", "/v1//sessions/{s}"), ("POST", "/v1/sessions/{s}"), ("PUT", "/v1/sessions/{s}/messages"),
]  # fmt: skip


async def test_a_session_token_reads_its_session_and_no_other(server):
    mine, other = await session(server), await session(server)
    reader = await token(server, session=mine)
    for rest in READS:
        assert (await server(reader, "GET", f"/v1/sessions/{mine}{rest}"))[0] == 200
        assert (await server(reader, "GET", f"/v1/sessions/{other}{rest}"))[0] == 403
    for rest, body in WRITES:
        assert (await server(reader, "POST", f"/v1/sessions/{mine}{rest}", body))[0] == 403
    assert (await server(reader, "GET", "/v1/sessions"))[0] == 403
    assert await server.world.log.inbox_after(mine, 0) == []
    there, gone = (
        await server(reader, "GET", f"/v1/sessions/{other}"),
        await server(reader, "GET", "/v1/sessions/ses_none"),
    )
    assert there == gone  # who may not see a session may not learn that there is one


async def test_a_sessions_blobs_are_read_by_its_token_and_never_run_by_a_browser(server):
    mine, other = await session(server), await session(server)
    await server.world.say(mine, "put", turn=1)
    reader, stranger = await token(server, session=mine), await token(server, session=other)
    (blob,) = (await server(reader, "GET", f"/v1/sessions/{mine}/blobs"))[1]["blobs"]
    assert (blob["name"], blob["size"], blob["media_type"]) == ("page.html", 8, "text/html")
    status, (data, headers) = await server(reader, "GET", f"/v1/sessions/{mine}/blobs/{blob['hash']}")
    assert (status, data, headers["content-length"]) == (200, b"<script>", "8")
    assert (headers["x-content-type-options"], headers["content-disposition"]) == ("nosniff", "attachment")
    assert (await server(stranger, "GET", f"/v1/sessions/{mine}/blobs/{blob['hash']}"))[0] == 403
    for one in (stranger, "master"):  # whose own session does not have it, though the hash is right
        status, problem = await server(one, "GET", f"/v1/sessions/{other}/blobs/{blob['hash']}")
        assert (status, problem["code"]) == (404, "not_found")
    assert (await server("master", "GET", f"/v1/sessions/{mine}/blobs/" + "0" * 64))[0] == 404
    assert (await server(reader, "GET", f"/v1/sessions/{mine}/blobs/../log"))[0] == 403


async def test_a_session_token_that_writes(server):
    mine, other = await session(server), await session(server)
    writer = await token(server, session=mine, rights="write")
    assert (await server(writer, "POST", f"/v1/sessions/{mine}/messages", {"text": "hi"}))[0] == 202
    await server.world.until(mine, "turn.end")
    assert (await server(writer, "GET", f"/v1/sessions/{mine}/log"))[0] == 200
    for rest, body in WRITES:
        assert (await server(writer, "POST", f"/v1/sessions/{other}{rest}", body))[0] == 403
    for rest in MANAGES:
        assert (await server(writer, "POST", f"/v1/sessions/{mine}{rest}", {}))[0] == 403
    assert (await server(writer, "POST", "/v1/sessions", {"agent": "me"}))[0] == 403
    assert await server.world.log.inbox_after(other, 0) == []


async def test_a_project_token(server):
    mine, other, free = await session(server, project="a"), await session(server, project="b"), await session(server)
    reader, writer = await token(server, project="a"), await token(server, project="a", rights="write")
    listed = (await server(reader, "GET", "/v1/sessions?all=1"))[1]["sessions"]
    assert [one["id"] for one in listed] == [mine]
    assert (await server(reader, "POST", "/v1/sessions", {"agent": "me"}))[0] == 403
    made = await server(
        writer, "POST", "/v1/sessions", {"agent": "me", "eager": False, "labels": {"project": "b", "x": "y"}}
    )
    assert made[1]["labels"] == {"project": "a", "x": "y"}
    wanted = {"agent": "me", "labels": {"callback": "http://inside/"}}
    assert (await server(writer, "POST", "/v1/sessions", wanted))[0] == 403
    for one in (other, free):
        assert (await server(reader, "GET", f"/v1/sessions/{one}"))[0] == 403
        for rest in (*MANAGES, "/resume"):
            assert (await server(writer, "POST", f"/v1/sessions/{one}{rest}", {}))[0] == 403
    assert (await server(reader, "POST", f"/v1/sessions/{mine}/close", {}))[0] == 403
    assert (await server(writer, "POST", f"/v1/sessions/{mine}/close", {}))[1]["state"] == "closed"


@pytest.mark.parametrize(("method", "path"), NEVER)
async def test_what_only_the_servers_own_token_reaches(server, method, path):
    mine = await session(server, project="a")
    for scope in ({"session": mine}, {"project": "a"}):
        writer = await token(server, rights="write", **scope)
        assert (await server(writer, method, path.format(s=mine), {}))[0] == 403


async def test_no_token_opens_a_terminal_but_the_servers_own(server):
    writer = await token(server, project="a", rights="write")
    assert await server(writer, "GET", "/v1/machines/m/exec", kind="websocket") == ("websocket.close", 1008)
    assert await server("", "GET", "/v1/machines/m/exec", kind="websocket") == ("websocket.close", 1008)


async def test_tokens_that_are_none(server):
    mine = await session(server)
    good = await token(server, session=mine)
    text, seal = good.removeprefix("recess_").split(".")
    more = grants.make(b"other" * 8, Grant("write", int(time.time()) + 60, session=mine))
    over = grants.make(ROOT, Grant("read", int(time.time()) - 1, session=mine))
    for bad in ("", "x", "recess_", f"recess_{text}", f"recess_{text}.", f"recess_{text}A.{seal}", more, over, "recess_" + "A" * 5000,
                f"recess_{text}.{seal}\xff"):  # fmt: skip
        assert (await server(bad, "GET", f"/v1/sessions/{mine}"))[0] == 401
    assert (await server("master", "GET", f"/v1/sessions/{mine}"))[0] == 200


@pytest.mark.parametrize(
    "scope", [{}, {"session": "S", "project": "a"}, {"project": "a", "rights": "admin"}, {"project": "a", "ttl_s": 0},
              {"project": "a", "ttl_s": 1e9}, {"project": "a" * 500}, {"project": "a", "more": 1}],
)  # fmt: skip
async def test_what_no_token_is_made_for(server, scope):
    mine = await session(server)
    asked = {k: mine if v == "S" else v for k, v in scope.items()}
    assert (await server("master", "POST", "/v1/tokens", asked))[0] == 400


def test_a_grant_reads_back_as_it_was():
    grant = Grant("write", 2_000_000_000, project="ä/b")
    assert grants.read(ROOT, grants.make(ROOT, grant), 1.0) == grant
    with pytest.raises(Refused):
        grants.read(b"x" * 32, grants.make(ROOT, grant), 1.0)


# -- webhooks ----------------------------------------------------------------------------------------------------------


async def hook(server, ident):
    made = (await server("master", "POST", f"/v1/sessions/{ident}/hooks", {"name": "ci"}))[1]
    return made["path"], signing.key_of(made["secret"])


async def test_a_signed_webhook_is_a_message_once(server):
    mine = await session(server)
    path, key = await hook(server, mine)
    body = json.dumps({"text": "build failed", "n": 1}).encode()
    headers = signing.signed(key, "msg_1", time.time(), body)
    status, first = await server("", "POST", path, raw=body, headers=headers)
    assert (status, first["replayed"]) == (202, False)
    assert (await server("", "POST", path, raw=body, headers=headers))[1] == {**first, "replayed": True}
    end = await server.world.until(mine, "turn.end")
    assert end.turn == 1
    (said,) = [e.body["text"] for e in await server.world.entries(mine, "assistant")]
    assert said == "build failed 1"
    (sent,) = await server.world.entries(mine, "user")
    assert (sent.body["hook"], sent.body["payload"]["n"]) == ("ci", 1)


async def test_a_webhook_wakes_a_session_that_is_put_away_under_the_next_server(server):
    w, mine = server.world, await session(server)
    path, key = await hook(server, mine)
    await w.say(mine, "hi", turn=1)
    assert (await w.sessions.suspend(mine)).state == "frozen"
    await w.sessions.settled(mine)
    assert [one.row.state for one in w.machines.machines.values()] == ["suspended"]
    await w.crash_server()
    body = json.dumps({"text": "build failed", "n": 2}).encode()
    headers = signing.signed(key, "msg_1", time.time(), body)
    assert (await Server(w)("", "POST", path, raw=body, headers=headers))[0] == 202
    await w.until(mine, "turn.end", count=2)
    assert [e.body["text"] for e in await w.entries(mine, "assistant")][-1] == "build failed 2"
    assert [e.body["rung"] for e in await w.entries(mine, "machine.restore")][-1] == 2


async def test_webhooks_that_are_refused(server):
    mine, other = await session(server), await session(server)
    path, key = await hook(server, mine)
    now, body = time.time(), b"plain words"
    good = signing.signed(key, "m", now, body)
    wrong = [
        ({}, body, path), (good, b"other words", path), ({**good, "webhook-id": "n"}, body, path),
        (signing.signed(key, "m", now - 900, body), body, path), (signing.signed(key, "m", now + 900, body), body, path),
        ({**good, "webhook-timestamp": "soon"}, body, path), ({**good, "webhook-signature": "v1,"}, body, path),
        ({**good, "webhook-signature": "v2," + good["webhook-signature"][3:]}, body, path),
        (good, body, path.replace(mine, other)), (good, body, path + "x"), (good, body, "/v1/hooks/ses_none/ci"),
        (signing.signed(key, "", now, body), body, path), (signing.signed(key, "i" * 200, now, body), body, path),
    ]  # fmt: skip
    answers = [await server("", "POST", where, raw=data, headers=headers) for headers, data, where in wrong]
    assert {status for status, _ in answers} == {403}
    assert await server.world.log.inbox_after(mine, 0) == []
    several = {**good, "webhook-signature": f"v1,AAAA {good['webhook-signature']}"}  # while a secret is changed
    assert (await server("", "POST", path, raw=body, headers=several))[0] == 202
    assert (await server("", "GET", path, headers=good))[0] == 400


async def test_a_webhook_of_a_closed_session_and_a_body_that_is_no_json(server):
    mine = await session(server)
    path, key = await hook(server, mine)
    for ident, body in (("a", b"\xff\0"), ("b", b""), ("c", b'{"no": "text"}'), ("d", b"[1]")):
        assert (await server("", "POST", path, raw=body, headers=signing.signed(key, ident, time.time(), body)))[
            0
        ] == 202
    told = [e.body["text"] for e in await server.world.entries(mine, "user")]
    assert told == ["\ufffd\ufffd", "(an empty webhook)", '{"no": "text"}', "[1]"]
    await server.world.sessions.close(mine)
    assert (await server("", "POST", path, raw=b"x", headers=signing.signed(key, "e", time.time(), b"x")))[0] == 404
    assert (await server("master", "POST", f"/v1/sessions/{mine}/hooks", {"name": "a/b"}))[0] == 400


# -- keys --------------------------------------------------------------------------------------------------------------


def test_the_vector_of_standard_webhooks():
    # The example of the specification's reference implementations.
    key = signing.key_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    headers = signing.signed(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert signing.checked(key, headers, body, now=1614265330.0) == "msg_p5jXN8AQM9LWM0D4loKWxJek"


def test_keys_hang_on_the_token_or_on_a_file_of_the_home(tmp_path):
    assert (
        signing.root_key("t", tmp_path)
        == signing.root_key("t", tmp_path / "elsewhere")
        != signing.root_key("u", tmp_path)
    )
    first = signing.root_key("", tmp_path)
    assert first == signing.root_key("", tmp_path)
    assert (tmp_path / signing.KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert signing.derived(first, "a", "bc") != signing.derived(first, "ab", "c")
    with pytest.raises(ValueError, match="not a secret"):
        signing.key_of("whsec_?")


async def test_tcp_needs_a_token(tmp_path):
    from recess.api.app import serve

    with pytest.raises(BadInput, match="needs a token"):
        await serve(load_config({}, home=tmp_path), tcp=("127.0.0.1", 0), on_ready=lambda: None)
    assert not re.findall("recess.db", " ".join(one.name for one in tmp_path.iterdir()))
