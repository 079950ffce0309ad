"""The monitor client against a scripted monitor: answers by id, events, refusals, silence, nonsense."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from recess.drivers.kept.layout import MONITOR_SOCKET
from recess.drivers.qemu.host import has_network
from recess.drivers.qemu.qmp import LINE_LIMIT, Qmp, QmpRefused
from recess.errors import DriverFailed, Timeout

Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


async def obey(command: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    say(writer, {"return": {"did": command["execute"]}, "id": command["id"]})


def say(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\r\n")


class Monitor:
    """A monitor that greets and then does what `answer` says."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.answer: Answer = obey
        self.greets = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.greets:
            say(writer, {"QMP": {"version": {}, "capabilities": []}})
        while line := await reader.readline():
            command = json.loads(line)
            await (obey if command["execute"] == "qmp_capabilities" else self.answer)(command, writer)
        writer.close()


@pytest.fixture
async def monitor(tmp_path: Path) -> AsyncIterator[Monitor]:
    folder = tmp_path / ("long" * 30)  # longer than a unix socket's path may be
    folder.mkdir()
    monitor = Monitor(folder)
    fd = os.open(folder, os.O_RDONLY)
    server = await asyncio.start_unix_server(monitor.serve, f"/proc/self/fd/{fd}/{MONITOR_SOCKET}")
    yield monitor
    server.close()
    os.close(fd)


@pytest.fixture
async def qmp(monitor: Monitor) -> AsyncIterator[Qmp]:
    client = await Qmp.connect(monitor.run, timeout_s=5)
    yield client
    await client.close()


async def test_answers_find_their_commands(monitor: Monitor, qmp: Qmp) -> None:
    waiting: list[dict[str, Any]] = []

    async def backwards(command: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        waiting.append(command)
        if len(waiting) == 3:
            for each in reversed(waiting):
                await obey(each, writer)

    monitor.answer = backwards
    got = await asyncio.gather(*(qmp.execute(name) for name in ("a", "b", "c")))
    assert [g["did"] for g in got] == ["a", "b", "c"]


async def test_a_refusal_is_typed(monitor: Monitor, qmp: Qmp) -> None:
    async def refuse(command: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        say(writer, {"error": {"class": "GenericError", "desc": "no such node"}, "id": command["id"]})

    monitor.answer = refuse
    with pytest.raises(QmpRefused, match="no such node") as caught:
        await qmp.execute("blockdev-del")
    assert caught.value.details["command"] == "blockdev-del"


async def test_a_qemu_without_user_networks_is_told_by_its_refusal(monitor: Monitor, qmp: Qmp) -> None:
    async def refuse(command: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if command["execute"] == "netdev_add":
            say(writer, {"error": {"class": "GenericError", "desc": "Parameter 'type' ..."}, "id": command["id"]})
        else:
            await obey(command, writer)

    assert await has_network(qmp)
    monitor.answer = refuse
    assert not await has_network(qmp)


async def test_events_reach_who_expects_them(monitor: Monitor, qmp: Qmp) -> None:
    async def with_events(command: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        say(writer, {"event": "JOB", "data": {"device": "other"}})
        say(writer, {"event": "JOB", "data": {"device": "mine", "n": 1}})
        await obey(command, writer)

    monitor.answer = with_events
    mine = qmp.expect("JOB", lambda data: data.get("device") == "mine")
    never = qmp.expect("OTHER")
    await qmp.execute("go")
    assert (await mine)["n"] == 1
    assert not never.done()


async def test_silence_ends_in_a_timeout(monitor: Monitor, qmp: Qmp) -> None:
    async def nothing(_command: dict[str, Any], _writer: asyncio.StreamWriter) -> None:
        pass

    monitor.answer = nothing
    with pytest.raises(Timeout):
        await qmp.execute("stop", timeout_s=0.05)


@pytest.mark.parametrize("words", [b"", b"{not json}\n", b"x" * (LINE_LIMIT + 2)])
async def test_a_broken_monitor_is_lost_for_everybody(monitor: Monitor, qmp: Qmp, words: bytes) -> None:
    async def break_it(_command: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        if not words:
            writer.close()

    monitor.answer = break_it
    event = qmp.expect("ANY")
    with pytest.raises(DriverFailed):
        await qmp.execute("go", timeout_s=5)
    with pytest.raises(DriverFailed):
        await event
    with pytest.raises(DriverFailed):
        await qmp.execute("again")
    assert qmp.lost.done()


async def test_a_monitor_that_does_not_greet(monitor: Monitor) -> None:
    monitor.greets = False
    with pytest.raises(Timeout):
        await Qmp.connect(monitor.run, timeout_s=0.05)


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(DriverFailed):
        await Qmp.connect(tmp_path, timeout_s=1)


async def test_a_descriptor_goes_with_its_command() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    client = Qmp(ours)
    read_end, write_end = os.pipe()
    command = asyncio.ensure_future(client.execute("getfd", fd=write_end))
    theirs.setblocking(True)
    line, fds, _, _ = await asyncio.to_thread(socket.recv_fds, theirs, 4096, 1)
    os.write(fds[0], b"x")
    assert os.read(read_end, 1) == b"x"
    theirs.send(json.dumps({"return": {}, "id": json.loads(line)["id"]}).encode() + b"\n")
    assert await command == {}
    await client.close()
    theirs.close()
    for fd in (read_end, write_end, *fds):
        os.close(fd)
