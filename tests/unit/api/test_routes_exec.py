"""The exec WebSocket, message by message, over a scripted job: what a race must not turn into."""

import asyncio
import contextlib
import json
from types import SimpleNamespace

import pytest

from recess.api.app import make_app
from recess.api.wire import ProgressHub
from recess.errors import IllegalState
from recess.machines.service import MachineSpec


class EndedJob:
    """A process that has ended just now: it refuses signals, and tells its exit code once `tell` is set."""

    job_id, pid = "j1", 7

    def __init__(self):
        self.tell, self.signalled, self.detached = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def output(self):
        await self.tell.wait()
        yield 1, b"last words"

    async def wait(self):
        return 3

    async def signal(self, number):
        self.signalled.set()
        raise IllegalState("job j1 has ended")

    async def detach(self):
        self.detached.set()


class Client:
    """The other side of the socket."""

    def __init__(self, job):
        @contextlib.asynccontextmanager
        async def using(ref, *, wake):
            async def start(request):
                return job

            yield SimpleNamespace(exec=start)

        async def get(ref):
            return SimpleNamespace(id="mch_1", session="", spec=MachineSpec())

        machines = SimpleNamespace(get=get, idling=SimpleNamespace(using=using))
        sessions = SimpleNamespace(activity=lambda session, why: contextlib.nullcontext())
        self.app = make_app(SimpleNamespace(machines=machines, sessions=sessions, plain=None), ProgressHub())
        self.to_server, self.from_server = asyncio.Queue(), asyncio.Queue()
        self.to_server.put_nowait({"type": "websocket.connect"})
        self.closed = False

    async def send(self, message):
        if self.closed:
            raise OSError("the client is gone")
        await self.from_server.put(message)

    def say(self, **data):
        self.to_server.put_nowait({"type": "websocket.receive", "text": json.dumps(data)})

    async def hear(self):
        while (message := await self.from_server.get())["type"] == "websocket.accept":
            pass
        return json.loads(message["text"]) if message.get("text") else message

    def start(self):
        path = "/v1/machines/m/exec"
        scope = {"type": "websocket", "path": path, "raw_path": path.encode(), "headers": [], "query_string": b"",
                 "scheme": "ws", "root_path": "", "subprotocols": []}  # fmt: skip
        return asyncio.create_task(self.app(scope, self.to_server.get, self.send))


async def test_a_signal_that_came_too_late_does_not_cost_the_exit_code():
    job = EndedJob()
    client = Client(job)
    serving = client.start()
    client.say(argv=["x"])
    assert await client.hear() == {"job_id": "j1", "pid": 7}
    client.say(op="signal", number=2)
    await job.signalled.wait()
    job.tell.set()
    assert (await client.hear())["bytes"] == b"\1last words"
    assert await client.hear() == {"exit_code": 3}
    await serving
    assert job.detached.is_set()


async def test_a_client_that_goes_before_the_first_answer_leaves_nothing_attached():
    job = EndedJob()
    client = Client(job)
    serving = client.start()
    assert (await client.from_server.get())["type"] == "websocket.accept"
    client.closed = True
    client.say(argv=["x"])
    await serving
    assert job.detached.is_set()


@pytest.mark.parametrize(
    "first",
    [{"text": "[" * 200_000}, {"text": '{"argv": [1]}'}, {"text": '{"argv": null}'}, {"bytes": b"x"}, {"text": "{}"}],
)
async def test_a_first_message_that_is_none_is_told(first):
    client = Client(EndedJob())
    serving = client.start()
    client.to_server.put_nowait({"type": "websocket.receive", **first})
    assert (await client.hear())["error"]["code"] == "bad_input"
    await serving


async def test_an_unknown_word_ends_the_stream_and_says_why():
    job = EndedJob()
    client = Client(job)
    serving = client.start()
    client.say(argv=["x"], env=None)
    await client.hear()
    client.say(op="dance")
    assert "dance" in (await client.hear())["error"]["message"]
    await serving
    assert job.detached.is_set()
