"""The example agent, whole but for the VM: its loop, SDK, session runtime, broker, model wire and payments, on processes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from recess.broker import Broker, OpenGate, SecretStore, build_policy
from recess.clock import SystemClock
from recess.demo.world import example_folder
from recess.testing.model_server import ModelServer
from recess.testing.payment_server import PaymentServer
from recess.testing.proxy_port import ProxyPort
from recess.testing.session_world import World, texts, world


@dataclass
class Stage:
    world: World
    model: ModelServer
    pay: PaymentServer
    config: dict

    async def deploy(self, name: str) -> str:
        source = (example_folder() / name).read_text()
        return (await self.world.sessions.deploy("coder", {"agent.py": source}, self.config)).version


@asynccontextmanager
async def stage(folder: Path) -> AsyncIterator[Stage]:
    async with ModelServer("sk-1") as model, PaymentServer("pk-1") as pay, world() as w:
        broker = Broker(OpenGate(), SecretStore(extra={"llm": "sk-1", "pay": "pk-1"}), SystemClock())
        broker.register("m", 0, build_policy([], {"llm": model.base_url, "pay": pay.url}))
        async with ProxyPort(broker.handler("m")) as port:
            base = f"http://127.0.0.1:{port.port}/route"
            env = {"OPENAI_BASE_URL": f"{base}/llm", "PAY_URL": f"{base}/pay", "CODER_WORKDIR": str(folder)}
            yield Stage(w, model, pay, {"env": env, "idle": "30s"})


async def test_tools_memory_and_upgrade(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        w = s.world
        old = await s.deploy("agent.py")
        row = await w.sessions.start("coder")
        log = await w.say(row.id, "Make it variant red", turn=1)
        assert (tmp_path / "site" / "index.html").read_text().count("Variant red") == 2
        assert texts(log)[-1] == "Variant red is in place."
        log = await w.say(row.id, "Is it still up?", turn=2)
        outputs = [e.body["output"] for e in log if e.kind == "tool.result"]
        known = json.loads(outputs[-1])
        assert known["memory"] == {"variant": "red"}
        assert known["process"]["turns"] == 2
        new = await s.deploy("agent_v2.py")
        log = await w.say(row.id, "What did we do so far?", turn=3)
        assert [(e.body["old"], e.body["new"]) for e in log if e.kind == "code"] == [(old, new)]
        assert [e.body["name"] for e in log if e.kind == "tool.start"][-1] == "outline"
        assert "Make it variant red; Is it still up?" in texts(log)[-1]
        assert texts(log)[-1].endswith("The page now: Variant red")
        assert not s.model.refused


async def test_a_charge_that_the_server_did_not_live_to_record_stands_once(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        w = s.world
        await s.deploy("agent.py")
        row = await w.sessions.start("coder")
        s.pay.hold()
        await w.sessions.send(row.id, "Charge 5 dollars", key="m1")
        await s.pay.counted.wait()
        machine = (await w.log.get(row.id)).meta["machine"]
        after = await w.crash_server()
        await w.machines.kill(machine, why="the power went")
        s.pay.release()
        await after.recover()
        await w.until(row.id, "turn.end")
        log = await w.entries(row.id)
        assert (len(s.pay.charges), s.pay.calls) == (1, 1)
        (settled,) = [e for e in log if e.kind == "tool.settled"]
        assert json.loads(settled.body["output"])["cents"] == 500
        assert "Charged 500 cents, once" in texts(log)[-1]
        assert "I was told" in texts(log)[-1]
        assert not s.model.refused
