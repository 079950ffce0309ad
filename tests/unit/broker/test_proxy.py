"""The broker with real sockets on both sides: what reaches the upstream, what reaches the guest, what is cut."""

from __future__ import annotations

import asyncio
import ipaddress
import json

import pytest

from recess.broker import Broker, OpenGate, SecretStore, SystemDialer, build_policy, parse_route
from recess.broker.broker import CONNECTIONS_MAX
from recess.broker.policy import Policy
from recess.clock import SystemClock
from recess.errors import Unavailable
from recess.testing.proxy_port import ProxyPort


def problem(body: bytes) -> dict[str, object]:
    found = json.loads(body)
    assert found["type"] == "about:blank"
    return found


async def test_route_adds_the_secret_which_the_guest_never_sees(connect, upstream, broker) -> None:
    guest = await connect()
    status, head, body = await guest.ask(
        b"POST /route/llm/chat?x=1 HTTP/1.1\r\nHost: p\r\nAuthorization: Bearer guess\r\nContent-Length: 2\r\n\r\nhi"
    )
    assert (status, body) == (200, b"hello")
    sent = upstream.requests[0]
    assert sent.startswith(b"POST /v1/chat?x=1 HTTP/1.1\r\n")
    assert b"Bearer sk-secret" in sent
    assert b"guess" not in sent
    assert sent.endswith(b"\r\n\r\nhi")
    assert f"Host: 127.0.0.1:{upstream.port}".encode() in sent
    assert b"sk-secret" not in head + body
    assert "sk-secret" not in repr(broker.decisions("m1"))


async def test_one_connection_carries_many_requests(connect, upstream) -> None:
    guest = await connect()
    for _ in range(3):
        status, _, body = await guest.ask(b"GET /route/bare/x HTTP/1.1\r\nHost: p\r\n\r\n")
        assert (status, body) == (200, b"hello")
    assert len(upstream.requests) == 3


async def test_absolute_form_by_rule_and_denied_by_default(connect, upstream, broker) -> None:
    guest = await connect()
    url = f"http://127.0.0.1:{upstream.port}/a".encode()
    status, _, _ = await guest.ask(b"GET " + url + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status == 200
    status, _, body = await guest.ask(b"GET http://denied.test/a?token=t HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status == 403
    assert problem(body)["code"] == "refused"
    assert "--allow denied.test:80" in str(problem(body)["hint"])
    good, bad = broker.decisions("m1")
    assert (good.allowed, good.verb, good.port) == (True, "http", upstream.port)
    assert (bad.allowed, bad.host) == (False, "denied.test")
    assert "token" not in repr(bad)


async def test_a_denied_name_is_never_resolved(gate) -> None:
    asked: list[str] = []

    class Silent(SystemDialer):
        async def resolve(self, host, port):
            asked.append(host)
            return [ipaddress.ip_address("127.0.0.1")]

    dialer = Silent()
    broker = Broker(OpenGate(), SecretStore(), SystemClock(), dialer=dialer)
    broker.register("m", 0, build_policy(["ok.test"]))
    async with ProxyPort(broker.handler("m")) as port:
        for name in ("denied.test", "ok.test"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
            writer.write(f"CONNECT {name}:443 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert (await reader.readline()).startswith(b"HTTP/1.1 403")
            writer.close()
            await writer.wait_closed()
    assert asked == ["ok.test"]
    assert "127.0.0.0/8" in broker.decisions("m")[1].reason


async def test_stream_is_relayed_piece_by_piece(connect, upstream) -> None:
    go = asyncio.Event()

    async def respond(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"9\r\ndata: 1\n\n\r\n")
        await writer.drain()
        await go.wait()  # the second event does not exist until the guest has read the first
        writer.write(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")

    upstream.respond = respond
    guest = await connect()
    guest.writer.write(b"GET /route/bare/s HTTP/1.1\r\nHost: p\r\n\r\n")
    await guest.reader.readuntil(b"data: 1\n\n\r\n")
    go.set()
    rest = await guest.reader.readuntil(b"0\r\n\r\n")
    assert b"data: 2" in rest


async def test_connect_is_a_raw_tunnel(connect, upstream) -> None:
    guest = await connect()
    where = f"127.0.0.1:{upstream.port}".encode()
    guest.writer.write(b"CONNECT " + where + b" HTTP/1.1\r\nHost: x\r\n\r\nGET /early HTTP/1.1\r\n\r\n")
    assert b" 200 " in await guest.reader.readuntil(b"\r\n\r\n")
    assert (await guest.reader.read()).endswith(b"hello")
    assert upstream.requests[0].startswith(b"GET /early")


async def test_chunked_request_body_and_100_continue(connect, upstream) -> None:
    guest = await connect()
    guest.writer.write(
        b"POST /route/bare/u HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
    )
    assert b" 100 " in await guest.reader.readuntil(b"\r\n\r\n")
    status, _, _ = await guest.ask(b"3\r\nabc\r\n0\r\n\r\n")
    assert status == 200
    assert upstream.requests[0].endswith(b"3\r\nabc\r\n0\r\n\r\n")
    assert b"expect" not in upstream.requests[0].lower()


async def test_an_early_answer_to_a_long_upload_arrives(connect, upstream) -> None:
    async def refuse(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")

    upstream.respond, upstream.read_body = refuse, False
    guest = await connect()
    guest.writer.write(b"POST /route/bare/u HTTP/1.1\r\nHost: p\r\nContent-Length: 100000000\r\n\r\n" + b"x" * 1000)
    head = await guest.reader.readuntil(b"\r\n\r\n")
    assert b" 413 " in head
    assert await guest.reader.readexactly(3) == b"big"


async def test_head_and_upstream_without_length(connect, upstream) -> None:
    async def until_close(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nall of it")

    guest = await connect()
    guest.writer.write(b"HEAD /route/bare/x HTTP/1.1\r\nHost: p\r\n\r\n")
    assert b"content-length: 5" in (await guest.reader.readuntil(b"\r\n\r\n")).lower()
    guest.writer.write(b"HEAD http://denied.test/ HTTP/1.1\r\nHost: p\r\n\r\n")
    assert b" 403 " in await guest.reader.readuntil(b"\r\n\r\n")
    upstream.respond = until_close
    guest = await connect()
    guest.writer.write(b"GET /route/bare/x HTTP/1.1\r\nHost: p\r\n\r\n")
    assert b"all of it" in await guest.reader.readuntil(b"0\r\n\r\n")


async def test_a_broken_response_is_cut_not_ended(connect, upstream) -> None:
    async def half(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")

    upstream.respond = half
    guest = await connect()
    guest.writer.write(b"GET /route/bare/x HTTP/1.1\r\nHost: p\r\n\r\n")
    everything = await guest.reader.read()
    assert b"hello" in everything
    assert not everything.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"", "unavailable"),
        (b"nonsense\r\n\r\n", "unavailable"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 40000, "unavailable"),
    ],
)
async def test_an_upstream_that_lies_is_a_503(connect, upstream, answer: bytes, code: str) -> None:
    async def lie(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    upstream.respond = lie
    guest = await connect()
    status, _, body = await guest.ask(b"GET /route/bare/x HTTP/1.1\r\nHost: p\r\n\r\n")
    assert (status, problem(body)["code"]) == (503, code)


async def test_nobody_listens_upstream(broker: Broker) -> None:
    listener = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    free = listener.sockets[0].getsockname()[1]
    listener.close()
    await listener.wait_closed()
    broker.register("m1", 1, build_policy([], {"gone": f"http://127.0.0.1:{free}"}))
    async with ProxyPort(broker.handler("m1")) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
        writer.write(b"GET /route/gone/ HTTP/1.1\r\nHost: p\r\n\r\n")
        assert b" 503 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: p\r\n\r\n", 400),
        (b"GET https://a.test/ HTTP/1.1\r\nHost: p\r\n\r\n", 400),
        (b"GET /route/none/ HTTP/1.1\r\nHost: p\r\n\r\n", 404),
        (b"GET /route/bare/ HTTP/1.1\r\nHost: p\r\nX: " + b"y" * 40000, 431),
    ],
)
async def test_bad_requests_get_an_answer(connect, upstream, request_bytes: bytes, status: int) -> None:
    guest = await connect()
    got, _, body = await guest.ask(request_bytes)
    assert got == status
    assert problem(body)["message"]
    assert upstream.requests == []


async def test_a_secret_that_cannot_be_read_is_told_not_dropped(tmp_path, upstream) -> None:
    (tmp_path / "real").write_text("sk")
    (tmp_path / "llm").symlink_to(tmp_path / "real")
    broker = Broker(OpenGate(), SecretStore(tmp_path), SystemClock())
    broker.register("m", 0, build_policy([], {"llm": f"http://127.0.0.1:{upstream.port}"}))
    async with ProxyPort(broker.handler("m")) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
        writer.write(b"GET /route/llm/ HTTP/1.1\r\nHost: p\r\n\r\n")
        assert b" 403 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
    assert upstream.requests == []
    assert not broker.decisions("m")[0].allowed


async def test_required_secret_that_is_missing(broker: Broker, upstream) -> None:
    route = parse_route("pay", f"http://127.0.0.1:{upstream.port}", required=True)
    broker.register("m1", 1, Policy((), {"pay": route}))
    async with ProxyPort(broker.handler("m1")) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
        writer.write(b"GET /route/pay/ HTTP/1.1\r\nHost: p\r\n\r\n")
        assert b" 503 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
    assert upstream.requests == []


async def test_losing_the_epoch_cuts_open_streams_and_refuses_new_calls(connect, upstream, gate) -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await writer.drain()
        await asyncio.Event().wait()

    upstream.respond = endless
    streaming, idle = await connect(), await connect()
    streaming.writer.write(b"GET /route/bare/x HTTP/1.1\r\nHost: p\r\n\r\n")
    await streaming.reader.readuntil(b"hello\r\n")
    gate.close()
    assert not (await streaming.reader.read()).endswith(b"0\r\n\r\n")
    assert await idle.reader.read() == b""
    fresh = await connect()
    status, _, body = await fresh.ask(b"GET /route/bare/x HTTP/1.1\r\nHost: p\r\n\r\n")
    assert (status, problem(body)["code"]) == (503, "fenced")
    assert len(upstream.requests) == 1


async def test_a_connection_older_than_the_lease_is_cut_with_it(connect, upstream, gate, broker: Broker) -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await writer.drain()
        await asyncio.Event().wait()

    upstream.respond = endless
    gate.close()
    early = await connect()
    while not broker.open_connections("m1"):
        await asyncio.sleep(0)
    gate.open()
    early.writer.write(b"GET /route/bare/x HTTP/1.1\r\nHost: p\r\n\r\n")
    await early.reader.readuntil(b"hello\r\n")
    gate.close()
    async with asyncio.timeout(5):
        assert not (await early.reader.read()).endswith(b"0\r\n\r\n")


async def test_a_lease_that_ends_while_connecting_stops_the_call(upstream) -> None:
    class OnceGate(OpenGate):
        asked = 0

        def may_act(self, machine_id: str, epoch: int) -> bool:
            self.asked += 1
            return self.asked <= 1  # before resolving; lost before the first byte

    broker = Broker(OnceGate(), SecretStore(), SystemClock())
    broker.register("m", 3, build_policy([], {"bare": f"http://127.0.0.1:{upstream.port}"}))
    async with ProxyPort(broker.handler("m")) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
        writer.write(b"GET /route/bare/ HTTP/1.1\r\nHost: p\r\n\r\n")
        assert b" 503 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
    assert upstream.requests == []


async def test_a_new_epoch_cuts_the_old_ones_streams(connect, broker: Broker) -> None:
    guest = await connect()
    await guest.ask(b"GET /route/bare/x HTTP/1.1\r\nHost: p\r\n\r\n")
    assert broker.open_connections("m1") == 1
    broker.register("m1", 2, build_policy())
    assert await guest.reader.read() == b""
    fresh = await connect()
    status, _, _ = await fresh.ask(b"GET /route/bare/x HTTP/1.1\r\nHost: p\r\n\r\n")
    assert status == 404


async def test_unregistered_and_over_the_cap_are_refused(connect, broker: Broker) -> None:
    guests = [await connect() for _ in range(CONNECTIONS_MAX)]
    for guest in guests:
        await guest.ask(b"GET /route/bare/x HTTP/1.1\r\nHost: p\r\n\r\n")
    over = await connect()
    status, _, body = await over.ask(b"GET /route/bare/x HTTP/1.1\r\nHost: p\r\n\r\n")
    assert (status, "connections" in str(problem(body)["message"])) == (503, True)
    broker.unregister("m1")
    assert await guests[0].reader.read() == b""
    late = await connect()
    status, _, _ = await late.ask(b"GET /route/bare/x HTTP/1.1\r\nHost: p\r\n\r\n")
    assert status == 503
    assert broker.decisions("m1")


async def test_the_journal_is_bounded(connect, broker: Broker) -> None:
    guest = await connect()
    for _ in range(510):
        await guest.ask(b"GET /route/bare/x HTTP/1.1\r\nHost: p\r\n\r\n")
    assert len(broker.decisions("m1")) == 500


class Doors:
    """Siblings that are one loopback port, whatever their name; notes who asked."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.asked: list[tuple[str, str, int]] = []

    async def connect(self, machine_id: str, name: str, port: int):
        self.asked.append((machine_id, name, port))
        if name == "gone":
            raise Unavailable("no machine goes by the name gone in no project")
        return await asyncio.open_connection("127.0.0.1", self.port)


async def test_a_machine_is_called_by_name_once_a_rule_says_so(connect, broker, upstream) -> None:
    doors = Doors(upstream.port)
    broker.bind(doors)
    status, _, body = await (await connect()).ask(b"GET http://db.recess.internal:5000/a HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status == 403
    assert "--allow db.recess.internal:5000" in str(problem(body)["hint"])
    broker.register("m1", 1, build_policy(["*:*", "*.internal:*"]))  # public hosts, and private names of others
    status, _, _ = await (await connect()).ask(b"GET http://db.recess.internal:5000/a HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, doors.asked) == (403, [])
    for rule in ("db.recess.internal:5000", "*.recess.internal:*"):
        broker.register("m1", 1, build_policy([rule]))
        status, _, body = await (await connect()).ask(
            b"GET http://db.recess.internal:5000/a HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        assert (status, body) == (200, b"hello")
    assert doors.asked == [("m1", "db", 5000)] * 2
    assert upstream.requests[0].startswith(b"GET /a HTTP/1.1\r\nHost: db.recess.internal:5000\r\n")
    assert broker.decisions("m1")[-1].reason == "machine db"


async def test_anything_is_spoken_to_a_machine_by_connect(connect, broker, upstream) -> None:
    broker.bind(Doors(upstream.port))
    broker.register("m1", 1, build_policy(["db.recess.internal:5432"], secrets=["KEY@db.recess.internal:5432"]))
    guest = await connect()
    guest.writer.write(b"CONNECT db.recess.internal:5432 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await guest.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    status, _, body = await guest.ask(b"GET / HTTP/1.1\r\nHost: whoever\r\nX: recess-secret-KEY\r\n\r\n")
    assert (status, body) == (200, b"hello")
    assert b"recess-secret-KEY" in upstream.requests[0]  # a secret goes to hosts outside, not to a machine


async def test_a_route_may_lead_to_a_machine_and_one_that_is_gone_is_503(connect, broker, upstream) -> None:
    broker.bind(Doors(upstream.port))
    routes = {
        "api": "http://db.recess.internal:80/v1",
        "tls": "https://db.recess.internal",
        "no": "http://gone.recess.internal",
    }
    broker.register("m1", 1, build_policy([], routes))
    guest = await connect()
    status, _, body = await guest.ask(b"GET /route/api/x HTTP/1.1\r\nHost: p\r\n\r\n")
    assert (status, body) == (200, b"hello")
    assert upstream.requests[0].startswith(b"GET /v1/x ")
    status, _, body = await (await connect()).ask(b"GET /route/tls/x HTTP/1.1\r\nHost: p\r\n\r\n")
    assert status == 403
    status, _, body = await (await connect()).ask(b"GET /route/no/x HTTP/1.1\r\nHost: p\r\n\r\n")
    assert status == 503
    assert "gone" in str(problem(body)["message"])


async def test_without_anybody_who_knows_the_machines_none_is_reached(connect, broker) -> None:
    broker.register("m1", 1, build_policy(["db.recess.internal:80"]))
    status, _, body = await (await connect()).ask(b"GET http://db.recess.internal/ HTTP/1.1\r\nHost: p\r\n\r\n")
    assert status == 503
    assert "not reach each other" in str(problem(body)["message"])
