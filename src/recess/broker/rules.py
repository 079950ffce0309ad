"""Allow rules and host names, read and checked: pure, no resolver, no socket.

This module must know nothing of routes, secrets or who asks.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from recess.errors import BadInput

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

DEFAULT_PORTS = frozenset({80, 443})
ANY_PORT: frozenset[int] = frozenset()  # an empty set of ports means: any

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)\Z")
_NUMERIC_LABEL = re.compile(r"(?:\d+|0x[0-9a-f]*)\Z")


@dataclass(frozen=True)
class Rule:
    """One allow rule. Exactly one of `host` (exact), `suffix` (".example.org", or "." for any name), `network`."""

    text: str
    host: str = ""
    suffix: str = ""
    network: Network | None = None
    ports: frozenset[int] = DEFAULT_PORTS

    def has_port(self, port: int) -> bool:
        """Tell whether this rule covers the port."""
        return not self.ports or port in self.ports


def parse_host(text: str) -> str | Address:
    """Return a canonical host name (lower case, no final dot) or an address. Raises BadInput.

    A name whose last label is a number ("127.1", "0x7f000001", "2130706433") is refused: resolvers read such names
    as addresses (inet_aton), so they would pass as names here and arrive as loopback there.
    """
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return plain_address(bare)
    except ValueError:
        pass
    name = bare.lower().removesuffix(".")
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.match(label) for label in labels) or _NUMERIC_LABEL.match(labels[-1]):
        raise BadInput(f"not a host name or an address: {text[:80]!r}")
    return name


def plain_address(text: str) -> Address:
    """Return an address with an IPv4-mapped one unwrapped (::ffff:127.0.0.1 is 127.0.0.1). Raises ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _split_port(text: str) -> tuple[str, frozenset[int]]:
    """Split "host:443", "[::1]:80", "host:*"; a bare IPv6 address or network has no port."""
    match = re.fullmatch(r"(\[[^\]]+\](?:/\d+)?|[^:]+):(\*|\d{1,5})", text)
    if match is None:
        return text, DEFAULT_PORTS
    if match[2] == "*":
        return match[1], ANY_PORT
    port = int(match[2])
    if not 1 <= port <= 65535:
        raise BadInput(f"allow rule {text!r}: not a port")
    return match[1], frozenset({port})


def parse_rule(text: str) -> Rule:
    """Return the rule for "host", "*.domain", "*", a CIDR or an address, each with an optional ":port" or ":*".

    Without a port a rule means 80 and 443. `*.example.org` covers names below example.org, not example.org itself.
    Raises BadInput.
    """
    stripped = text.strip()
    host, ports = _split_port(stripped)
    if host == "*":
        return Rule(stripped, suffix=".", ports=ports)
    if host.startswith("*."):
        name = parse_host(host[2:])
        if not isinstance(name, str):
            raise BadInput(f"allow rule {stripped!r}: a wildcard needs a domain, not an address")
        return Rule(stripped, suffix="." + name, ports=ports)
    bare = host.replace("[", "").replace("]", "")
    try:
        return Rule(stripped, network=ipaddress.ip_network(bare, strict=False), ports=ports)
    except ValueError:
        pass
    try:
        name = parse_host(host)
    except BadInput as exc:
        raise BadInput(
            f"allow rule {stripped[:80]!r} is not understood",
            hint="write a host, *.domain, a network like 10.0.0.0/8, each with an optional :port or :*",
        ) from exc
    return Rule(stripped, host=str(name), ports=ports)
