"""Room `broker`: egress of machines. Policy, secrets, the fence, and the proxy that speaks for the guest.

It knows the guest link's byte streams and HTTP. It must never know sessions, machines, drivers or databases: the
gate that answers "may this machine act now?" is injected (docs/internals/broker.md, docs/egress.md).
"""

from recess.broker.broker import Broker
from recess.broker.dial import Dialer, SystemDialer
from recess.broker.gate import Gate, OpenGate
from recess.broker.journal import Decision
from recess.broker.policy import Policy, Route, Rule, build_policy, parse_route, parse_rule
from recess.broker.secrets import Secret, SecretStore

__all__ = [
    "Broker",
    "Decision",
    "Dialer",
    "Gate",
    "OpenGate",
    "Policy",
    "Route",
    "Rule",
    "Secret",
    "SecretStore",
    "SystemDialer",
    "build_policy",
    "parse_route",
    "parse_rule",
]
