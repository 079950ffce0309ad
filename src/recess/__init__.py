"""Recess: durable sessions for AI agents, made of a context log and a machine that freezes whole.

The rooms and what each may know of the others are drawn in `docs/architecture.md` and enforced by import-linter. The
names below are loaded on first use: `recess --help` must not pay for a client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from recess.version import __version__

if TYPE_CHECKING:
    from recess.sdk.async_machine import AsyncMachine
    from recess.sdk.client import Client
    from recess.sdk.machine import Machine
    from recess.sdk.processes import CommandFailed, Process, Result

__all__ = ["AsyncMachine", "Client", "CommandFailed", "Machine", "Process", "Result", "__version__"]

_HOMES = {
    "AsyncMachine": "recess.sdk.async_machine",
    "Client": "recess.sdk.client",
    "CommandFailed": "recess.sdk.processes",
    "Machine": "recess.sdk.machine",
    "Process": "recess.sdk.processes",
    "Result": "recess.sdk.processes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'recess' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
