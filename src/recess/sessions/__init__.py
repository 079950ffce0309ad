"""Room `sessions`: the only meeting point of the two durabilities (docs/internals/session-states.md).

`Sessions` is the service; `Deps` and `Settings` are what it is given; `LeaseGate` is what the broker asks.
"""

from recess.sessions.deps import AgentStore, Deps, Settings
from recess.sessions.lease import LeaseGate
from recess.sessions.service import Sessions

__all__ = ["AgentStore", "Deps", "LeaseGate", "Sessions", "Settings"]
