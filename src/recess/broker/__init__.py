"""Room `broker`: egress of machines. Policy, secrets, the fence, and the proxy that speaks for the guest.

It knows the guest link's byte streams and HTTP. It must never know sessions, machines, drivers or databases: the
gate that answers "may this machine act now?" is injected (docs/internals/broker.md, docs/egress.md).
"""

from recess.broker.authority import Authorities, new_authority_id
from recess.broker.broker import Broker
from recess.broker.dial import Dialer, SystemDialer
from recess.broker.gate import Gate, OpenGate
from recess.broker.journal import Decision
from recess.broker.placeholders import Binding, parse_bindings, placeholder_of
from recess.broker.policy import Policy, Route, build_policy, is_socket_path, parse_route
from recess.broker.rules import Rule, parse_rule
from recess.broker.secrets import Secret, SecretStore

__all__ = [
    "Authorities",
    "Binding",
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
    "is_socket_path",
    "new_authority_id",
    "parse_bindings",
    "parse_route",
    "parse_rule",
    "placeholder_of",
]
