"""Providers' own clients, unmodified, in an agent's loop: through a real broker, which alone has the key."""

import json

from recess.broker import Broker, OpenGate, SecretStore, build_policy
from recess.clock import SystemClock
from recess.testing.http_server import HttpRequest, HttpResponse, LoopbackServer, json_response
from recess.testing.model_server import ModelServer
from recess.testing.proxy_port import ProxyPort
from recess.testing.session_world import texts, world

OPENAI = """
from openai import AsyncOpenAI
from recess_agent import agent

client = AsyncOpenAI(max_retries=0)

@agent(idle="30s")
async def me(s):
    async for turn in s:
        reply = await s.stream(chunks(s.messages()))
        again = await s.stream(client.chat.completions.create(model="script-1", messages=s.messages()))
        await s.say(f"{reply.text == again.text} {bool(reply.text)} {reply.model}")

async def chunks(messages):
    async for one in await client.chat.completions.create(model="script-1", messages=messages, stream=True):
        yield one
"""

PYDANTIC = """
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from recess_agent import agent

helper = Agent(OpenAIChatModel("script-1"))

@agent(idle="30s")
async def me(s):
    async for turn in s:
        await s.say(str(bool((await helper.run(turn.text)).output)))
"""

ANTHROPIC = """
from anthropic import AsyncAnthropic
from recess_agent import agent

client = AsyncAnthropic(max_retries=0)

@agent(idle="30s")
async def me(s):
    async for turn in s:
        async with client.messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": turn.text}]) as stream:
            reply = await s.stream(stream.text_stream)
        await s.say("whole: " + reply.text)
"""


class Messages(LoopbackServer):
    """Just enough of the provider's streaming API: the answer is the question, letter by letter."""

    async def answer(self, request: HttpRequest) -> HttpResponse:
        if request.bearer != "sk-1" or (request.method, request.path) != ("POST", "/v1/messages"):
            return json_response({"type": "error", "error": {"type": "authentication_error", "message": "no"}}, 401)
        return HttpResponse(200, self._events(request.json()["messages"][-1]["content"]), "text/event-stream")

    async def _events(self, text):
        message = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None,
                   "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}}  # fmt: skip
        events = [
            {"type": "message_start", "message": message},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": one}} for one in text),
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": 2}},
            {"type": "message_stop"},
        ]  # fmt: skip
        for event in events:
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


async def said_by(source, upstream, env):
    """Run an agent for a turn with the broker's route `llm` to this upstream; return what it said last."""
    broker = Broker(OpenGate(), SecretStore(extra={"llm": "sk-1"}), SystemClock())
    broker.register("m", 0, build_policy([], {"llm": upstream}))
    async with ProxyPort(broker.handler("m")) as port, world() as w:
        base = f"http://127.0.0.1:{port.port}/route/llm"
        await w.sessions.deploy(
            "me", {"agent.py": source}, {"env": {name: value or base for name, value in env.items()}}
        )
        s = (await w.sessions.start("me")).id
        await w.sessions.send(s, "hello")
        end = await w.until(s, "turn.end", timeout_s=90)
        assert end.body["status"] == "done", await w.describe(s)
        return texts(await w.entries(s))[-1]


async def test_openai() -> None:
    async with ModelServer("sk-1") as model:
        env = {"OPENAI_BASE_URL": "", "OPENAI_API_KEY": "not-a-key"}
        assert await said_by(OPENAI, model.base_url, env) == "True True script-1"
        assert not model.refused


async def test_pydantic_ai() -> None:
    async with ModelServer("sk-1") as model:
        env = {"OPENAI_BASE_URL": "", "OPENAI_API_KEY": "not-a-key"}
        assert await said_by(PYDANTIC, model.base_url, env) == "True"
        assert not model.refused


async def test_anthropic() -> None:
    async with Messages() as model:
        env = {"ANTHROPIC_BASE_URL": "", "ANTHROPIC_AUTH_TOKEN": "not-a-key"}
        assert await said_by(ANTHROPIC, model.url, env) == "whole: hello"
