"""The streaming chat client against a small HTTP server on loopback."""

import asyncio
import json

import pytest
from recess_agent import ModelError, openai_chat


class Server:
    """Answers each connection with fixed bytes and keeps what it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        port = self.server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/route/llm"
        return self

    async def __aexit__(self, *exc):
        self.server.close()
        await self.server.wait_closed()

    async def serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(
            next(line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length"))
        )
        self.asked.append((head.splitlines()[0], json.loads(await reader.readexactly(length)), head))
        writer.write(self.answer)
        await writer.drain()
        writer.close()


def sse(*events, done=True):
    body = "".join(f"data: {json.dumps(e)}\n\n" for e in events) + (": comment\n\ndata: [DONE]\n\n" if done else "")
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + body.encode()


async def test_chunks_in_order(monkeypatch):
    monkeypatch.setenv("OPENAI_MODEL", "small")
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    async with Server(sse({"n": 1}, {"n": 2})) as server:
        found = [
            c
            async for c in openai_chat(
                [{"role": "user", "content": "x"}], [{"t": 1}], base_url=server.url, temperature=0
            )
        ]
        assert found == [{"n": 1}, {"n": 2}]
        line, body, head = server.asked[0]
        assert line == "POST /route/llm/chat/completions HTTP/1.1"
        assert (body["model"], body["stream"], body["temperature"], body["tools"]) == ("small", True, 0, [{"t": 1}])
        assert "Authorization: Bearer key" in head


@pytest.mark.parametrize(
    ("answer", "status", "retryable"),
    [
        (b"HTTP/1.1 429 Slow\r\ncontent-length: 4\r\n\r\nwait", 429, True),
        (b"HTTP/1.1 400 Bad\r\ncontent-length: 3\r\n\r\nbad", 400, False),
        (sse({"n": 1}, done=False), 0, True),
        (b"", 0, True),
        (sse({"error": "overloaded"}), 0, True),
    ],
)
async def test_failures_are_typed(answer, status, retryable):
    async with Server(answer) as server:
        with pytest.raises(ModelError) as caught:
            _ = [c async for c in openai_chat([], base_url=server.url, retries=0)]
        assert (caught.value.status, caught.value.retryable) == (status, retryable)


async def test_a_whole_answer_and_a_wrong_url():
    body = b'{"choices": []}'
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n" + body
    async with Server(answer) as server:
        assert [c async for c in openai_chat([], base_url=server.url)] == [{"choices": []}]
    with pytest.raises(ModelError, match="not a base URL"):
        _ = [c async for c in openai_chat([], base_url="ftp://x")]


async def test_leaving_early_ends_the_exchange():
    head = sse({"n": 1}, done=False)
    gone = asyncio.Event()

    async def endless(reader, writer):
        writer.write(head)
        await writer.drain()
        while await reader.read(65536):
            pass
        gone.set()
        writer.close()

    server = await asyncio.start_server(endless, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    stream = openai_chat([], base_url=url)
    assert await anext(stream) == {"n": 1}
    await stream.aclose()
    await asyncio.wait_for(gone.wait(), 10)
    server.close()
    await server.wait_closed()


async def test_what_may_pass_is_tried_again(monkeypatch):
    monkeypatch.setattr("recess_agent.openai.RETRY_S", 0.01)
    answers = [
        b"HTTP/1.1 503 Later\r\ncontent-length: 0\r\n\r\n",
        sse({"n": 1}, done=False),
        b"",
        sse({"n": 1}, {"n": 2}),
    ]
    async with Server(b"") as server:

        async def serve(reader, writer):
            server.answer = answers[len(server.asked)]
            await Server.serve(server, reader, writer)

        server.server.close()
        await server.server.wait_closed()
        server.server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.server.sockets[0].getsockname()[1]}"
        found = [c async for c in openai_chat([], base_url=url)]
        assert found == [{"n": 1}, {"restart": True}, {"n": 1}, {"n": 2}]
        assert len(server.asked) == 4
