"""What a guest's request asks for: pure reading of HTTP request lines and headers, and what goes upstream instead.

Three forms reach the proxy port: CONNECT authority-form, absolute-form for http://, and origin-form
`/route/<name>/...`, which names one of the policy's routes. Nothing here opens anything. Formats: RFC 9112
section 3.2 (request targets), RFC 9110 section 7.6.1 (headers that end at this hop).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from recess.broker.placeholders import fill_headers
from recess.broker.policy import Policy, Route
from recess.broker.rules import Address, parse_host
from recess.errors import BadInput, NotFound

Header = tuple[bytes, bytes]

_HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade", b"expect",
    }
)  # fmt: skip
_ROUTE_PATH = re.compile(r"/route/([^/?#]+)(/[^?#]*)?(\?[^#]*)?\Z")


class BadTarget(BadInput):
    """The request line asks for something this proxy does not do."""


@dataclass(frozen=True, repr=False)
class Keys:
    """What is put into one request that the guest must not hold: a route's secret, and values by their placeholders."""

    route: str | None = None
    values: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """One outside call to be judged and made. `verb`: connect | http | https (inside a CONNECT to a secret's host) |
    route. `path` is the upstream's target."""

    verb: str
    host: str | Address
    port: int
    path: str = ""
    tls: bool = False
    route: Route | None = None

    @property
    def authority(self) -> str:
        """The Host header's value."""
        shown = f"[{self.host}]" if ":" in str(self.host) else str(self.host)
        default = 443 if self.tls else 80
        return shown if self.port == default else f"{shown}:{self.port}"


def read_target(policy: Policy, method: str, target: str) -> Target:
    """Return what a request line asks for. Raises BadTarget (malformed) or NotFound (no such route)."""
    if method == "CONNECT":
        return _read_connect(target)
    if target.startswith("/"):
        return _read_route(policy, target)
    return _read_absolute(target)


def read_inside(outer: Target, target: str) -> Target:
    """Return what a request line asks for inside the TLS of a CONNECT to `outer`. Raises BadTarget."""
    if not target.startswith("/"):
        raise BadTarget(f"inside a connection to {outer.authority} a request names a path, got {target[:80]!r}")
    return Target("https", outer.host, outer.port, target, tls=True)


def _read_connect(target: str) -> Target:
    match = re.fullmatch(r"(\[[^\]]+\]|[^:/@?#]+):(\d{1,5})", target)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise BadTarget(f"CONNECT needs host:port, got {target[:80]!r}")
    return Target("connect", parse_host(match[1]), int(match[2]))


def _read_absolute(target: str) -> Target:
    try:
        url = urlsplit(target)
        port = url.port or 80
    except ValueError:
        raise BadTarget(f"not a URL: {target[:80]!r}") from None
    if url.scheme.lower() != "http" or not url.hostname or url.username is not None:
        raise BadTarget(
            f"the proxy takes http:// URLs, CONNECT and /route/..., got {target[:80]!r}",
            hint="https goes through CONNECT, which every client does by itself",
        )
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    return Target("http", parse_host(url.hostname), port, path)


def _read_route(policy: Policy, target: str) -> Target:
    match = _ROUTE_PATH.match(target)
    if match is None:
        raise BadTarget(
            f"this port is an HTTP proxy, got {target[:80]!r}",
            hint="named upstreams are at /route/NAME/...",
        )
    route = policy.routes.get(match[1])
    if route is None:
        known = ", ".join(sorted(policy.routes)) or "none"
        raise NotFound(f"this machine has no route {match[1][:64]!r}", hint=f"its routes: {known}", kind="route")
    rest = match[2] or ""
    if _climbs(rest):
        raise BadTarget("a route's path must not climb above its upstream")
    url = route.url
    if url.hostname is None:
        raise BadTarget(f"route {route.name} has no upstream host")
    tls = url.scheme == "https"
    path = (url.path + rest or "/") + (match[3] or "")
    return Target("route", parse_host(url.hostname), url.port or (443 if tls else 80), path, tls=tls, route=route)


def _climbs(path: str) -> bool:
    """Tell whether any reading of the path (decoded once or twice, backslashes as slashes) has a `..` segment."""
    for _ in range(3):
        if ".." in re.split(r"[/\\;]", path):
            return True
        path = unquote(path)
    return False


def _named_by_connection(headers: Iterable[Header]) -> set[bytes]:
    return {
        token.strip().lower() for name, value in headers if name.lower() == b"connection" for token in value.split(b",")
    }


def upstream_headers(headers: list[Header], target: Target, keys: Keys) -> list[Header]:
    """Return the headers that go upstream: no hop-by-hop ones, our Host, framing kept, the keys put in.

    On a route with a secret the guest's own header of that name is dropped: it holds a placeholder at best.
    """
    dropped = _HOP_BY_HOP | _named_by_connection(headers) | {b"host"}
    secret = keys.route
    dropped -= {b"content-length"}  # framing is not the guest's to hide by naming it in Connection
    if target.route is not None and secret is not None:
        dropped |= {target.route.header.lower().encode()}
    chunked = any(name.lower() == b"transfer-encoding" for name, _ in headers)
    if chunked:  # both framings at once is request smuggling; the one that h11 read by is the one that goes on
        dropped |= {b"content-length"}
    kept = [(b"Host", target.authority.encode())]
    kept += [(name, value) for name, value in headers if name.lower() not in dropped]
    if chunked:
        kept.append((b"Transfer-Encoding", b"chunked"))
    if target.route is not None and secret is not None:
        kept.append((target.route.header.encode(), (target.route.prefix + secret).encode()))
    kept.append((b"Connection", b"close"))
    return fill_headers(kept, keys.values)


def guest_headers(headers: list[Header]) -> list[Header]:
    """Return the upstream's response headers that go to the guest; its framing is made anew."""
    dropped = _HOP_BY_HOP | (_named_by_connection(headers) - {b"content-length"})
    return [(name, value) for name, value in headers if name.lower() not in dropped]
