"""The test providers on the wire: the model behind a real broker, payments, git."""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
import urllib.error
import urllib.request

import pytest
from recess_agent import ModelError, openai_chat
from recess_agent.stream import Collector

from recess.broker import Broker, OpenGate, SecretStore, build_policy
from recess.clock import SystemClock
from recess.testing.git_server import GitServer
from recess.testing.model_server import InvalidRequest, ModelServer, check_messages, check_tools
from recess.testing.payment_server import PaymentServer
from recess.testing.proxy_port import ProxyPort

TOOLS = [{"type": "function", "function": {"name": "charge", "parameters": {"type": "object", "properties": {}}}}]
USER = {"role": "user", "content": "charge 5 dollars"}


def call(i: str) -> dict:
    return {"id": i, "type": "function", "function": {"name": "charge", "arguments": "{}"}}


def asks(*ids: str) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": [call(i) for i in ids]}


def result(i: str) -> dict:
    return {"role": "tool", "tool_call_id": i, "content": "ok"}


@pytest.mark.parametrize(
    "messages",
    [
        [USER], [USER, asks("a"), result("a")], [USER, asks("a", "b"), result("b"), result("a"), USER],
        [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "hi"}],
    ],
)  # fmt: skip
def test_valid_transcripts(messages: list) -> None:
    before = copy.deepcopy(messages)
    assert check_messages(messages) == before


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "non-empty"),
        (None, "non-empty"),
        ([{"role": "boss", "content": "x"}], "Supported values"),
        ([USER, result("a")], "must be a response to a preceding"),
        ([USER, asks("a")], "did not have response messages: a"),
        ([USER, asks("a", "b"), result("a")], "did not have response messages: b"),
        ([USER, asks("a"), USER, result("a")], "did not have response messages: a"),
        ([USER, asks("a"), result("a"), result("a")], "must be a response"),
        ([USER, asks("a", "a"), result("a")], "duplicate"),
        ([USER, asks()], "empty array"),
        ([USER, {"role": "assistant", "content": None}], "got null"),
        ([{"role": "user"}], "got null"),
        (
            [
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "x", "arguments": {}}}],
                },
            ],
            "required",
        ),
        ([USER, {"role": "assistant", "tool_calls": ["x"]}], "required"),
    ],
)
def test_invalid_transcripts_are_refused_in_the_providers_words(messages: object, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        check_messages(messages)


@pytest.mark.parametrize("tools", [{}, [{"type": "function"}], TOOLS * 2])
def test_invalid_tools(tools: object) -> None:
    with pytest.raises(InvalidRequest):
        check_tools(tools)


async def chat(base: str, messages: list) -> Collector:
    got = Collector()
    async for chunk in openai_chat(messages, TOOLS, base_url=base):
        got.feed(chunk)
    return got


async def test_the_agents_client_through_the_broker() -> None:
    """The SDK's streaming client, the broker's route, the provider: the key is added on the way, never held here."""
    async with ModelServer("sk-host") as model:
        broker = Broker(OpenGate(), SecretStore(extra={"llm": "sk-host"}), SystemClock())
        broker.register("m", 0, build_policy([], {"llm": model.base_url}))
        async with ProxyPort(broker.handler("m")) as port:
            base = f"http://127.0.0.1:{port.port}/route/llm"
            reply = (await chat(base, [USER])).reply()
            assert [(c.name, c.arguments) for c in reply.tool_calls] == [("charge", {"cents": 500})]
            assert reply.usage["total_tokens"] > 0
            again = (await chat(base, [USER])).reply()
            assert again.tool_calls[0].id == reply.tool_calls[0].id
            whole = [USER, asks("a"), {**result("a"), "content": json.dumps({"id": "ch_9", "cents": 500})}]
            assert (await chat(base, whole)).text == "Charged 500 cents, once: ch_9."
            with pytest.raises(ModelError, match="did not have response") as caught:
                await chat(base, [USER, asks("a")])
            assert (caught.value.status, caught.value.retryable) == (400, False)
        with pytest.raises(ModelError) as refused:
            await chat(model.base_url, [USER])
        assert refused.value.status == 401
        assert list(model.refused)[-1] == "key"


def fetch(method: str, url: str, body: object = None, **headers: str) -> tuple[int, dict]:
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), method=method)
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


async def ask(method: str, url: str, body: object = None, **headers: str) -> tuple[int, dict]:
    return await asyncio.to_thread(fetch, method, url, body, **headers)


async def test_whole_answers_models_and_unknown_calls() -> None:
    async with ModelServer("k") as model:
        key = {"Authorization": "Bearer k"}
        status, whole = await ask(
            "POST", f"{model.base_url}/chat/completions", {"model": "m", "messages": [USER], "tools": TOOLS}, **key
        )
        assert (status, whole["choices"][0]["finish_reason"]) == (200, "tool_calls")
        assert (await ask("GET", f"{model.base_url}/models", **key))[0] == 200
        assert (await ask("GET", f"{model.base_url}/nothing", **key))[0] == 404
        assert (await ask("POST", f"{model.base_url}/chat/completions", {"messages": [USER]}, **key))[0] == 400


async def test_payments_count_once_for_each_key() -> None:
    async with PaymentServer("pk") as pay:
        url, key = f"{pay.url}/charges", {"Authorization": "Bearer pk", "Idempotency_Key": "k1"}
        assert (await ask("POST", url, {"cents": 5}))[0] == 401
        assert (await ask("GET", f"{url}?key=k1", **key))[0] == 404
        first = await ask("POST", url, {"cents": 5}, **key)
        assert first[0] == 200
        assert await ask("POST", url, {"cents": 5}, **key) == first
        assert (await ask("POST", url, {"cents": 6}, **key))[0] == 409
        assert (await ask("POST", url, {"cents": -1}, **key))[0] == 400
        assert await ask("GET", f"{url}?key=k1", **key) == first
        assert (len(pay.charges), pay.calls) == (1, 2)


async def test_a_held_charge_is_counted_before_it_is_answered() -> None:
    async with PaymentServer("pk") as pay:
        pay.hold()
        asking = asyncio.create_task(
            ask("POST", f"{pay.url}/charges", {"cents": 5}, Authorization="Bearer pk", Idempotency_Key="k")
        )
        await asyncio.wait_for(pay.counted.wait(), 10)
        assert len(pay.charges) == 1
        assert not asking.done()
        pay.release()
        assert (await asking)[0] == 200


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed here")
async def test_git_clones_it(tmp_path) -> None:
    files = {"README": b"hi\n", "a/b/c.txt": b"deep\n", "a.txt": b"1", "a-b": b"2", "bin": bytes(range(256))}
    async with GitServer("site", files) as server:
        for args in (
            ["clone", "-q", f"{server.url}/site.git", str(tmp_path / "c")],
            ["-C", str(tmp_path / "c"), "fsck", "--strict"],
        ):
            process = await asyncio.create_subprocess_exec("git", *args, stderr=asyncio.subprocess.PIPE)
            _, stderr = await process.communicate()
            assert process.returncode == 0, stderr
        assert {p: (tmp_path / "c" / p).read_bytes() for p in files} == files
        assert server.served >= 5
        head = await asyncio.create_subprocess_exec(
            "git", "-C", str(tmp_path / "c"), "rev-parse", "HEAD", stdout=asyncio.subprocess.PIPE
        )
        out, _ = await head.communicate()
        assert out.decode().strip() == server.commit
