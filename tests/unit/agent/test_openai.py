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
            _ = [c async for c in openai_chat([], base_url=server.url)]
        assert (caught.value.status, caught.value.retryable) == (status, retryable)


async def test_a_whole_answer_and_a_wrong_url():
    body = b'{"choices": []}'
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n" + body
    async with Server(answer) as server:
        assert [c async for c in openai_chat([], base_url=server.url)] == [{"choices": []}]
    with pytest.raises(ModelError, match="not a base URL"):
        _ = [c async for c in openai_chat([], base_url="ftp://x")]
