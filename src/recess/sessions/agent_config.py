"""What a deployed agent asks of its machine and its supervisor: read from the source without running it, checked once.

`@agent(image="base", idle="30s", ...)` in the entry file gives defaults; the deploy's own config wins. Pure.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recess.broker import build_policy
from recess.errors import BadInput
from recess.machines.service import MachineSpec
from recess.sessions.cron import parse_cron
from recess.sessions.decisions import POLICIES
from recess.sessions.limits import Limits, parse_limits
from recess.units import parse_duration, parse_size

ENTRY = "agent.py"
SNAPSHOT_LEAST_S = 1.0
CRONS_MAX = 16
CONTRACT_MAX = 1_000_000
BACKENDS = ("machine", "process")
_KEYS = frozenset(
    {
        "image",
        "driver",
        "memory",
        "cpus",
        "disk",
        "idle",
        "policy",
        "contract",
        "env",
        "allow",
        "routes",
        "network",
        "entry",
        "upgrade",
        "snapshot",
        "cron",
        "backend",
        "limits",
        "memory_most",
    }
)


@dataclass(frozen=True)
class AgentConfig:
    """A checked configuration. `idle_s` None: the server's default. `env` is the agent process's."""

    entry: str = ENTRY
    image: str = "base"
    backend: str = "machine"  # or process: a plain process of this host, no VM (recess.plain)
    driver: str = ""  # "": the node's own choice
    idle_s: float | None = None
    policy: str = "turn"
    contract: int = 0  # what clients may expect of this code; see `decisions.Contracts`
    snapshot: str = "off"  # beside those of idle times: off | turn | tool | seconds (then every `snapshot_s`)
    snapshot_s: float = 0.0
    cron: Mapping[str, str] = field(default_factory=dict)  # expression -> the message that comes at that time
    memory_bytes: int = 512 << 20
    memory_most_bytes: int = 0  # how large a machine may be made that ran out of memory; 0: twice `memory_bytes`
    limits: Limits = field(default_factory=Limits)  # of one turn
    cpus: int = 1
    disk_bytes: int = 4 << 30
    network: str = "broker"
    allow: tuple[str, ...] = ()
    routes: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)

    def larger_bytes(self, memory_bytes: int) -> int:
        """Return how much memory a machine that ran out of this much gets, 0 if it is as large as it may be."""
        most = self.memory_most_bytes or 2 * self.memory_bytes
        return min(2 * memory_bytes, most) if memory_bytes < most and self.backend == "machine" else 0

    def machine_spec(self, session: str) -> MachineSpec:
        """Return the machine a session of this agent runs in."""
        return MachineSpec(
            image=self.image, driver=self.driver, memory_bytes=self.memory_bytes, cpus=self.cpus,
            disk_bytes=self.disk_bytes,
            network=self.network, allow=self.allow, routes=dict(self.routes),
            labels={"session": session, **({"backend": self.backend} if self.backend != "machine" else {})},
        )  # fmt: skip


def config_from_source(source: str) -> dict[str, Any]:
    """Return the literal keyword arguments of the file's `@agent(...)`. Raises BadInput if the file does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as exc:
        raise BadInput(f"agent code: {exc}") from exc
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.AsyncFunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and _name(decorator.func) == "agent":
                    found.update(_literals(decorator))
    return found


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _literals(call: ast.Call) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg in _KEYS:
            try:
                out[keyword.arg] = ast.literal_eval(keyword.value)
            except ValueError as exc:
                raise BadInput(f"@agent: {keyword.arg} must be a literal, it is read without running the file") from exc
    return out


def check_config(config: Mapping[str, Any]) -> AgentConfig:
    """Return the configuration as typed data. Raises BadInput naming the key that is wrong."""
    unknown = sorted(set(config) - _KEYS)
    if unknown:
        raise BadInput(f"agent config: unknown key {unknown[0]!r}", hint=f"known keys: {', '.join(sorted(_KEYS))}")
    policy = str(config.get("policy") or config.get("upgrade") or "turn")
    if policy not in POLICIES:
        raise BadInput(f"agent config: policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    default = AgentConfig()
    backend = str(config.get("backend") or default.backend)
    if backend not in BACKENDS:
        raise BadInput(f"agent config: backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    unheld = [name for name in ("allow", "routes", "network") if config.get(name)]
    if backend == "process" and unheld:
        # What nobody would hold must not look as if it were held.
        raise BadInput(f"agent config: {unheld[0]}: a plain process has this host's network, no rule holds for it",
                       hint="leave it out, or use backend='machine'")  # fmt: skip
    snapshot, snapshot_s = _snapshot(config.get("snapshot") or "off")
    allow, routes = _strings("allow", config.get("allow") or []), _pairs("routes", config.get("routes") or {})
    build_policy(allow, routes)  # what no machine could be started with is told now, and not to whoever sends a message
    return AgentConfig(
        entry=str(config.get("entry") or ENTRY),
        image=str(config.get("image") or default.image),
        backend=backend,
        driver=str(config.get("driver") or default.driver),
        idle_s=parse_duration(config["idle"]) if config.get("idle") else None,
        policy=policy,
        contract=_contract(config.get("contract", 0)),
        snapshot=snapshot,
        snapshot_s=snapshot_s,
        cron=_crons(config.get("cron") or {}),
        memory_bytes=parse_size(config["memory"]) if config.get("memory") else default.memory_bytes,
        memory_most_bytes=parse_size(config["memory_most"]) if config.get("memory_most") else 0,
        limits=parse_limits(config.get("limits")),
        cpus=_count(config.get("cpus", default.cpus)),
        disk_bytes=parse_size(config["disk"]) if config.get("disk") else default.disk_bytes,
        network=str(config.get("network") or default.network),
        allow=tuple(allow),
        routes=routes,
        env=_pairs("env", config.get("env") or {}),
    )


def _snapshot(value: object) -> tuple[str, float]:
    if value in ("off", "turn", "tool"):
        return str(value), 0.0
    try:
        seconds = parse_duration(value if isinstance(value, str) else str(value))
    except BadInput as exc:
        raise BadInput(f"agent config: snapshot must be off, turn, tool or a time like 60s, not {value!r}") from exc
    if seconds < SNAPSHOT_LEAST_S:
        raise BadInput(f"agent config: snapshot: at least {SNAPSHOT_LEAST_S:.0f} s apart")
    return "seconds", seconds


def _crons(value: object) -> dict[str, str]:
    found = _pairs("cron", value)
    if len(found) > CRONS_MAX or not all(found.values()):
        raise BadInput(f"agent config: cron: at most {CRONS_MAX} times, each with a message")
    for text in found:
        parse_cron(text)
    return found


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64:
        raise BadInput(f"agent config: cpus must be 1 to 64, not {value!r}")
    return value


def _contract(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= CONTRACT_MAX:
        raise BadInput(f"agent config: contract must be a number from 0 to {CONTRACT_MAX}, not {value!r}")
    return value


def _strings(name: str, value: object) -> list[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise BadInput(f"agent config: {name} must be a list of strings")
    return list(value)


def _pairs(name: str, value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        raise BadInput(f"agent config: {name} must map strings to strings")
    return dict(value)
