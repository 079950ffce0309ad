"""What every guest must do over its link, whatever it runs in: inherit `GuestLinkSuite` and give it a `guest` fixture.

The guest needs a POSIX shell, coreutils and, for the socket tests, python3. Nothing here sleeps: each wait is for an
event of the guest, bounded by the link's own timeouts.
"""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from recess.errors import BadInput, GuestFailed, IllegalState, NotFound, Unavailable
from recess.guestlink import ByteStream, ExecRequest, GuestLink, Job, Thaw, wire
from recess.guestlink.frames import Decoder, Frame, Kind, encode
from recess.guestlink.link import TarReader, WakeUp
from recess.testing.guestlink_process import GuestUnderTest

BOUND_S = 30.0

ECHO_SERVER = """
import socket, sys
s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1], flush=True)
c, _ = s.accept()
while data := c.recv(65536): c.sendall(data)
c.sendall(b"bye"); c.close()
"""

UNIX_SERVER = """
import socket, sys
s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print("ready", flush=True)
c, _ = s.accept()
n = 0
while data := c.recv(65536): n += len(data)
c.sendall(str(n).encode()); c.close()
"""

UNIX_CLIENT = """
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b"hello"); s.shutdown(socket.SHUT_WR)
out = b""
while data := s.recv(65536): out += data
sys.stdout.write(out.decode())
"""

UNIX_HOLDER = """
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b"hi"); print("connected", flush=True)
print("end", repr(s.recv(100)), flush=True)
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b"again"); s.shutdown(socket.SHUT_WR)
print(s.recv(100).decode(), flush=True)
"""


def thaw_with(generation: str, env: Mapping[str, str]) -> Thaw:
    """Return a thaw for tests."""
    return Thaw(time.time_ns(), os.urandom(32), generation, 7, "suite-host", "mch_suite", env)


async def finish(job: Job) -> tuple[int, bytes, bytes]:
    """Read a job to its end: exit code, stdout, stderr."""
    parts = {0: b"", 1: b"", 2: b""}
    async for channel, data in job.output():
        parts[channel] += data
    return await job.wait(), parts[1], parts[2]


async def run(link: GuestLink, *argv: str, **options: Any) -> tuple[int, bytes, bytes]:
    """Run a command to its end."""
    async with asyncio.timeout(BOUND_S):
        return await finish(await link.exec(ExecRequest(argv, **options)))


async def read_line(stream: AsyncIterator[tuple[int, bytes]]) -> str:
    """Return the next line of a job's output; more than the line in one piece is dropped by design of the callers."""
    text = b""
    async with asyncio.timeout(BOUND_S):
        async for _, data in stream:
            text += data
            if b"\n" in text:
                break
    return text.decode().strip()


class GuestLinkSuite:
    """The contract of `recess.guestlink.link.GuestLink`."""

    async def test_ping_info_and_stats(self, guest: GuestUnderTest) -> None:
        assert await guest.link.ping() < 5
        info = await guest.link.info()
        assert info["frozen"] is False
        assert info["boot_id"] == guest.link.hello.boot_id
        stats = await guest.link.stats()
        assert stats["memory_total_bytes"] > stats["memory_available_bytes"] > 0

    async def test_exec_gives_output_and_exit_code(self, guest: GuestUnderTest) -> None:
        assert await run(guest.link, "sh", "-c", "echo out; echo err >&2; exit 3") == (3, b"out\n", b"err\n")
        assert await run(guest.link, "sh", "-c", "kill -9 $$") == (137, b"", b"")
        code, out, _ = await run(
            guest.link, "sh", "-c", 'echo "$A $(pwd)"; read x || echo eof', env={"A": "b c"}, cwd="/tmp"
        )
        assert (code, out) == (0, b"b c /tmp\neof\n")

    async def test_exec_that_cannot_start(self, guest: GuestUnderTest) -> None:
        with pytest.raises(NotFound) as missing:
            await guest.link.exec(ExecRequest(["no-such-program"]))
        assert missing.value.details["exit_code"] == 127
        with pytest.raises(BadInput) as data:
            await guest.link.exec(ExecRequest(["/etc/passwd"]))
        assert data.value.details["exit_code"] == 126
        with pytest.raises(BadInput, match="folder"):
            await guest.link.exec(ExecRequest(["true"], cwd="/no/such"))
        with pytest.raises(BadInput):
            await guest.link.exec(ExecRequest([]))
        assert await guest.link.jobs() == []

    async def test_users(self, guest: GuestUnderTest) -> None:
        if not guest.switches_users:  # an ordinary user's guestd: everybody is that user
            own = (await run(guest.link, "id", "-u"))[1]
            assert (await run(guest.link, "id", "-u", user="daemon"))[1] == own != b"0\n"
            return
        assert (await run(guest.link, "id", "-u", user="daemon"))[1] == b"1\n"
        assert (await run(guest.link, "sh", "-c", "id -u; id -g; id -G", user="123:45"))[1] == b"123\n45\n45\n"
        with pytest.raises(BadInput, match="no such user"):
            await guest.link.exec(ExecRequest(["true"], user="nobody-of-this-name"))

    async def test_stdin_larger_than_every_buffer(self, guest: GuestUnderTest) -> None:
        job = await guest.link.exec(ExecRequest(["cat"], stdin=True))
        data = os.urandom(1 << 20)

        async def feed() -> None:
            await job.write(data)
            await job.close_stdin()

        feeding = asyncio.create_task(feed())
        async with asyncio.timeout(BOUND_S):
            assert await finish(job) == (0, data, b"")
            await feeding

    async def test_an_attached_reader_gets_every_byte(self, guest: GuestUnderTest) -> None:
        code, out, _ = await run(guest.link, "head", "-c", "5000000", "/dev/zero")
        assert (code, len(out)) == (0, 5_000_000)

    async def test_wait_alone_does_not_hold_the_process(self, guest: GuestUnderTest) -> None:
        job = await guest.link.exec(ExecRequest(["sh", "-c", "head -c 3000000 /dev/zero; echo last"]))
        async with asyncio.timeout(BOUND_S):
            assert await job.wait() == 0
            pieces = [piece async for piece in job.output()]
        assert pieces[0] == (0, b"")
        assert pieces[-1][1].endswith(b"last\n")
        assert 500_000 < sum(len(data) for _, data in pieces) <= 1 << 20

    async def test_terminal(self, guest: GuestUnderTest) -> None:
        job = await guest.link.exec(
            ExecRequest(["sh", "-c", "trap 'stty size; exit 4' WINCH; stty size; while :; do read x; done"], tty=True, stdin=True, rows=30, cols=90)
        )  # fmt: skip
        lines = job.output()
        assert await read_line(lines) == "30 90"
        await job.resize(40, 100)
        assert await read_line(lines) == "40 100"
        assert await job.wait() == 4

    async def test_end_of_file_on_a_terminal(self, guest: GuestUnderTest) -> None:
        job = await guest.link.exec(ExecRequest(["cat"], tty=True, stdin=True))
        await job.write(b"abc\n")
        await job.close_stdin()
        async with asyncio.timeout(BOUND_S):
            assert await finish(job) == (0, b"abc\r\nabc\r\n", b"")

    async def test_signals_reach_the_group(self, guest: GuestUnderTest) -> None:
        job = await guest.link.exec(ExecRequest(["sh", "-c", "sleep 1000 & echo up; wait"]))
        assert await read_line(job.output()) == "up"
        await job.signal(15)
        assert await job.wait() == 143
        with pytest.raises(IllegalState):
            await job.signal(15)

    async def test_a_child_left_behind_does_not_hold_the_end(self, guest: GuestUnderTest) -> None:
        assert await run(guest.link, "sh", "-c", "sleep 30 & echo done") == (0, b"done\n", b"")

    async def test_job_table(self, guest: GuestUnderTest) -> None:
        job = await guest.link.exec(
            ExecRequest(["sh", "-c", "echo once; read x"], stdin=True, job_id="mine", label="note")
        )
        again = await guest.link.exec(ExecRequest(["echo", "twice"], job_id="mine"))
        assert (again.job_id, again.pid) == ("mine", job.pid)
        assert await read_line(again.output()) == "once"
        (row,) = await guest.link.jobs()
        assert (row.job_id, row.label, row.exit_code, row.argv[0]) == ("mine", "note", None, "sh")
        with pytest.raises(IllegalState):
            await guest.link.forget("mine")
        await job.write(b"\n")
        assert await job.wait() == 0
        assert (await guest.link.jobs())[0].exit_code == 0
        await guest.link.forget("mine")
        assert await guest.link.jobs() == []
        with pytest.raises(NotFound):
            await guest.link.attach("mine")

    async def test_jobs_outlive_the_connection(self, guest: GuestUnderTest) -> None:
        job = await guest.link.exec(
            ExecRequest(["sh", "-c", "echo one; read x; echo two; exit 6"], stdin=True, job_id="long")
        )
        assert await read_line(job.output()) == "one"
        link = await guest.reconnect()
        with pytest.raises(GuestFailed):
            await job.wait()
        again = await link.attach("long")
        assert again.pid == job.pid
        await again.write(b"go\n")
        async with asyncio.timeout(BOUND_S):
            assert await finish(again) == (6, b"one\ntwo\n", b"")
        assert await finish(await link.attach("long")) == (6, b"one\ntwo\n", b"")

    async def test_missed_output_is_told(self, guest: GuestUnderTest) -> None:
        script = "head -c 2000000 /dev/zero; echo end; echo over > $MARK; read x"
        fifo = f"{guest.scratch}/mark"
        await run(guest.link, "mkfifo", fifo)
        job = await guest.link.exec(ExecRequest(["sh", "-c", script], stdin=True, job_id="loud", env={"MARK": fifo}))
        await job.detach()
        assert (await run(guest.link, "cat", fifo))[1] == b"over\n"
        again = await guest.link.attach("loud")
        await again.close_stdin()
        pieces = [piece async for piece in again.output()]
        assert pieces[0] == (0, b"")
        assert pieces[-1][1].endswith(b"end\n")
        assert sum(len(data) for _, data in pieces) <= 256 * 1024

    async def test_files(self, guest: GuestUnderTest) -> None:
        link, path = guest.link, f"{guest.scratch}/deep/er/file"
        data = os.urandom(300_000)
        await link.write_file(path, b"old")
        await link.write_file(path, data, 0o600)
        assert await link.read_file(path) == data
        stat = await link.stat(path)
        assert (stat.kind, stat.size, stat.mode, stat.path) == ("file", 300_000, 0o600, path)
        assert [row.path for row in await link.list_dir(f"{guest.scratch}/deep/er")] == [path]
        with pytest.raises(BadInput, match="limit"):
            await link.read_file(path, limit=1000)
        with pytest.raises(BadInput, match="not empty"):
            await link.remove(f"{guest.scratch}/deep")
        await link.remove(f"{guest.scratch}/deep", recursive=True)
        await link.remove(f"{guest.scratch}/deep", recursive=True)
        for missing in (link.stat(path), link.read_file(path), link.list_dir(path)):
            with pytest.raises(NotFound):
                await missing
        for wrong in (link.stat("relative"), link.read_file(guest.scratch), link.write_file(guest.scratch, b"")):
            with pytest.raises(BadInput):
                await wrong
        assert await link.read_file("/proc/self/comm") != b""

    async def test_long_listings_and_requests(self, guest: GuestUnderTest) -> None:
        await run(
            guest.link, "sh", "-c", f"cd {guest.scratch} && i=0; while [ $i -lt 700 ]; do : > f$i; i=$((i+1)); done"
        )
        assert len(await guest.link.list_dir(guest.scratch)) == 700
        big = "x" * 100_000
        assert (await run(guest.link, "sh", "-c", "echo ${#BIG}", env={"BIG": big}))[1] == b"100000\n"
        with pytest.raises(BadInput, match="longer"):
            await guest.link.exec(ExecRequest(["true", big, big, big]))

    async def test_tar(self, guest: GuestUnderTest) -> None:
        long_name = "/".join(["d" * 60] * 3) + "/file"
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, data in (("a/f", b"hello"), (long_name, os.urandom(200_000)), ("ünï", b"")):
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(data), 0o640
                tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("l")
            link.type, link.linkname = tarfile.SYMTYPE, "a/f"
            tar.addfile(link)
        await guest.link.put_tar(f"{guest.scratch}/t", pieces(archive.getvalue()))
        assert await guest.link.read_file(f"{guest.scratch}/t/l") == b"hello"
        assert (await guest.link.stat(f"{guest.scratch}/t/{long_name}")).size == 200_000
        assert (await guest.link.stat(f"{guest.scratch}/t/ünï")).mode == 0o640
        evil = io.BytesIO()
        with tarfile.open(fileobj=evil, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("../out"), io.BytesIO())
        with pytest.raises(BadInput, match="refused"):
            await guest.link.put_tar(f"{guest.scratch}/t", pieces(evil.getvalue()))
        with pytest.raises(BadInput, match="cut"):
            await guest.link.put_tar(f"{guest.scratch}/t", pieces(archive.getvalue()[:150_000]))

    async def test_a_large_file_arrives_whole_however_far_ahead_it_was_sent(self, guest: GuestUnderTest) -> None:
        content = os.urandom(1 << 20) * 4 + b"the end"  # past the size from which it is written past the page cache
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name in ("large", "small"):
                info = tarfile.TarInfo(name)
                info.size = len(content) if name == "large" else 3
                tar.addfile(info, io.BytesIO(content[: info.size]))
        await guest.link.put_tar(f"{guest.scratch}/big", pieces(archive.getvalue()))
        assert await guest.link.read_file(f"{guest.scratch}/big/large", len(content)) == content
        assert await guest.link.read_file(f"{guest.scratch}/big/small") == content[:3]

    async def test_tar_of_a_folder(self, guest: GuestUnderTest) -> None:
        link, root = guest.link, f"{guest.scratch}/read"
        assert isinstance(link, TarReader)
        content = os.urandom(300_000)
        await link.write_file(f"{root}/deep/{'n' * 120}", content, 0o640)
        await link.write_file(f"{root}/left/out", b"x")
        data = b"".join([piece async for piece in link.get_tar(root, name="x", skip=[f"{root}/left"])])
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = {member.name: member for member in tar}
            assert set(members) == {"x", "x/deep", f"x/deep/{'n' * 120}"}
            file = members[f"x/deep/{'n' * 120}"]
            inner = tar.extractfile(file)
            assert inner is not None
            assert inner.read() == content
            assert file.mode == 0o640
        with pytest.raises(NotFound):
            await anext(link.get_tar(f"{root}/none", name="x"))
        with pytest.raises(BadInput):
            await anext(link.get_tar(f"{root}/left/out"))
        begun = link.get_tar(root, name="x")
        assert await anext(begun)
        await begun.aclose()  # given up in the middle: the link goes on
        assert await link.ping() >= 0

    async def test_dial(self, guest: GuestUnderTest) -> None:
        job = await guest.link.exec(ExecRequest(["python3", "-c", ECHO_SERVER]))
        port = int(await read_line(job.output()))
        stream = await guest.link.dial(port)
        data = os.urandom(500_000)

        async def feed() -> None:
            await stream.write(data)
            await stream.close_write()

        feeding = asyncio.create_task(feed())
        async with asyncio.timeout(BOUND_S):
            assert await read_to_end(stream) == data + b"bye"
            await feeding
            assert await job.wait() == 0
        await stream.close()
        with pytest.raises(Unavailable):
            await guest.link.dial(port)
        with pytest.raises(BadInput):
            await guest.link.dial(port, "example.com")

    async def test_a_unix_socket_is_dialled_by_its_path(self, guest: GuestUnderTest) -> None:
        path = f"{guest.run_dir}/echo.sock"
        job = await guest.link.exec(ExecRequest(["python3", "-c", UNIX_SERVER, path]))
        assert await read_line(job.output()) == "ready"
        stream = await guest.link.dial(path)
        async with asyncio.timeout(BOUND_S):
            await stream.write(b"x" * 300_000)
            await stream.close_write()
            assert await read_to_end(stream) == b"300000"
            assert await job.wait() == 0
        await stream.close()
        with pytest.raises(Unavailable):
            await guest.link.dial(path)  # it is there, and nobody listens
        with pytest.raises(NotFound):
            await guest.link.dial(f"{guest.run_dir}/none.sock")
        for bad in ("relative.sock", "/" + "x" * 200):
            with pytest.raises(BadInput):
                await guest.link.dial(bad)

    async def test_doors_that_the_host_asks_for(self, guest: GuestUnderTest) -> None:
        seen: list[tuple[str, str]] = []

        async def handler(service: str, meta: Mapping[str, Any], stream: ByteStream) -> None:
            seen.append((service, str(meta.get("path", ""))))
            await stream.write(b"re: " + await read_to_end(stream))

        guest.link.serve_incoming(handler)
        for name in ("deep/er/one.sock", "two.sock"):
            await guest.link.open_door(f"{guest.run_dir}/{name}")
        await guest.link.open_door(f"{guest.run_dir}/two.sock")  # again is well
        for name in ("two.sock", "deep/er/one.sock", "session.sock"):
            code, out, _ = await run(guest.link, "python3", "-c", UNIX_CLIENT, f"{guest.run_dir}/{name}")
            assert (code, out) == (0, b"re: hello")
        expected = [
            ("socket", f"{guest.run_dir}/two.sock"),
            ("socket", f"{guest.run_dir}/deep/er/one.sock"),
            ("session", ""),
        ]
        assert seen == expected
        await guest.link.write_file(f"{guest.run_dir}/file", b"kept")
        for bad in (f"{guest.run_dir}/file", "relative.sock", "/" + "x" * 200):
            with pytest.raises(BadInput):
                await guest.link.open_door(bad)
        assert await guest.link.read_file(f"{guest.run_dir}/file") == b"kept"
        for number in range(14):
            await guest.link.open_door(f"{guest.run_dir}/{number}.sock")
        with pytest.raises(BadInput, match="over 16"):
            await guest.link.open_door(f"{guest.run_dir}/more.sock")

    async def test_the_guest_opens_streams(self, guest: GuestUnderTest) -> None:
        client = await guest.link.exec(ExecRequest(["python3", "-c", UNIX_CLIENT, f"{guest.run_dir}/session.sock"]))
        seen: list[tuple[str, Mapping[str, Any], bytes]] = []

        async def handler(service: str, meta: Mapping[str, Any], stream: ByteStream) -> None:
            seen.append((service, meta, await read_to_end(stream)))
            await stream.write(b"x" * 200_000 + service.encode())

        guest.link.serve_incoming(handler)  # the client may have knocked already: it waits, it does not fail
        async with asyncio.timeout(BOUND_S):
            assert (await finish(client))[1] == b"x" * 200_000 + b"session"
        assert seen[0][0] == "session"
        assert seen[0][1]["pid"] == client.pid
        assert seen[0][2] == b"hello"
        port = (await guest.link.info())["proxy_port"]
        script = f"import socket; s=socket.create_connection(('127.0.0.1',{port})); s.shutdown(1); print(len(s.makefile('rb').read()))"
        assert (await run(guest.link, "python3", "-c", script))[1] == b"200005\n"
        assert seen[1][0] == "proxy"

    async def test_streams_end_with_the_connection_and_clients_come_again(self, guest: GuestUnderTest) -> None:
        got: asyncio.Queue[bytes] = asyncio.Queue()

        async def hold(service: str, meta: Mapping[str, Any], stream: ByteStream) -> None:
            got.put_nowait(await stream.read())
            await stream.read()

        guest.link.serve_incoming(hold)
        await guest.link.exec(
            ExecRequest(["python3", "-c", UNIX_HOLDER, f"{guest.run_dir}/session.sock"], job_id="holder")
        )
        async with asyncio.timeout(BOUND_S):
            assert await got.get() == b"hi"
        link = await guest.reconnect()

        async def answer(service: str, meta: Mapping[str, Any], stream: ByteStream) -> None:
            got.put_nowait(await read_to_end(stream))
            await stream.write(b"welcome back")

        link.serve_incoming(answer)
        async with asyncio.timeout(BOUND_S):
            code, out, _ = await finish(await link.attach("holder"))
        assert (code, out) == (0, b"connected\nend b''\nwelcome back\n")
        assert await got.get() == b"again"

    async def test_freeze_stops_the_heartbeat(self, guest: GuestUnderTest) -> None:
        beat = f"{guest.scratch}/beat"
        script = "i=0; while :; do i=$((i+1)); echo $i > $BEAT.new; mv $BEAT.new $BEAT; echo $i; done"
        job = await guest.link.exec(ExecRequest(["sh", "-c", script], env={"BEAT": beat}, job_id="beat"))
        lines = job.output()
        await read_line(lines)
        await guest.link.freeze(sync=True)
        await guest.link.freeze()
        assert (await guest.link.info())["frozen"] is True
        before = await guest.link.read_file(beat)
        for _ in range(20):
            await guest.link.ping()
        assert await guest.link.read_file(beat) == before
        with pytest.raises(IllegalState, match="frozen"):
            await guest.link.exec(ExecRequest(["true"]))
        await guest.link.unfreeze()
        while await guest.link.read_file(beat) == before:
            await anext(lines)
        await job.signal(9)
        assert await job.wait() == 137

    async def test_a_frozen_workload_stays_frozen_over_a_reconnect(self, guest: GuestUnderTest) -> None:
        job = await guest.link.exec(
            ExecRequest(["sh", "-c", "echo up; read x; echo woken"], stdin=True, job_id="sleeper")
        )
        assert await read_line(job.output()) == "up"
        await guest.link.freeze()
        link = await guest.reconnect()
        assert link.hello.frozen
        again = await link.attach("sleeper")
        await again.write(b"\n")
        lines = again.output()
        assert await read_line(lines) == "up"
        await link.thaw(thaw_with("g-reconnect", {"FROM_THAW": "yes"}))
        assert await read_line(lines) == "woken"
        assert await again.wait() == 0

    async def test_thaw_gives_identity_and_environment(self, guest: GuestUnderTest) -> None:
        await guest.link.freeze()
        await guest.link.thaw(thaw_with("g-1", {"FROM_THAW": "a b", "RECESS_NETWORK": "none"}))
        assert (await guest.link.info())["frozen"] is False
        assert await guest.link.read_file(f"{guest.run_dir}/generation") == b"g-1\n"
        assert await guest.link.read_file(f"{guest.run_dir}/epoch") == b"7\n"
        assert b"FROM_THAW=a b\n" in await guest.link.read_file(f"{guest.run_dir}/env")
        with pytest.raises(NotFound):
            await guest.link.stat(f"{guest.run_dir}/token")
        out = (await run(guest.link, "sh", "-c", 'echo "$FROM_THAW [$http_proxy]"'))[1]
        assert out == b"a b []\n"
        out = (await run(guest.link, "sh", "-c", "echo $FROM_THAW", env={"FROM_THAW": "mine"}))[1]
        assert out == b"mine\n"

    async def test_thaw_brings_a_token_before_anything_wakes(self, guest: GuestUnderTest) -> None:
        path = f"{guest.run_dir}/token"
        job = await guest.link.exec(ExecRequest(["sh", "-c", f"echo up; read x; cat {path}"], stdin=True))
        lines = job.output()
        assert await read_line(lines) == "up"
        await guest.link.freeze()
        await job.write(b"\n")
        await guest.link.thaw(replace(thaw_with("g-t1", {}), token="rcm_first"))
        assert await read_line(lines) == "rcm_first"
        await guest.link.freeze()
        await guest.link.thaw(thaw_with("g-t2", {}))
        assert await guest.link.read_file(path) == b"rcm_first"
        await guest.link.thaw(replace(thaw_with("g-t3", {}), token="rcm_2"))
        assert await guest.link.read_file(path) == b"rcm_2"
        with pytest.raises(GuestFailed, match="token"):
            await guest.link.thaw(replace(thaw_with("g-t4", {}), token="two words"))

    async def test_a_thaw_travels_with_the_hello(self, guest: GuestUnderTest) -> None:
        job = await guest.link.exec(ExecRequest(["sh", "-c", "read x; echo woken"], stdin=True, job_id="early"))
        await job.write(b"\n")
        await guest.link.freeze()
        wake = WakeUp(lambda: replace(thaw_with("g-early", {"FROM_THAW": "hello"}), token="rcm_early"))
        link = await guest.reconnect(wake)
        assert link.hello.frozen  # its answer comes first
        assert wake.answer is not None
        await wake.answer(BOUND_S)
        assert (await link.info())["frozen"] is False
        assert await link.read_file(f"{guest.run_dir}/generation") == b"g-early\n"
        assert await link.read_file(f"{guest.run_dir}/token") == b"rcm_early"
        assert (await run(link, "sh", "-c", "echo $FROM_THAW"))[1] == b"hello\n"
        again = await link.attach("early")
        lines = again.output()
        while await read_line(lines) != "woken":
            pass

    async def test_a_repeated_hello_thaws_once(self, guest: GuestUnderTest) -> None:
        await guest.link.freeze()
        await guest.link.close()
        reader, writer = await guest.open_raw()
        for number in (1, 2):
            body = wire.hello_body("ab" * 16, wire.thaw_body(thaw_with(f"g-twice-{number}", {})))
            writer.write(encode(Kind.HELLO, 0, 0, body))
        writer.write(encode(Kind.PING, 0, 9))
        decoder, kinds = Decoder(), []
        while Kind.PONG not in kinds:
            decoder.feed(await asyncio.wait_for(reader.read(65536), BOUND_S))
            while (item := decoder.next()) is not None:
                assert isinstance(item, Frame)
                kinds.append(item.kind)
        assert kinds == [Kind.HELLO, Kind.REPLY, Kind.HELLO, Kind.PONG]
        writer.close()
        guest.link = await guest.open_link()
        assert await guest.link.read_file(f"{guest.run_dir}/generation") == b"g-twice-1\n"

    async def test_a_thaw_with_the_hello_fails_closed(self, guest: GuestUnderTest) -> None:
        await guest.link.freeze()
        wake = WakeUp(lambda: thaw_with("not a token", {}))
        link = await guest.reconnect(wake)
        assert wake.answer is not None
        with pytest.raises(GuestFailed, match="generation"):
            await wake.answer(BOUND_S)
        assert (await link.info())["frozen"] is True
        await link.thaw(thaw_with("g-mended", {}))
        assert (await link.info())["frozen"] is False

    async def test_thaw_fails_closed(self, guest: GuestUnderTest) -> None:
        hook = f"{guest.hooks}/50-suite"
        job = await guest.link.exec(ExecRequest(["sh", "-c", "read x"], stdin=True))
        await guest.link.freeze()
        await guest.link.write_file(hook, b"#!/bin/sh\nexit 9\n", 0o755)
        with pytest.raises(GuestFailed, match="50-suite"):
            await guest.link.thaw(thaw_with("g-2", {}))
        assert (await guest.link.info())["frozen"] is True
        mark = f"{guest.scratch}/hooked"
        await guest.link.write_file(hook, f"#!/bin/sh\necho $RECESS_GENERATION > {mark}\n".encode(), 0o755)
        await guest.link.thaw(thaw_with("g-3", {}))
        assert await guest.link.read_file(mark) == b"g-3\n"
        await guest.link.remove(hook)
        await job.close_stdin()
        assert await job.wait() == 1
        with pytest.raises(GuestFailed):
            await guest.link.thaw(thaw_with("not a token", {}))

    async def test_many_at_once(self, guest: GuestUnderTest) -> None:
        async with asyncio.timeout(BOUND_S):
            results = await asyncio.gather(
                *(run(guest.link, "sh", "-c", f"head -c 100000 /dev/zero; exit {i}") for i in range(20))
            )
        assert [(code, len(out)) for code, out, _ in results] == [(i, 100_000) for i in range(20)]


async def pieces(data: bytes, size: int = 50_000) -> AsyncIterator[bytes]:
    """Yield the bytes piece by piece."""
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def read_to_end(stream: ByteStream) -> bytes:
    """Return everything up to end of file."""
    out = b""
    while data := await stream.read():
        out += data
    return out
