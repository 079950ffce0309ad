"""What the sessions room is given: the effects and the settings, injected once by the node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from recess.catalog import AgentVersion
from recess.clock import Clock
from recess.contextlog.contract import ContextLog
from recess.machines.service import Machines
from recess.sessions.observing import Observer, Observers


class AgentStore(Protocol):
    """Deployed agent code; `recess.catalog.AgentRows` is one. Raises NotFound, BadInput, Corrupt."""

    async def deploy(
        self, agent: str, files: Mapping[str, bytes], config: Mapping[str, Any], *, now: float
    ) -> AgentVersion:
        """Store code and make it the agent's current version."""
        ...

    async def current(self, agent: str) -> AgentVersion:
        """Return the version deployed last."""
        ...

    async def get(self, agent: str, version: str) -> AgentVersion:
        """Return one version."""
        ...

    async def files(self, agent: str, version: str) -> dict[str, bytes]:
        """Return the files of exactly this version."""
        ...


@dataclass(frozen=True)
class Settings:
    """Durations in seconds. `owner` names this server in leases."""

    owner: str
    agent_package: Path  # the folder that holds recess_agent/
    embedded: bool = True  # the lock on the home proves other owners dead: claim by force
    lease_s: float = 15.0
    margin_s: float = 2.0  # we stop this much before the lease ends
    orphan_s: float = 600.0  # embedded: how long a machine lives after its server died
    idle_timeout_s: float = 30.0
    park_s: float = 0.0  # paused in memory for this long before it is frozen
    freeze_retry_s: float = 30.0
    term_s: float = 10.0  # from SIGTERM to SIGKILL of an agent process
    hook_s: float = 2.0
    rest_s: float = 2.0  # a machine whose agent waits for an answer or a time is put away after this
    due_near_s: float = 60.0  # but not for a time that is nearer than this
    cancel_s: float = 10.0  # how long an agent may take to stop a turn by itself
    max_text_bytes: int = 1 << 20


@dataclass(frozen=True)
class Deps:
    """The effects."""

    log: ContextLog
    machines: Machines
    agents: AgentStore
    clock: Clock
    settings: Settings
    observer: Observer = field(default_factory=Observers)  # told of every entry that this server appends
