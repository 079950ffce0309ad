"""One guest connection to the proxy port, from its first request to its end: read, ask, resolve, ask again, relay.

The order is the promise: the gate and the policy are asked before a name is resolved, the resolved addresses before
a socket is opened, the gate again right before the first byte goes out (resolving and connecting take time in which
a lease can end). This module must know nothing of leases or of how a gate decides.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import h11

from recess.broker.dial import Dialer, Pipe, connect_any
from recess.broker.journal import Decision
from recess.broker.placeholders import Binding, bound_to, uses
from recess.broker.policy import Policy, decide_address, decide_target, machine_named
from recess.broker.relay import accept_connect, relay_request, tunnel
from recess.broker.rules import Address
from recess.broker.secrets import SecretStore
from recess.broker.targets import Keys, Target, read_inside, read_target
from recess.broker.tls_stream import TlsStream
from recess.broker.wire import GuestSide
from recess.errors import BadInput, Fenced, RecessError, Refused, Unavailable

REQUEST_WAIT_S = 300.0  # an idle keep-alive connection


@dataclass(frozen=True)
class Surroundings:
    """What one connection may use. `may_act` and `policy` are asked afresh for each call: both can change meanwhile."""

    may_act: Callable[[], bool]
    policy: Callable[[], Policy]
    note: Callable[[str, Target | None, bool, str], None]  # method, target, allowed, reason
    secrets: SecretStore
    dialer: Dialer
    tls_context: Callable[
        [str | Address], ssl.SSLContext
    ]  # our end towards the guest; raises Refused where there is none
    sibling: Callable[[str, int], Awaitable[Pipe]]  # a port of another machine, by its name; raises Unavailable


def describe(method: str, target: Target | None, allowed: bool, reason: str, wall_s: float) -> Decision:
    """Return a journal line: host, port, route and rule, never a path, a header or a value."""
    if target is None:
        return Decision(wall_s, "bad", "", 0, method[:16], "", allowed, reason)
    route = target.route.name if target.route else ""
    return Decision(wall_s, target.verb, str(target.host), target.port, method[:16], route, allowed, reason)


async def serve(guest: GuestSide, around: Surroundings, outer: Target | None = None) -> None:
    """Serve requests until the connection ends; `outer`: the CONNECT inside whose TLS they come. Raises GuestFailed when
    the link is cut; answers everything else."""
    while True:
        try:
            async with asyncio.timeout(REQUEST_WAIT_S):
                event = await guest.next_event()
        except TimeoutError:
            return
        except h11.RemoteProtocolError as exc:
            await guest.send_problem(exc.error_status_hint, BadInput(f"not HTTP/1.1: {exc}").to_dict())
            await guest.linger()
            return
        if not isinstance(event, h11.Request):
            return
        try:
            await _call(guest, event, around, outer)
        except RecessError as exc:
            if guest.responded:
                return  # cut in the middle: the guest sees a body without an end
            status = 503 if isinstance(exc, Fenced) else exc.http_status
            await guest.send_problem(status, exc.to_dict())
            await guest.linger()
            return
        if not guest.next_cycle():
            return


async def _call(guest: GuestSide, request: h11.Request, around: Surroundings, outer: Target | None) -> None:
    method = request.method.decode("ascii")
    target: Target | None = None
    try:
        asked = request.target.decode("ascii")
        target = read_inside(outer, asked) if outer is not None else read_target(around.policy(), method, asked)
        _ask_gate(around)
        reason, way = await _judge(target, around)
        plain = target.route is not None or bool(machine_named(target.host))  # a secret goes to a host outside only
        bindings = () if plain else bound_to(around.policy().bindings, target.host, target.port)
        tls = around.tls_context(target.host) if target.verb == "connect" and bindings else None
        keys = await asyncio.to_thread(_keys_for, request, target, bindings, around.secrets)
    except RecessError as exc:
        around.note(method, target, False, exc.message)
        raise
    around.note(method, target, True, reason)
    if tls is not None:
        await _inside(guest, target, tls, around)
        return
    pipe = await way()
    try:
        _ask_gate(around)
    except Fenced:
        pipe[1].transport.abort()
        raise
    if target.verb == "connect":
        await tunnel(guest, pipe)
    else:
        await relay_request(guest, request, target, keys, pipe)


async def _inside(guest: GuestSide, target: Target, context: ssl.SSLContext, around: Surroundings) -> None:
    """Speak TLS to the guest as the host it asked for, and serve what it asks in there. Each request is judged for
    itself and goes out on a connection of its own, whose certificate is verified as the guest would have done."""
    stream = TlsStream(guest.stream, context)
    early = await accept_connect(guest)
    try:
        await stream.handshake(early)
    except BadInput as exc:
        around.note("CONNECT", target, False, exc.message)
        raise
    await serve(GuestSide(stream), around, target)
    await stream.close_write()


def _ask_gate(around: Surroundings) -> None:
    if not around.may_act():
        raise Fenced("this machine may not act: its lease has ended or a newer copy of it runs")


async def _judge(target: Target, around: Surroundings) -> tuple[str, Callable[[], Awaitable[Pipe]]]:
    """Return the reason, and what connects to where the target was judged to lead. Raises Refused, Unavailable, Timeout."""
    if name := machine_named(target.host):
        if target.tls:
            raise Refused("a route to a machine of this project speaks http, not https")
        if target.route is None and not (verdict := decide_target(around.policy(), target.host, target.port)).allowed:
            raise _refused(verdict.reason, target)
        return f"machine {name}", lambda: around.sibling(name, target.port)
    reason, addresses = await _judge_addresses(target, around)
    host = str(target.host) if target.tls else ""
    return reason, lambda: connect_any(around.dialer, addresses, target.port, host)


def _refused(reason: str, target: Target) -> Refused:
    return Refused(reason, hint=f"start the machine with --allow {target.host}:{target.port}")


async def _judge_addresses(target: Target, around: Surroundings) -> tuple[str, list[Address]]:
    policy = around.policy()
    if target.route is not None:
        reason = f"route {target.route.name}"
    else:
        verdict = decide_target(policy, target.host, target.port)
        if not verdict.allowed:
            raise _refused(verdict.reason, target)
        reason = verdict.reason
    if not isinstance(target.host, str):
        return reason, [target.host]
    found = await around.dialer.resolve(target.host, target.port)
    if target.route is not None:
        return reason, found
    verdicts = [(address, decide_address(policy, target.host, address, target.port)) for address in found]
    good = [address for address, verdict in verdicts if verdict.allowed]
    if not good and verdicts:
        raise Refused(verdicts[0][1].reason, hint="allow that network by a rule of its own, like 10.0.0.0/8:443")
    return reason, good


def _keys_for(request: h11.Request, target: Target, bindings: Sequence[Binding], secrets: SecretStore) -> Keys:
    """Return what is to be put into this request; a secret that it does not use is not even read. Raises Unavailable."""
    route = target.route
    if route is not None:
        secret = secrets.get(route.secret) if route.secret else None
        if secret is None and route.secret and route.required:
            raise Unavailable(f"route {route.name} needs the secret {route.secret!r}, which is not set on this host")
        return Keys(secret.reveal() if secret else None)
    values: dict[str, str] = {}
    for binding in uses(list(request.headers), target.path, bindings) if target.verb != "connect" else ():
        secret = secrets.get(binding.name)
        if secret is None:
            raise Unavailable(
                f"the secret {binding.name} is not set on this host", hint=f"recess secrets set {binding.name}"
            )
        values[binding.placeholder] = secret.reveal()
    return Keys(values=values)
