"""A guest that lies, floods, stalls or dies: the host's side of one link, against scripted bytes."""

import asyncio
import contextlib
import json
import socket
import struct
import time

import pytest

from recess.errors import GuestFailed, NotFound, Timeout
from recess.guestlink import ExecRequest, Link, Thaw, client, connect
from recess.guestlink.frames import MAX_PAYLOAD, PAD, WINDOW, Decoder, Frame, Kind, encode
from recess.guestlink.link import WakeUp


class Guest:
    """The other end of a channel, played by the test."""

    def __init__(self, reader, writer):
        self.reader, self.writer, self.decoder = reader, writer, Decoder()

    async def get(self, kind):
        """Return the next frame of this kind; others are skipped."""
        while True:
            while (item := self.decoder.next()) is not None:
                if isinstance(item, Frame) and item.kind == kind:
                    return item
            data = await self.reader.read(65536)
            assert data, f"the host hung up before {kind!r}"
            self.decoder.feed(data)

    def put(self, kind, stream, payload=b"", flags=0):
        self.writer.write(encode(kind, flags, stream, payload))

    def body(self, kind, stream, body):
        self.put(kind, stream, json.dumps(body).encode())

    async def greet(self, **changes):
        hello = json.loads((await self.get(Kind.HELLO)).payload)
        self.body(Kind.HELLO, 0, {"proto": 1, "nonce": hello["nonce"], "guestd": "9", **changes})

    async def hung_up(self):
        """Return when the host has closed the channel."""
        async with asyncio.timeout(5):
            while await self.reader.read(65536):
                pass


@pytest.fixture
async def ends():
    a, b = socket.socketpair()
    host = await asyncio.open_connection(sock=a)
    guest = Guest(*await asyncio.open_connection(sock=b))
    yield host, guest
    for writer in (host[1], guest.writer):
        writer.close()
    await asyncio.gather(host[1].wait_closed(), guest.writer.wait_closed(), return_exceptions=True)


@pytest.fixture
async def linked(ends):
    host, guest = ends
    link, _ = await asyncio.gather(connect(*host, hello_timeout_s=5), guest.greet())
    yield link, guest
    await link.close()


async def started(link: Link, guest: Guest):
    """Start a job: returns the handle and its stream number."""
    task = asyncio.create_task(link.exec(ExecRequest(["x"], stdin=True)))
    request = await guest.get(Kind.REQUEST)
    number = json.loads(request.payload)["stream"]
    row = {"job_id": "j", "pid": 5, "argv": [], "label": "", "started_s": 0.0, "exit_code": None}
    guest.body(Kind.REPLY, request.stream, {"ok": row})
    return await task, number


async def test_a_silent_guest_times_out(ends):
    host, _ = ends
    with pytest.raises(Timeout, match="hello"):
        await connect(*host, hello_timeout_s=0.05)


async def test_a_guest_that_hangs_up(ends):
    host, guest = ends
    guest.writer.close()
    with pytest.raises(GuestFailed):
        await connect(*host, hello_timeout_s=5)


def new_wake(**changes):
    return WakeUp(lambda: Thaw(5, b"e" * 32, "gen", 3, "dev", "mch_1", **changes))


async def test_a_guest_that_takes_no_thaw_with_the_hello_gets_it_later(ends):
    host, guest = ends
    wake = new_wake()
    link, _ = await asyncio.gather(connect(*host, hello_timeout_s=5, wake=wake), guest.greet(takes=["token"]))
    assert wake.answer is None
    guest.body(Kind.REPLY, 0, {"ok": {}})  # nor may it answer one
    await asyncio.wait_for(link.wait_closed(), 5)
    assert "not made" in link.failure.message
    await link.close()


async def test_a_thaw_with_the_hello_is_answered_in_time_or_the_guest_has_failed(ends):
    host, guest = ends
    wake = new_wake()
    link, _ = await asyncio.gather(connect(*host, hello_timeout_s=5, wake=wake), guest.greet(takes=["hello"]))
    with pytest.raises(Timeout, match="thaw"):
        await wake.answer(0.05)
    guest.body(Kind.REPLY, 0, {"ok": {}})  # too late, and no lie: the link lives
    task = asyncio.create_task(link.ping())
    ping = await guest.get(Kind.PING)
    guest.put(Kind.PONG, ping.stream)
    await task
    await link.close()


async def test_a_clock_set_long_ago_is_set_again(ends, monkeypatch):
    host, guest = ends
    monkeypatch.setattr(client, "CLOCK_LATE_S", -1.0)
    wake = new_wake()
    link, _ = await asyncio.gather(connect(*host, hello_timeout_s=5, wake=wake), guest.greet(takes=["hello"]))
    guest.body(Kind.REPLY, 0, {"ok": {}})
    task = asyncio.create_task(wake.answer(5))
    request = await guest.get(Kind.REQUEST)
    assert json.loads(request.payload) == {"op": "clock", "wall_ns": 5}
    guest.body(Kind.REPLY, request.stream, {"ok": {}})
    await task
    await link.close()


async def test_a_thaw_too_long_for_a_hello_stays_out(ends):
    host, guest = ends
    wake = new_wake(env={"LONG": "x" * MAX_PAYLOAD})
    task = asyncio.create_task(connect(*host, hello_timeout_s=5, wake=wake))
    hello = json.loads((await guest.get(Kind.HELLO)).payload)
    assert sorted(hello) == ["nonce", "proto"]
    guest.body(Kind.HELLO, 0, {"proto": 1, "nonce": hello["nonce"], "takes": ["hello"]})
    link = await task
    assert wake.answer is None
    await link.close()


async def test_another_protocol_is_refused(ends):
    host, guest = ends
    with pytest.raises(GuestFailed, match="protocol 2"):
        await asyncio.gather(connect(*host, hello_timeout_s=5), guest.greet(proto=2))


async def test_the_leavings_of_an_earlier_connection_are_skipped(ends):
    host, guest = ends
    old = encode(Kind.DATA, 1, 3, b"old output")
    guest.writer.write(old[7:] + old + b"noise")
    guest.body(Kind.HELLO, 0, {"proto": 1, "nonce": "0" * 32})
    link, _ = await asyncio.gather(connect(*host, hello_timeout_s=5), guest.greet())
    assert link.hello.guestd == "9"
    await link.close()


async def test_a_hello_that_met_a_cut_frame_is_repeated_behind_padding(ends):
    host, guest = ends
    cut = encode(Kind.DATA, 0, 3, bytes(MAX_PAYLOAD))[:100]
    guest.decoder.feed(cut)  # what a dying host left: guestd waits for the rest and swallows the first hello
    assert guest.decoder.next() is None
    link, _ = await asyncio.gather(connect(*host, hello_timeout_s=10), guest.greet())
    guest.body(Kind.HELLO, 0, {"proto": 1, "nonce": link.hello.nonce})  # the answer to the repetition
    task = asyncio.create_task(link.ping())
    ping = await guest.get(Kind.PING)
    guest.put(Kind.PONG, ping.stream)
    assert await task > 0
    await link.close()


async def test_a_flood_before_the_hello_is_stopped(ends):
    host, guest = ends

    async def flood():
        with contextlib.suppress(OSError):  # the host hangs up
            while True:
                guest.writer.write(PAD)
                await guest.writer.drain()

    async def refused():
        with pytest.raises(GuestFailed, match="flood"):
            await connect(*host, hello_timeout_s=30)
        host[1].close()

    await asyncio.gather(flood(), refused())


LIES = {
    "bytes that are no frame": b"login: ",
    "a reply to nothing": encode(Kind.REPLY, 0, 77, b'{"ok":1}'),
    "a pong without ping": encode(Kind.PONG, 0, 4711, b""),
    "a reply that never ends": b"".join(encode(Kind.REPLY, 1, 1, bytes(MAX_PAYLOAD)) for _ in range(9)),
    "two replies mixed": encode(Kind.REPLY, 1, 1, b"{") + encode(Kind.REPLY, 0, 2, b"}"),
    "an odd number opened": encode(Kind.OPEN, 0, 3, b'{"service":"proxy"}'),
    "a malformed open": encode(Kind.OPEN, 0, 2, b'{"service":7}'),
    "desync": encode(Kind.DESYNC, 0, 0, b""),
    "frames for streams that do not exist": b"".join(encode(Kind.DATA, 0, 9, bytes(MAX_PAYLOAD)) for _ in range(4)),
    "tiny frames for streams that do not exist": encode(Kind.EOF, 0, 9, b"") * 2000,
    "unknown types without end": encode(99, 0, 0, bytes(1000)) * 100,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
async def test_a_lie_ends_the_link(linked, lie):
    link, guest = linked
    waiting = asyncio.create_task(link.ping())
    await guest.get(Kind.PING)
    guest.writer.write(lie)
    with pytest.raises(GuestFailed):
        await waiting
    await guest.hung_up()
    assert await link.wait_closed()
    with pytest.raises(GuestFailed):
        await link.info()


JOB_LIES = {
    "output beyond the credit": [(Kind.DATA, 1, bytes(MAX_PAYLOAD))] * (WINDOW // MAX_PAYLOAD + 1),
    "credit that was never used": [(Kind.CREDIT, 0, struct.pack("<I", 1))],
    "output on no channel": [(Kind.DATA, 3, b"x")],
    "output in place of a gap": [(Kind.DATA, 0, b"x")],
    "no credit": [(Kind.CREDIT, 0, struct.pack("<I", 0))],
    "malformed credit": [(Kind.CREDIT, 0, b"\1")],
    "an impossible exit code": [(Kind.EXIT, 0, b'{"exit_code":4711}')],
    "a malformed exit": [(Kind.EXIT, 0, b"{}")],
    "a malformed reset": [(Kind.RESET, 0, b"[]")],
    "an open on a job's stream": [(99, 0, b"")],
}


@pytest.mark.parametrize("frames", JOB_LIES.values(), ids=JOB_LIES.keys())
async def test_a_lie_about_a_job_ends_the_link(linked, frames):
    link, guest = linked
    job, number = await started(link, guest)
    for kind, flags, payload in frames:
        guest.put(kind, number, payload, flags)
    await guest.hung_up()
    with pytest.raises(GuestFailed):
        async for _ in job.output():
            pass
    assert link.failure is not None


async def test_empty_frames_cost_nothing(linked):
    link, guest = linked
    job, number = await started(link, guest)
    for _ in range(5000):
        guest.put(Kind.DATA, number, b"", 1)
    guest.put(Kind.DATA, number, b"x", 1)
    guest.body(Kind.EXIT, number, {"exit_code": 0})
    await job.wait()
    assert [piece async for piece in job.output()] == [(0, b""), (1, b"x")]


async def test_output_in_crumbs_is_kept_within_bounds_while_somebody_waits(linked):
    link, guest = linked
    job, number = await started(link, guest)
    waiting = asyncio.create_task(job.wait())
    await asyncio.sleep(0)  # it absorbs from here on
    begun, rounds = time.process_time(), 40_000
    for n in range(rounds):
        guest.put(Kind.DATA, number, b"x", 1 + n % 2)
        if n % 1000 == 0:
            await guest.writer.drain()
            await asyncio.sleep(0)
    guest.body(Kind.EXIT, number, {"exit_code": 0})
    assert await waiting == 0
    pieces = [piece async for piece in job.output()]
    assert pieces[0] == (0, b"")
    assert rounds / 2 < len(pieces) < 33_000
    assert time.process_time() - begun < 15  # quadratic, it was twice that


async def test_output_that_a_reader_left_is_counted_again(linked):
    link, guest = linked
    job, number = await started(link, guest)
    guest.put(Kind.DATA, number, b"one", 1)
    guest.put(Kind.DATA, number, bytes(MAX_PAYLOAD), 2)
    output = job.output()
    assert await anext(output) == (1, b"one")
    await output.aclose()
    waiting = asyncio.create_task(job.wait())
    credit = await guest.get(Kind.CREDIT)
    assert struct.unpack("<I", credit.payload)[0] == MAX_PAYLOAD + 3
    guest.body(Kind.EXIT, number, {"exit_code": 3})
    assert await waiting == 3
    assert [len(data) async for _, data in job.output()] == [MAX_PAYLOAD]


async def test_unread_output_holds_the_guest_and_reading_frees_it(linked):
    link, guest = linked
    job, number = await started(link, guest)
    for _ in range(WINDOW // MAX_PAYLOAD):
        guest.put(Kind.DATA, number, bytes(MAX_PAYLOAD), 1)
    output = job.output()
    first = await anext(output)
    assert len(first[1]) == MAX_PAYLOAD
    credit = await guest.get(Kind.CREDIT)
    assert struct.unpack("<I", credit.payload)[0] == MAX_PAYLOAD
    guest.put(Kind.DATA, number, bytes(MAX_PAYLOAD), 1)
    assert len((await anext(output))[1]) == MAX_PAYLOAD
    await output.aclose()


async def test_writing_waits_for_credit(linked):
    link, guest = linked
    job, number = await started(link, guest)
    writing = asyncio.create_task(job.write(bytes(WINDOW + 1)))
    got = 0
    while got < WINDOW:
        got += len((await guest.get(Kind.DATA)).payload)
    assert not writing.done()
    guest.put(Kind.CREDIT, number, struct.pack("<I", 1000))
    assert len((await guest.get(Kind.DATA)).payload) == 1
    await writing


async def test_requests_time_out_and_late_answers_are_dropped(linked):
    link, guest = linked
    with pytest.raises(Timeout, match="freeze"):
        await link.freeze(timeout_s=-0.49)
    request = await guest.get(Kind.REQUEST)
    guest.body(Kind.REPLY, request.stream, {"ok": {}})
    task = asyncio.create_task(link.stat("/x"))
    request = await guest.get(Kind.REQUEST)
    guest.body(Kind.REPLY, request.stream, {"error": {"kind": "not_found", "message": "/x: gone"}})
    with pytest.raises(NotFound, match="gone"):
        await task
    assert link.failure is None


async def test_a_file_longer_than_it_may_be(linked):
    link, guest = linked
    task = asyncio.create_task(link.read_file("/x", limit=10))
    request = await guest.get(Kind.REQUEST)
    guest.body(Kind.REPLY, request.stream, {"ok": {"size": 3}})
    guest.put(Kind.DATA, json.loads(request.payload)["stream"], bytes(11))
    with pytest.raises(GuestFailed, match="more than 10"):
        await task


async def test_a_cut_channel_fails_everything_that_waits(linked):
    link, guest = linked
    job, _ = await started(link, guest)
    tasks = [asyncio.create_task(c) for c in (link.ping(), link.info(), job.wait(), job.write(bytes(WINDOW * 2)))]
    await guest.get(Kind.PING)
    guest.writer.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(r) for r in results] == [GuestFailed] * 4
    assert "cut" in await link.wait_closed()
    await job.detach()
    await link.close()
    await link.close()


async def test_streams_without_a_handler_are_refused(linked):
    link, guest = linked
    guest.body(Kind.OPEN, 2, {"service": "session", "meta": {}})
    assert (await guest.get(Kind.RESET)).stream == 2
    assert link.failure is None


async def test_a_failing_handler_ends_its_stream_alone(linked):
    link, guest = linked

    async def handler(service, meta, stream):
        if meta["n"] == 1:
            raise GuestFailed("no")
        await stream.write(service.encode())

    link.serve_incoming(handler)
    assert (await guest.get(Kind.LISTEN)).flags == 1
    guest.body(Kind.OPEN, 2, {"service": "session", "meta": {"n": 1}})
    assert (await guest.get(Kind.RESET)).flags == 0
    guest.body(Kind.OPEN, 4, {"service": "session", "meta": {"n": 2}})
    assert (await guest.get(Kind.DATA)).payload == b"session"
    assert (await guest.get(Kind.RESET)).flags == 1  # delivered first, then closed


async def test_too_many_streams_end_the_link(linked):
    link, guest = linked
    never = asyncio.Event()

    async def handler(service, meta, stream):
        await never.wait()

    link.serve_incoming(handler)
    for i in range(257):
        guest.body(Kind.OPEN, 2 + 2 * i, {"service": "proxy", "meta": {}})
    await guest.hung_up()
    assert "256" in await link.wait_closed()


async def test_a_guest_that_does_not_read_is_given_up(linked):
    link, _ = linked
    with contextlib.suppress(GuestFailed):
        while link.failure is None:
            link.send(Kind.PING, 0, 0, bytes(MAX_PAYLOAD))
    assert "does not read" in await link.wait_closed()
