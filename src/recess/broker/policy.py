"""What a machine may reach, as data and pure decisions: no socket, no resolver, no clock in here.

A policy is a list of allow rules and a set of named routes; what no rule names is denied. A decision has two halves,
because a name is not a place: `decide_target` judges what the guest asked for before anything is resolved (so a
denied name does not even leak through DNS), `decide_address` judges where the name really leads, so that an allowed
name cannot be pointed at the host's loopback, at a metadata service or into a private network (DNS rebinding).

This module must know nothing of sessions, epochs, secrets' values or sockets.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from recess.broker.placeholders import Binding, parse_bindings
from recess.broker.rules import Address, Network, Rule, parse_host, parse_rule
from recess.errors import BadInput

RULES_MAX = 1000
ROUTES_MAX = 64
SOCKETS_MAX = 16  # as many doors guestd opens

_ROUTE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")

# Ranges that are not the public internet (IANA special-purpose registries, RFC 6890 and its updates). An address in
# one of them is reachable only by a rule that lies inside the same range: `0.0.0.0/0` never means the loopback.
_SPECIAL: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
        "::/128", "::1/128", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16",
        "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
    )
)  # fmt: skip
MACHINES_DOMAIN = "recess.internal"  # below `.internal`, which the public DNS keeps free for private use
_LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))


@dataclass(frozen=True)
class Route:
    """A named upstream that the broker itself speaks to; the operator chose it, so its address is not judged.

    `secret` names an entry of the secret store; it is sent as `header: prefix + value` and never to the guest.
    With `required`, a missing secret fails the call; without, the call goes out bare.
    """

    name: str
    upstream: str
    secret: str = ""
    header: str = "Authorization"
    prefix: str = "Bearer "
    required: bool = False

    @property
    def url(self) -> SplitResult:
        """The upstream, split."""
        return urlsplit(self.upstream)


@dataclass(frozen=True)
class Policy:
    """All that one machine may reach."""

    rules: tuple[Rule, ...] = ()
    routes: Mapping[str, Route] = field(default_factory=dict)
    bindings: tuple[Binding, ...] = ()  # secrets that are filled in towards their hosts
    authority: str = ""  # in whose name the broker speaks TLS to the guest for them
    sockets: Mapping[str, str] = field(default_factory=dict)  # path in the machine -> Unix socket of the host


@dataclass(frozen=True)
class Verdict:
    """Whether a target or an address is allowed, and the rule or the reason that says so."""

    allowed: bool
    reason: str


def parse_route(name: str, upstream: str, *, secret: str | None = None, required: bool = False) -> Route:
    """Return a checked route; its secret is the one of the same name unless said otherwise. Raises BadInput."""
    if not _ROUTE_NAME.match(name):
        raise BadInput(f"not a route name: {name[:80]!r}", hint="lower-case letters, digits, - and _")
    try:
        url = urlsplit(upstream)
        port_ok = url.port is None or url.port > 0
    except ValueError:
        url, port_ok = urlsplit(""), False
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment or not port_ok:
        raise BadInput(f"route {name}: not a base URL: {upstream[:120]!r}", hint="like https://api.openai.com/v1")
    if url.username is not None or url.password is not None:
        raise BadInput(f"route {name}: a URL holds no password here", hint="put it into a secret of the route's name")
    parse_host(url.hostname)
    return Route(name, upstream.rstrip("/"), secret=name if secret is None else secret, required=required)


def is_socket_path(path: str) -> bool:
    """Tell whether this can be a Unix socket's path: absolute, nothing to climb, short enough for the kernel (sun_path)."""
    plain = path.startswith("/") and not path.endswith("/") and "\0" not in path and ".." not in path.split("/")
    return plain and len(path.encode()) < 108


def parse_sockets(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return where in the machine which Unix socket of the host is. Raises BadInput."""
    for path in (path for pair in pairs for path in pair if not is_socket_path(path)):
        raise BadInput(f"not a path of a socket: {path[:120]!r}", hint="absolute, at most 107 bytes")
    found = {guest: host for host, guest in pairs}
    if len(found) < len(pairs) or len(pairs) > SOCKETS_MAX:
        raise BadInput(f"at most {SOCKETS_MAX} sockets, each at a path of its own")
    return found


def build_policy(
    allow: Sequence[str] = (), routes: Mapping[str, str] | None = None, secrets: Sequence[str] = (), authority: str = "",
    sockets: Sequence[tuple[str, str]] = (),
) -> Policy:  # fmt: skip
    """Return the policy for a machine spec's `allow`, `routes` (name -> upstream base URL), `secrets` ("NAME@host") and
    `sockets` (host path, path in the machine); a secret's hosts need no rule of their own. Raises BadInput."""
    named, bindings = routes or {}, parse_bindings(secrets)
    if len(allow) > RULES_MAX or len(named) > ROUTES_MAX:
        raise BadInput(f"a policy holds at most {RULES_MAX} rules and {ROUTES_MAX} routes")
    return Policy(
        rules=(*(parse_rule(text) for text in allow), *(rule for binding in bindings for rule in binding.rules)),
        routes={name: parse_route(name, upstream) for name, upstream in named.items()},
        bindings=bindings,
        authority=authority,
        sockets=parse_sockets(sockets),
    )


def machine_named(host: str | Address) -> str:
    """Return which machine a host name means: "db" for db.recess.internal, "" for a host that is no machine."""
    return (
        host.removesuffix(f".{MACHINES_DOMAIN}")
        if isinstance(host, str) and host.endswith(f".{MACHINES_DOMAIN}")
        else ""
    )


def _names(rule: Rule, host: str) -> bool:
    if rule.host:
        return rule.host == host
    if machine_named(host) and rule.suffix != f".{MACHINES_DOMAIN}":
        return False  # `*` means public hosts
    return bool(rule.suffix) and (rule.suffix == "." or host.endswith(rule.suffix))


def _within(network: Network, outer: Network) -> bool:
    return (
        network.version == outer.version and network.network_address in outer and network.prefixlen >= outer.prefixlen
    )


def _address_rule(policy: Policy, address: Address, port: int) -> Rule | None:
    """Return the rule that names this address, if any; special ranges need a rule that lies inside them."""
    special = next((n for n in _SPECIAL if address in n), None)
    for rule in policy.rules:
        if rule.network is None or address not in rule.network or not rule.has_port(port):
            continue
        if special is None or _within(rule.network, special):
            return rule
    return None


def decide_target(policy: Policy, host: str | Address, port: int) -> Verdict:
    """Judge what the guest asked for, before resolving it: a name needs a name rule, an address a network rule."""
    if not isinstance(host, str):
        rule = _address_rule(policy, host, port)
        return Verdict(True, f"rule {rule.text}") if rule else Verdict(False, f"no rule allows {host} port {port}")
    for rule in policy.rules:
        if _names(rule, host) and rule.has_port(port):
            return Verdict(True, f"rule {rule.text}")
    return Verdict(False, f"no rule allows {host} port {port}")


def decide_address(policy: Policy, host: str, address: Address, port: int) -> Verdict:
    """Judge where an allowed name leads. Public addresses pass; special ones need a network rule of their own.

    The one exception is the name `localhost`, whose exact rule names the loopback.
    """
    special = next((n for n in _SPECIAL if address in n), None)
    if special is None:
        return Verdict(True, "public address")
    rule = _address_rule(policy, address, port)
    if rule is not None:
        return Verdict(True, f"rule {rule.text}")
    exact = any(r.host == "localhost" and r.has_port(port) for r in policy.rules)
    if host == "localhost" and exact and special in _LOOPBACK:
        return Verdict(True, "rule localhost")
    return Verdict(False, f"{host} leads to {address} in {special}, which no rule names")
