"""`recess mcp` as a client of the protocol sees it: the MCP library's own client over stdin and stdout, a real server."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import httpx2
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client

from recess.adapters.mcp_server import turn_status
from recess.config import load_config


@pytest.fixture
def env(tmp_path):
    env = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "RECESS_HOME": str(tmp_path / "home"), "RECESS_DRIVER": "fake",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    yield env
    subprocess.run([sys.executable, "-m", "recess.cli.main", "down", "--all"], env=env, capture_output=True, timeout=60)
    shutil.rmtree(load_config({}, home=env["RECESS_HOME"]).run_dir, ignore_errors=True)


async def said(client, tool, **arguments):
    """Call a tool; return what it answered as data, or its error's text."""
    answer = await client.call_tool(tool, arguments)
    if answer.is_error:
        return answer.content[0].text
    return (
        answer.structured_content["result"]
        if "result" in (answer.structured_content or {})
        else json.loads(answer.content[0].text)
    )


async def test_a_client_has_machines_with_snapshot_and_fork(env):
    server = StdioServerParameters(command=sys.executable, args=["-m", "recess.cli.main", "mcp"], env=env)
    async with Client(stdio_client(server)) as client:
        names = {tool.name for tool in (await client.list_tools()).tools}
        assert {"machine_create", "machine_exec", "machine_fork", "snapshot_restore", "session_send"} <= names
        made = await said(client, "machine_create", name="dev")
        assert made["state"] == "running"
        assert (await said(client, "machine_exec", machine="dev", command="echo hi; exit 3"))["exit_code"] == 3
        await said(client, "machine_write_file", machine="dev", path="/root/a", text="before")
        taken = await said(client, "snapshot_take", machine="dev", name="work:v1")
        assert taken["snapshot"].startswith("snp_")
        await said(client, "machine_write_file", machine="dev", path="/root/a", text="after")
        assert (await said(client, "snapshot_restore", snapshot="work:v1", name="old"))["name"] == "old"
        assert await said(client, "machine_read_file", machine="old", path="/root/a") == "before"
        (child,) = await said(client, "machine_fork", machine="dev")
        assert await said(client, "machine_read_file", machine=child["id"], path="/root/a") == "after"
        assert len(await said(client, "machine_list")) == 3
        await said(client, "machine_suspend", machine="dev")
        assert (await said(client, "machine_resume", machine="dev"))["rung"] in (2, 3)
        assert "no such machine" in await said(client, "machine_exec", machine="nobody", command="true")
        assert "recess ps -a" in await said(client, "machine_remove", machine="nobody")  # the hint reaches the model
        assert await said(client, "session_list") == []


@pytest.fixture
def over_http(env):
    """An MCP server over HTTP on a port that the kernel chose; its address."""
    command = [sys.executable, "-m", "recess.cli.main", "mcp", "--http", "127.0.0.1:0"]
    with subprocess.Popen(
        command, env={**env, "RECESS_TOKEN": "let-me-in"}, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            said = (re.search(r"http://\S+/mcp", line) for line in server.stderr)
            yield next(found[0] for found in said if found)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
            server.stderr.close()


async def test_the_same_over_http_for_those_who_have_the_token(env, over_http):
    headers = {"Authorization": "Bearer let-me-in"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=60) as http,
        Client(streamable_http_client(over_http, http_client=http)) as client,
    ):
        assert (await said(client, "machine_create", name="dev"))["state"] == "running"
        assert (await said(client, "machine_exec", machine="dev", command="exit 3"))["exit_code"] == 3
    # Without the token, with another, and for a page of another site in somebody's browser.
    for given in ({}, {"Authorization": "Bearer guess"}, headers | {"Origin": "http://evil.test"}):
        request = urllib.request.Request(over_http, data=b"{}", headers={"Content-Type": "application/json"} | given)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert refused.value.code == (403 if "Origin" in given else 401)
        refused.value.close()


def test_over_http_only_with_a_token(env):
    command = [sys.executable, "-m", "recess.cli.main", "mcp", "--http", "0"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "RECESS_TOKEN" in done.stderr


@pytest.mark.parametrize(
    ("entries", "status"),
    [
        ([], ""),
        ([("turn.end", {"status": "done"})], ""),  # of the turn before
        ([("turn.start", {"inbox": 7})], ""),
        ([("turn.start", {"inbox": 7}), ("turn.end", {"status": "failed"})], "failed"),
        ([("turn.start", {"inbox": 5}), ("turn.end", {}), ("turn.start", {"inbox": 7}), ("turn.end", {})], "done"),
    ],
)
def test_the_end_of_the_turn_that_a_message_began(entries, status):
    rows = [{"position": 8 + n, "kind": kind, "body": body} for n, (kind, body) in enumerate(entries)]
    assert turn_status(rows, 7) == status
