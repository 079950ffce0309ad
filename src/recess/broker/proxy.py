"""One guest connection to the proxy port, from its first request to its end: read, ask, resolve, ask again, relay.

The order is the promise: the gate and the policy are asked before a name is resolved, the resolved addresses before
a socket is opened, the gate again right before the first byte goes out (resolving and connecting take time in which
a lease can end). This module must know nothing of leases or of how a gate decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import h11

from recess.broker.dial import Dialer, connect_any
from recess.broker.journal import Decision
from recess.broker.policy import Address, Policy, decide_address, decide_target
from recess.broker.relay import relay_request, tunnel
from recess.broker.secrets import SecretStore
from recess.broker.targets import Target, read_target
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


def describe(method: str, target: Target | None, allowed: bool, reason: str, wall_s: float) -> Decision:
    """Return a journal line: host, port, route and rule, never a path, a header or a value."""
    if target is None:
        return Decision(wall_s, "bad", "", 0, method[:16], "", allowed, reason)
    route = target.route.name if target.route else ""
    return Decision(wall_s, target.verb, str(target.host), target.port, method[:16], route, allowed, reason)


async def serve(guest: GuestSide, around: Surroundings) -> None:
    """Serve requests until the connection ends. Raises GuestFailed when the link is cut; answers everything else."""
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
            await _call(guest, event, around)
        except RecessError as exc:
            if guest.responded:
                return  # cut in the middle: the guest sees a body without an end
            status = 503 if isinstance(exc, Fenced) else exc.http_status
            await guest.send_problem(status, exc.to_dict())
            await guest.linger()
            return
        if not guest.next_cycle():
            return


async def _call(guest: GuestSide, request: h11.Request, around: Surroundings) -> None:
    method = request.method.decode("ascii")
    target: Target | None = None
    try:
        target = read_target(around.policy(), method, request.target.decode("ascii"))
        _ask_gate(around)
        reason, addresses = await _judge(target, around)
        secret = _secret_for(target, around.secrets)
    except RecessError as exc:
        around.note(method, target, False, exc.message)
        raise
    around.note(method, target, True, reason)
    pipe = await connect_any(around.dialer, addresses, target.port, str(target.host) if target.tls else "")
    try:
        _ask_gate(around)
    except Fenced:
        pipe[1].transport.abort()
        raise
    if target.verb == "connect":
        await tunnel(guest, pipe)
    else:
        await relay_request(guest, request, target, secret, pipe)


def _ask_gate(around: Surroundings) -> None:
    if not around.may_act():
        raise Fenced("this machine may not act: its lease has ended or a newer copy of it runs")


async def _judge(target: Target, around: Surroundings) -> tuple[str, list[Address]]:
    """Return the reason and the addresses that may be connected to. Raises Refused, Unavailable, Timeout."""
    policy = around.policy()
    if target.route is not None:
        reason = f"route {target.route.name}"
    else:
        verdict = decide_target(policy, target.host, target.port)
        if not verdict.allowed:
            raise Refused(verdict.reason, hint=f"start the machine with --allow {target.host}:{target.port}")
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


def _secret_for(target: Target, secrets: SecretStore) -> str | None:
    route = target.route
    if route is None or not route.secret:
        return None
    secret = secrets.get(route.secret)
    if secret is None and route.required:
        raise Unavailable(f"route {route.name} needs the secret {route.secret!r}, which is not set on this host")
    return secret.reveal() if secret else None
