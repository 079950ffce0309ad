"""Two nodes over one log, each with machines, a clock and a broker of its own; either can stand still and go on later.

For tests of fencing. What stands still is the server (all its calls to the log wait) and, with `whole_host`, its keepers
too, as when a laptop is closed or a VM is moved. It must know nothing of what the sessions do meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from recess.broker import Broker, SecretStore, build_policy
from recess.contextlog import MemoryLog
from recess.contextlog.contract import ContextLog
from recess.sessions.deps import Settings
from recess.testing.proxy_port import ProxyPort
from recess.testing.session_harness import ProcessMachines
from recess.testing.session_world import AGENT_PACKAGE, JumpClock, MemoryAgents, World


class PausableLog:
    """A log as one node sees it: every call waits while the node stands still."""

    def __init__(self, log: ContextLog) -> None:
        self._log = log
        self.going = asyncio.Event()
        self.going.set()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._log, name)
        if not inspect.iscoroutinefunction(call):
            return call

        async def held(*args: Any, **kwargs: Any) -> Any:
            await self.going.wait()
            return await call(*args, **kwargs)

        return held


@dataclass
class Node(World):
    """A world that shares its log with others."""

    def stand_still(self, *, whole_host: bool) -> None:
        """From now on no call of this server gets through; with `whole_host` no keeper of it acts either."""
        self._pausable.going.clear()
        if whole_host:
            for machine_id in list(self.machines.machines):
                self.machines.keeper_off(machine_id)

    def go_on(self) -> None:
        """The calls that waited get through now, stale as they are."""
        self._pausable.going.set()

    async def outside_call(self, machine_id: str, epoch: int, port: int) -> int:
        """Call `http://127.0.0.1:PORT/` from this machine through this node's broker; return the HTTP status."""
        broker = Broker(self.sessions.gate, SecretStore(), self.clock)
        broker.register(machine_id, epoch, build_policy([f"127.0.0.1:{port}"], {}))
        try:
            async with ProxyPort(broker.handler(machine_id)) as proxy:
                reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
                try:
                    target = f"127.0.0.1:{port}"
                    head = f"GET http://{target}/ HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n"
                    writer.write(head.encode())
                    return int((await reader.readline()).split()[1])
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
        finally:
            broker.unregister(machine_id)

    @property
    def _pausable(self) -> PausableLog:
        return cast(PausableLog, self.log)


@asynccontextmanager
async def two_nodes(
    *, logs: tuple[ContextLog, ContextLog] | None = None, **settings: Any
) -> AsyncIterator[tuple[Node, Node]]:
    """Make two nodes of a cluster (nobody claims by force); everything they started is ended. `logs`: what each sees of the one
    log, by default the same object in memory."""
    agents, memory = MemoryAgents(), MemoryLog()
    seen = logs or (memory, memory)
    with TemporaryDirectory(prefix="rcn", ignore_cleanup_errors=True) as folder:
        nodes = [_node(Path(folder) / name, name, log, agents, settings) for name, log in zip("ab", seen, strict=True)]
        try:
            yield nodes[0], nodes[1]
        finally:
            for node in nodes:
                node.go_on()
                with contextlib.suppress(Exception):
                    await node.sessions.shutdown(detach=True)
                await node.machines.close()


def _node(folder: Path, name: str, log: ContextLog, agents: MemoryAgents, settings: dict[str, Any]) -> Node:
    folder.mkdir()
    base = {
        "owner": f"node-{name}", "agent_package": AGENT_PACKAGE, "embedded": False, "hook_s": 0.5, "term_s": 1.0,
        "lease_s": 1.5, "margin_s": 0.3, **settings,
    }  # fmt: skip
    shared = cast(ContextLog, PausableLog(log))
    return Node(ProcessMachines(folder), shared, agents, Settings(**base), clock=JumpClock())
