"""Who may call a server that listens on TCP."""

import socket

import pytest

from recess.api.guard import Guard, judge, tcp_socket
from recess.errors import BadInput, Unavailable


@pytest.mark.parametrize(
    ("headers", "token", "passes"),
    [
        ({b"host": b"127.0.0.1:8080"}, False, True),
        ({b"host": b"localhost:8080"}, False, True),
        ({b"host": b"[::1]:8080"}, False, True),
        ({b"host": b"evil.example"}, False, False),  # a name that points here
        ({b"host": b"evil.example"}, True, True),  # it does not have the token
        ({}, False, False),
        ({b"host": b"["}, False, False),
        ({b"host": b"localhost:8080", b"origin": b"http://localhost:8080"}, False, True),
        ({b"host": b"localhost:8080", b"origin": b"https://evil.example"}, False, False),
        ({b"host": b"localhost:8080", b"origin": b"http://localhost:9090"}, False, False),
        ({b"host": b"localhost:8080", b"origin": b"null"}, False, False),
        ({b"host": b"localhost:8080", b"origin": b"http://["}, True, False),
        ({b"host": b"Node.Example:80", b"origin": b"http://node.example:80"}, True, True),
        ({b"origin": b"null"}, True, False),
    ],
)
def test_pages_of_other_sites_are_refused(headers, token, passes):
    assert (judge(headers, token=token) is None) == passes


async def call(kind, headers, token=""):
    """Return what the application or the guard sent."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "passed"})

    async def send(message):
        sent.append(message)

    await Guard(app, token)({"type": kind, "headers": headers}, None, send)
    return sent


async def test_the_token_is_asked_for_first():
    here = (b"host", b"localhost")
    assert (await call("http", [here], "t"))[0]["status"] == 401
    assert (await call("http", [here, (b"authorization", b"Bearer u")], "t"))[0]["status"] == 401
    assert await call("http", [here, (b"authorization", b"Bearer t")], "t") == [{"type": "passed"}]
    assert (await call("websocket", [here], "t"))[0] == {"type": "websocket.close", "code": 1008}


async def test_a_websocket_of_another_site_is_closed():
    headers = [(b"host", b"localhost:8080"), (b"origin", b"https://evil.example")]
    assert await call("websocket", headers) == [{"type": "websocket.close", "code": 1008}]
    refused = await call("http", headers)
    assert refused[0]["status"] == 403
    assert b"other sites" in refused[1]["body"]


async def test_what_is_no_request_passes():
    assert await call("lifespan", []) == [{"type": "passed"}]


def test_an_address_that_cannot_be_listened_on_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(Unavailable, match="cannot listen"):
        tcp_socket("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(Unavailable, match="cannot listen"):
        tcp_socket("no.such.host.invalid", 0)
    with pytest.raises(BadInput, match="port"):
        tcp_socket("127.0.0.1", 70000)


def test_a_bracketed_address_is_a_v6_one(monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "create_server", lambda address, *, family: asked.append((address, family)))
    tcp_socket("[::1]", 80)
    tcp_socket("localhost", 80)
    assert asked == [(("::1", 80), socket.AF_INET6), (("localhost", 80), socket.AF_INET)]
