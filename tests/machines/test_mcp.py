"""`recess mcp` on real machines: what a model does with it, by the protocol's own client over stdin and stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

pytestmark = [pytest.mark.machines, pytest.mark.timeout(400)]

COUNTER = """
from recess_agent import agent

async def echo(text, seen):
    yield {"text": f"{text} is number {seen}"}

@agent(image="base", idle="1h")
async def counter(s):
    seen = 0                                        # plain memory: a fork has it
    async for turn in s:
        seen += 1
        await s.stream(echo(turn.text, seen))
"""
RECESS = [sys.executable, "-m", "recess.cli.main"]


@pytest.fixture
def env(real_config):
    env = {
        "PATH": os.environ["PATH"], "HOME": str(real_config.home), "RECESS_HOME": str(real_config.home),
        "RECESS_RUN_DIR": str(real_config.run_dir), "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    yield env
    subprocess.run([*RECESS, "down", "--all"], env=env, check=True, capture_output=True, timeout=120)


class Model:
    """Calls tools as a model would: by name, with data, and reads data."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def __call__(self, tool: str, **arguments: Any) -> Any:
        answer = await self._client.call_tool(tool, arguments)
        assert not answer.is_error, answer.content[0].text
        structured = answer.structured_content or {}
        return structured["result"] if "result" in structured else json.loads(answer.content[0].text)


async def machines(call: Model) -> None:
    made = await call("machine_create", name="dev", ports=[8000])  # of the size of a session: one template serves both
    assert made["state"] == "running"
    done = await call("machine_exec", machine="dev", command="cat; echo oops >&2; exit 3", stdin="typed")
    assert (done["exit_code"], done["stdout"], done["stderr"]) == (3, "typed", "oops\n")
    await call("machine_write_file", machine="dev", path="/srv/deep/index.html", text="before\n")
    job = await call(
        "machine_spawn", machine="dev", command="cd /srv/deep && echo up && exec python3 -m http.server 8000"
    )
    assert "up" in (await call("machine_output", machine="dev", job=job["job"]))["output"]
    fetch = "curl -sS --retry 9 --retry-connrefused http://127.0.0.1:8000/"
    taken = await call("snapshot_take", machine="dev", name="site:v1")
    await call("machine_write_file", machine="dev", path="/srv/deep/index.html", text="after\n")
    old = await call("snapshot_restore", snapshot="site:v1", name="old")
    (child,) = await call("machine_fork", machine="dev")
    # The server in memory goes on in both, each with the files of its own past.
    for machine, text in ((old["id"], "before\n"), (child["id"], "after\n")):
        assert (await call("machine_exec", machine=machine, command=fetch))["stdout"] == text
    assert {row["id"] for row in await call("snapshot_list")} >= {taken["snapshot"]}
    await call("machine_suspend", machine="dev")
    assert (await call("machine_resume", machine="dev"))["rung"] in (1, 2, 3)
    assert [row["exit_code"] for row in await call("machine_jobs", machine="dev") if row["job"] == job["job"]] == [None]
    await call("machine_rewind", machine="dev", snapshot="site:v1")
    assert await call("machine_read_file", machine="dev", path="/srv/deep/index.html") == "before\n"
    for machine in (old["id"], child["id"], "dev"):
        await call("machine_remove", machine=machine)
    assert await call("machine_list", everything=True) == []


async def sessions(call: Model) -> None:
    await call("session_start", agent="counter", name="s1")
    texts = []
    for session, text in (("s1", "tea"), ("s1", "milk"), ("s2", "sugar")):
        if session == "s2":
            await call("session_fork", session="s1", name="s2")
        sent = await call("session_send", session=session, text=text)
        assert sent["status"] == "done", sent
        texts += [entry["body"]["text"] for entry in sent["entries"] if entry["kind"] == "assistant"]
    assert texts == ["tea is number 1", "milk is number 2", "sugar is number 3"]
    await call("session_suspend", session="s1")
    assert {row["name"]: row["state"] for row in await call("session_list")}["s1"] == "frozen"
    assert (await call("session_log", session="s2"))[0]["position"] == 1


async def test_what_a_model_does_with_machines_and_sessions(env, tmp_path):
    agent = tmp_path / "counter"
    agent.mkdir()
    (agent / "agent.py").write_text(COUNTER)
    subprocess.run([*RECESS, "deploy", str(agent)], env=env, check=True, capture_output=True, timeout=200)
    server = StdioServerParameters(command=RECESS[0], args=[*RECESS[1:], "mcp"], env=env)
    async with Client(stdio_client(server)) as client:
        call = Model(client)
        await machines(call)
        await sessions(call)
