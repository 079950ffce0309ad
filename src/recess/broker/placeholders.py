"""Secrets bound to hosts: which placeholder stands for which secret, where it may be filled in, and the filling in.

The guest holds `recess-secret-NAME` in the environment variable NAME. In a request to a host the secret is bound to,
the broker puts the value where the placeholder stands: in header values, in the password of `Authorization: Basic`, in
the query. A body is never looked into. Towards any other host the placeholder stays what it is, a worthless word.

Pure: no socket, no file. This module must know nothing of where values come from, nor of TLS.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from recess.broker.rules import Address, Rule, parse_rule
from recess.errors import BadInput

BINDINGS_MAX = 64
HOSTS_MAX = 32
DEFAULT_PORT = 443
Header = tuple[bytes, bytes]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}\Z")
_HOST_AND_PORT = re.compile(r"(\[[^\]]+\]|[^:\[\]]+)(?::(\d{1,5}))?\Z")
_NEVER = frozenset({b"host", b"content-length", b"transfer-encoding"})


@dataclass(frozen=True)
class Binding:
    """A secret and the places it may be sent to. `rules` name exact hosts, names below a domain, single addresses;
    each with exactly one port."""

    name: str
    rules: tuple[Rule, ...]
    text: str

    @property
    def placeholder(self) -> str:
        """What the guest holds instead of the value."""
        return placeholder_of(self.name)


def placeholder_of(name: str) -> str:
    """Return the word that stands for a secret. The same everywhere, so that forks and restores go on with it: it is a
    name and no key, and only a machine with a binding has it filled in."""
    return f"recess-secret-{name}"


def parse_binding(text: str) -> Binding:
    """Return the binding for "NAME@host[:port][,host[:port]...]"; host: a name, `*.domain` or an address; port: 443
    unless said. Raises BadInput."""
    name, found, hosts = text.partition("@")
    places = [place.strip() for place in hosts.split(",")]
    if not found or not _NAME.match(name) or not all(places):
        raise BadInput(
            f"secret {text[:80]!r} is not understood", hint="write NAME@host, like GITHUB_TOKEN@api.github.com"
        )
    if len(places) > HOSTS_MAX:
        raise BadInput(f"secret {name}: at most {HOSTS_MAX} hosts")
    return Binding(name, tuple(_place(name, place) for place in places), text)


def _place(name: str, text: str) -> Rule:
    match = _HOST_AND_PORT.match(text)
    if match is None or match[1] == "*":
        raise BadInput(
            f"secret {name}: {text[:80]!r} is not a host, a *.domain or an address, each with one port at most"
        )
    rule = parse_rule(f"{match[1]}:{match[2] or DEFAULT_PORT}")
    if rule.network is not None and rule.network.num_addresses != 1:
        raise BadInput(f"secret {name}: bound to one address at a time, not to {rule.network}")
    return rule


def parse_bindings(texts: Sequence[str]) -> tuple[Binding, ...]:
    """Return all bindings of a machine. Raises BadInput, also for a name bound twice (ambiguous to read)."""
    if len(texts) > BINDINGS_MAX:
        raise BadInput(f"a machine holds at most {BINDINGS_MAX} secrets")
    bindings = tuple(parse_binding(text) for text in texts)
    names = [binding.name for binding in bindings]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"secret {name} is bound twice", hint=f"name its hosts together: {name}@one,two")
    return bindings


def bound_to(bindings: Sequence[Binding], host: str | Address, port: int) -> tuple[Binding, ...]:
    """Return the bindings that a call to this place may have filled in."""
    return tuple(b for b in bindings if any(_covers(rule, host, port) for rule in b.rules))


def _covers(rule: Rule, host: str | Address, port: int) -> bool:
    if not rule.has_port(port):
        return False
    if not isinstance(host, str):
        return rule.network is not None and host in rule.network
    return rule.host == host if rule.host else bool(rule.suffix) and host.endswith(rule.suffix)


def uses(headers: Sequence[Header], path: str, bindings: Sequence[Binding]) -> tuple[Binding, ...]:
    """Return those bindings whose placeholder stands in this request."""
    found = []
    for binding in bindings:
        marked = {binding.placeholder: ""}
        if fill_headers(headers, marked) != list(headers) or fill_path(path, marked) != path:
            found.append(binding)
    return tuple(found)


def fill_headers(headers: Sequence[Header], values: Mapping[str, str]) -> list[Header]:
    """Return the headers with every placeholder replaced; `values`: placeholder -> value (printable ASCII)."""
    return [(name, value if name.lower() in _NEVER else _fill_value(name, value, values)) for name, value in headers]


def _fill_value(name: bytes, value: bytes, values: Mapping[str, str]) -> bytes:
    scheme, _, rest = value.partition(b" ")
    if name.lower() in (b"authorization", b"proxy-authorization") and scheme.lower() == b"basic":
        try:
            pair = base64.b64decode(rest.strip(), validate=True)
        except (binascii.Error, ValueError):
            return value
        filled = _fill(pair, values)
        return value if filled == pair else scheme + b" " + base64.b64encode(filled)
    return _fill(value, values)


def fill_path(path: str, values: Mapping[str, str]) -> str:
    """Return a request target with the placeholders in its query replaced, percent-encoded; its path stays."""
    head, mark, query = path.partition("?")
    if not mark:
        return path
    return head + mark + _fill(query.encode(), {k: quote(v, safe="") for k, v in values.items()}).decode()


def _fill(data: bytes, values: Mapping[str, str]) -> bytes:
    """Replace in one pass, longest name first: a placeholder may be the beginning of another's, and a value that looks
    like a placeholder is not filled in again."""
    if not values or b"recess-secret-" not in data:
        return data
    names = sorted((name.encode() for name in values), key=len, reverse=True)
    by_name = {name.encode(): value.encode() for name, value in values.items()}
    return re.sub(b"|".join(re.escape(name) for name in names), lambda match: by_name[match[0]], data)
