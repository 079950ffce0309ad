"""The API's client against a real socket that plays the API: what it sends, what it makes of answers, good and bad."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from recess.drivers.firecracker import calls
from recess.drivers.firecracker.api import API_SOCKET, Api, Refused
from recess.drivers.kept.layout import socket_address
from recess.errors import DriverFailed, Timeout


class Server:
    """Answers every connection with `answer` and keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, object]] = []
        self.answer = b"HTTP/1.1 204 No Content\r\nServer: Firecracker API\r\n\r\n"
        self.silent = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lengths = [line for line in head.split("\r\n") if line.startswith("Content-Length:")]
            body = await reader.readexactly(int(lengths[0].split(":")[1])) if lengths else b""
            self.asked.append((head.split("\r\n")[0], json.loads(body) if body else None))
            if self.silent:
                await reader.read()
            writer.write(self.answer)
            await writer.drain()
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server()
    with socket_address(tmp_path, API_SOCKET) as address:
        listening = await asyncio.start_unix_server(server.serve, address)
    yield server
    listening.close()


async def test_a_call_is_sent_as_json(server: Server, tmp_path: Path) -> None:
    await Api(tmp_path).call(calls.pause())
    assert server.asked == [("PATCH /vm HTTP/1.1", {"state": "Paused"})]


async def test_the_state_is_read(server: Server, tmp_path: Path) -> None:
    body = b'{"id":"x","state":"Running","vmm_version":"1.16.1","app_name":"Firecracker"}'
    server.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    assert await Api(tmp_path).state() == "Running"
    assert server.asked == [("GET / HTTP/1.1", None)]


async def test_a_refusal_has_its_own_words(server: Server, tmp_path: Path) -> None:
    body = b'{"fault_message":"Load snapshot error: no such file"}'
    server.answer = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with pytest.raises(Refused, match="Load snapshot error: no such file"):
        await Api(tmp_path).call(calls.resume())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n{{{{",
        b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
)
async def test_no_answer_worth_the_name_is_a_typed_error(server: Server, tmp_path: Path, answer: bytes) -> None:
    server.answer = answer
    with pytest.raises(DriverFailed, match="gave no answer"):
        await Api(tmp_path).call(calls.resume())


async def test_a_silent_process_is_a_timeout(server: Server, tmp_path: Path) -> None:
    server.silent = True
    with pytest.raises(Timeout, match="PATCH /vm"):
        await Api(tmp_path).call(calls.resume(), timeout_s=0.05)


async def test_it_waits_for_the_socket(tmp_path: Path) -> None:
    waiting = asyncio.ensure_future(Api(tmp_path).wait_ready(60))
    await asyncio.sleep(0)
    assert not waiting.done()
    with socket_address(tmp_path, API_SOCKET) as address:
        listening = await asyncio.start_unix_server(Server().serve, address)
    await waiting
    listening.close()


async def test_a_socket_that_never_comes_is_a_timeout(tmp_path: Path) -> None:
    with pytest.raises(Timeout):
        await Api(tmp_path).wait_ready(0.02)
