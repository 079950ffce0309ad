"""What a scraper and `recess session inspect` see of a server that has driven a session: over its own socket."""

from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from recess.api.app import make_app
from recess.api.wire import ProgressHub
from recess.config import load_config
from recess.node.local import LocalNode
from recess.version import __version__

AGENT = """
from recess_agent import agent

@agent(backend="process", idle="1h")
async def me(s):
    async for turn in s:
        await s.say("heard " + turn.text)
"""


async def get(app, path: str) -> tuple[dict, bytes]:
    sent = []
    scope = {
        "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "headers": [], "query_string": b"",
        "http_version": "1.1", "scheme": "http", "server": ("x", 1), "root_path": "",
    }  # fmt: skip

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    await app(scope, receive, send)
    assert sent[0]["status"] == 200
    return dict(sent[0]["headers"]), b"".join(one.get("body", b"") for one in sent)


async def test_figures_of_a_node(tmp_path) -> None:
    config = load_config({}, home=tmp_path / "home", run_dir=tmp_path / "run", driver="fake")
    node = await LocalNode.open(config)
    try:
        app = make_app(node, ProgressHub())
        await node.sessions.deploy("me", {"agent.py": AGENT})
        session = (await node.sessions.start("me")).id
        await node.sessions.send(session, "hi")
        async with asyncio.timeout(60):
            async for item in node.sessions.follow(session):
                if getattr(item, "kind", "") == "turn.end":
                    break
        await node.sessions.suspend(session)
        headers, text = await get(app, "/metrics")
        _, cost = await get(app, f"/v1/sessions/{session}/cost")
    finally:
        await node.close(detach=False)
    assert headers[b"content-type"].startswith(b"text/plain; version=0.0.4")
    families = text_string_to_metric_families(text.decode())
    values = {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}
    assert values[("recess_turns_total", "done")] == 1
    assert values[("recess_sessions", "frozen")] == 1
    assert values[("recess_info", "fake", __version__)] == 1
    assert values[("recess_disk_free_bytes",)] > 0
    assert b'"turns":1' in cost
    assert b'"snapshots":1' in cost
