"""A secret on its way: real TLS on both sides, urllib as the guest, an upstream that records what reaches it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import time
import urllib.error
import urllib.request

import pytest

from recess.broker import Authorities, Broker, SecretStore, SystemDialer, build_policy
from recess.broker.placeholders import parse_bindings
from recess.clock import SystemClock
from recess.errors import Corrupt, Refused
from recess.testing.proxy_port import ProxyPort

VALUE = "sk-the-real-one"
HELD = "recess-secret-TOKEN"


class Scene:
    """A TLS upstream on loopback, a broker in front of it, and a guest that trusts the machine's authority."""

    def __init__(self, broker, upstream, proxy, trusted):
        self.broker, self.upstream, self.proxy, self.trusted = broker, upstream, proxy, trusted

    async def ask(self, path="/", headers=None, *, host="localhost", cafile=None):
        """Ask the upstream through the proxy as urllib does; return status and body."""
        context = ssl.create_default_context(cadata=self.trusted if cafile is None else cafile)
        handlers = [
            urllib.request.ProxyHandler({"https": f"http://127.0.0.1:{self.proxy.port}"}),
            urllib.request.HTTPSHandler(context=context),
        ]
        request = urllib.request.Request(f"https://{host}:{self.upstream.port}{path}", headers=headers or {})

        def go():
            try:
                with urllib.request.build_opener(*handlers).open(request, timeout=30) as reply:
                    return reply.status, reply.read()
            except urllib.error.HTTPError as exc:
                with exc:
                    return exc.code, exc.read()

        return await asyncio.to_thread(go)


@contextlib.asynccontextmanager
async def scene(tmp_path, upstream, gate, *, secrets=None, bound="localhost", extra=None):
    upstream_key = Authorities(tmp_path / "upstream.key")
    its = upstream_key.open("ca_up", parse_bindings(["U@localhost,127.0.0.1"]))
    server = await asyncio.start_server(
        upstream.serve, "127.0.0.1", 0, ssl=upstream_key.server_context(its, "localhost", time.time())
    )
    upstream.port = server.sockets[0].getsockname()[1]
    trust = ssl.create_default_context(cadata=its.certificate.decode())
    store = SecretStore(extra={"TOKEN": VALUE} if secrets is None else secrets)
    authorities = Authorities(tmp_path / "home.key")
    broker = Broker(gate, store, SystemClock(), dialer=SystemDialer(trust), authorities=authorities)
    policy = build_policy(
        [f"127.0.0.1:{upstream.port}", *(extra or [])], {}, [f"TOKEN@{bound}:{upstream.port}"], authority="ca_m1"
    )
    broker.register("m1", 1, policy)
    trusted = broker.certificate(policy).decode()
    async with ProxyPort(broker.handler("m1")) as proxy:
        yield Scene(broker, upstream, proxy, trusted)
    server.close()


@pytest.fixture
async def plain(upstream):
    """The raw upstream without its plain listener's port: a scene gives it one with TLS."""
    return upstream


async def test_the_upstream_gets_the_secret_and_the_guest_never_holds_it(tmp_path, plain, gate):
    async with scene(tmp_path, plain, gate) as at:
        basic = base64.b64encode(f"git:{HELD}".encode()).decode()
        status, body = await at.ask("/v1?key=" + HELD, {"Authorization": f"Bearer {HELD}", "X-Basic": basic})
        assert (status, body) == (200, b"hello")
        (sent,) = plain.requests
        assert f"GET /v1?key={VALUE} HTTP/1.1".encode() in sent
        assert f"Bearer {VALUE}".encode() in sent
        assert HELD.encode() not in sent
        assert VALUE not in repr(at.broker.decisions("m1"))
        assert [(d.verb, d.allowed) for d in at.broker.decisions("m1")] == [("connect", True), ("https", True)]


async def test_git_over_https_sends_its_token_as_a_password(tmp_path, plain, gate):
    async with scene(tmp_path, plain, gate) as at:
        pair = base64.b64encode(f"x-access-token:{HELD}".encode()).decode()
        await at.ask("/", {"Authorization": f"Basic {pair}"})
        assert base64.b64encode(f"x-access-token:{VALUE}".encode()) in plain.requests[0]


async def test_a_host_it_is_not_bound_to_gets_the_placeholder(tmp_path, plain, gate):
    async with scene(tmp_path, plain, gate, bound="elsewhere.test", extra=["localhost:*"]) as at:
        upstream_ca = Authorities(tmp_path / "upstream.key").open("ca_up", parse_bindings(["U@localhost,127.0.0.1"]))
        status, _ = await at.ask("/", {"Authorization": f"Bearer {HELD}"}, cafile=upstream_ca.certificate.decode())
        assert status == 200  # a plain tunnel: the guest saw the upstream's own certificate
        assert HELD.encode() in plain.requests[0]
        assert VALUE.encode() not in plain.requests[0]


async def test_a_request_without_the_placeholder_needs_no_secret(tmp_path, plain, gate):
    async with scene(tmp_path, plain, gate, secrets={}) as at:
        assert (await at.ask("/"))[0] == 200
        status, body = await at.ask("/", {"Authorization": f"Bearer {HELD}"})
        assert status == 503
        assert b"recess secrets set TOKEN" in body
        assert len(plain.requests) == 1  # the second never went out


async def test_an_upstream_that_cannot_prove_itself_gets_nothing(tmp_path, plain, gate):
    async with scene(tmp_path, plain, gate, bound="127.0.0.1") as at:
        # Its certificate says localhost; asked for by its address it is somebody else.
        status, body = await at.ask("/", {"Authorization": f"Bearer {HELD}"}, host="127.0.0.1")
        assert status == 503
        assert b"certificate verify failed" in body
        assert plain.requests == []


async def test_a_fenced_machine_is_refused_inside_an_open_connection_too(tmp_path, plain, gate):
    async with scene(tmp_path, plain, gate) as at:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.proxy.port)
        writer.write(f"CONNECT localhost:{plain.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        trust = ssl.create_default_context(cadata=at.trusted)
        await writer.start_tls(trust, server_hostname="localhost")
        ask = f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {HELD}\r\n\r\n".encode()
        writer.write(ask)
        assert b"200" in await reader.readuntil(b"hello")
        gate.close()
        with contextlib.suppress(OSError):
            writer.write(ask)
            await reader.read()
        assert len(plain.requests) == 1
        writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()


@pytest.mark.parametrize("sent", [b"SSH-2.0-x\r\n", b"\x16\x03\x01\x00\x05hello", b"\x16" + b"\xff" * 400_000])
async def test_what_is_no_tls_ends_the_connection_and_is_told(tmp_path, plain, gate, sent):
    async with scene(tmp_path, plain, gate) as at:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.proxy.port)
        writer.write(f"CONNECT localhost:{plain.port} HTTP/1.1\r\nHost: x\r\n\r\n".encode() + sent)
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(OSError):
            await reader.read()
        assert [d.allowed for d in at.broker.decisions("m1")] == [True, False]
        assert plain.requests == []
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_an_authority_vouches_for_its_hosts_alone(tmp_path, plain, gate):
    authorities = Authorities(tmp_path / "home.key")
    mine = authorities.open("ca_m1", parse_bindings(["T@api.test"]))
    upstream = await asyncio.start_server(
        plain.serve, "127.0.0.1", 0, ssl=authorities.server_context(mine, "bank.test", time.time())
    )
    trust = ssl.create_default_context(cadata=mine.certificate.decode())
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
        await asyncio.open_connection(
            "127.0.0.1", upstream.sockets[0].getsockname()[1], ssl=trust, server_hostname="bank.test"
        )
    upstream.close()


def test_a_fork_goes_on_with_what_it_trusts_and_another_machine_does_not(tmp_path):
    bound = parse_bindings(["T@api.test"])
    one, other = Authorities(tmp_path / "k"), Authorities(tmp_path / "k")
    numbers = [a.open(i, bound).key.private_numbers() for a, i in ((one, "ca_1"), (other, "ca_1"), (one, "ca_2"))]
    assert numbers[0] == numbers[1]
    assert numbers[0] != numbers[2]
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600


def test_a_key_that_is_open_or_damaged_is_not_used(tmp_path):
    authorities = Authorities(tmp_path / "k")
    authorities.open("ca_1", ())
    (tmp_path / "k").chmod(0o644)
    with pytest.raises(Refused, match="open to others"):
        authorities.open("ca_1", ())
    (tmp_path / "k").chmod(0o600)
    (tmp_path / "k").write_bytes(b"short")
    with pytest.raises(Corrupt, match="damaged"):
        authorities.open("ca_1", ())
