"""The broker: the host end of the proxy port inside every machine, and the only way out of one without a NIC.

It holds one record per machine (epoch, policy, open connections, journal), asks the injected gate before every
outside call, and cuts what is open when the gate says the epoch is lost. All state is in memory: after a restart the
composition root registers again, and until then every stream is refused (fails closed). It must know nothing of
sessions, leases, databases, machines' rows or drivers.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import OrderedDict
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol

import h11

from recess.broker.authority import Authorities
from recess.broker.dial import Dialer, Pipe, SystemDialer, abort, connect_socket
from recess.broker.gate import Gate
from recess.broker.journal import Decision, Journal
from recess.broker.policy import Policy
from recess.broker.proxy import Surroundings, describe, serve
from recess.broker.relay import carry
from recess.broker.rules import Address
from recess.broker.secrets import SecretStore
from recess.broker.targets import Target
from recess.broker.wire import GuestSide
from recess.clock import Clock
from recess.errors import Fenced, RecessError, Refused, Unavailable
from recess.guestlink.link import ByteStream, IncomingHandler

CONNECTIONS_MAX = 64  # per machine
JOURNALS_MAX = 1000


class Siblings(Protocol):
    """How one machine reaches another by name."""

    async def connect(self, machine_id: str, name: str, port: int) -> Pipe:
        """Return a connection to a port of the machine that `name` means to this one. Raises Unavailable, and says no more
        of a machine that is not of the same project than of one that is not there."""
        ...


class _Machine:
    """One registered machine; replaced whole when its epoch changes."""

    def __init__(self, epoch: int, policy: Policy) -> None:
        self.epoch = epoch
        self.policy = policy
        self.open: set[asyncio.Task[None]] = set()
        self.watcher: asyncio.Task[None] | None = None

    def cut(self) -> None:
        """End every open connection; their handlers close the streams."""
        for task in self.open:
            task.cancel()


class Broker:
    """See the module. Every method but the handlers is synchronous and must be called on the event loop."""

    def __init__(
        self, gate: Gate, secrets: SecretStore, clock: Clock, *, dialer: Dialer | None = None,
        authorities: Authorities | None = None,
    ) -> None:  # fmt: skip
        self._gate = gate
        self._secrets = secrets
        self._clock = clock
        self._dialer: Dialer = dialer or SystemDialer()
        self._authorities = authorities
        self._siblings: Siblings | None = None
        self._machines: dict[str, _Machine] = {}
        self._journals: OrderedDict[str, Journal] = OrderedDict()

    def bind(self, siblings: Siblings) -> None:
        """Say how machines reach each other; until then they do not."""
        self._siblings = siblings

    def register(self, machine_id: str, epoch: int, policy: Policy) -> None:
        """Let a machine out under this policy. The same epoch again changes the policy of the calls to come; another
        epoch also cuts what the former one left open."""
        known = self._machines.get(machine_id)
        if known is not None and known.epoch == epoch:
            known.policy = policy
            return
        if known is not None:
            self.unregister(machine_id)
        self._machines[machine_id] = _Machine(epoch, policy)

    def unregister(self, machine_id: str) -> None:
        """Cut everything the machine has open and refuse what comes; unknown machines are no error."""
        machine = self._machines.pop(machine_id, None)
        if machine is None:
            return
        machine.cut()
        if machine.watcher is not None:
            machine.watcher.cancel()

    def decisions(self, machine_id: str) -> list[Decision]:
        """Return the newest decisions (at most 500), oldest first; they outlive `unregister`."""
        journal = self._journals.get(machine_id)
        return journal.entries() if journal else []

    def decisions_after(self, machine_id: str, number: int) -> tuple[int, int, list[Decision]]:
        """Return how many calls were allowed and denied in all, and the newest decisions whose number (from 1) is higher."""
        journal = self._journals.get(machine_id)
        if journal is None:
            return 0, 0, []
        newest = journal.entries()
        return (
            journal.allowed,
            journal.denied,
            newest[max(0, number - (journal.allowed + journal.denied - len(newest))) :],
        )

    def open_connections(self, machine_id: str) -> int:
        """Return how many guest connections are open."""
        machine = self._machines.get(machine_id)
        return len(machine.open) if machine else 0

    def handler(self, machine_id: str) -> IncomingHandler:
        """Return the handler of this machine's "proxy" and "socket" streams; it may be set before `register` and never
        raises."""

        async def handle(service: str, metadata: Mapping[str, Any], stream: ByteStream) -> None:
            try:
                if service == "socket":
                    await self._accept_socket(machine_id, str(metadata.get("path", "")), stream)
                else:
                    await self._accept(machine_id, GuestSide(stream))
            finally:
                await _close(stream)

        return handle

    async def _accept(self, machine_id: str, guest: GuestSide) -> None:
        machine = self._machines.get(machine_id)
        if machine is None or len(machine.open) >= CONNECTIONS_MAX:
            why = "this machine is not let out" if machine is None else f"over {CONNECTIONS_MAX} connections are open"
            await _quietly(_refuse(guest, Unavailable(why)))
            return
        around = Surroundings(
            may_act=lambda: self._may_act(machine_id, machine),
            policy=lambda: machine.policy,
            note=lambda method, target, allowed, reason: self._note(machine_id, method, target, allowed, reason),
            secrets=self._secrets,
            dialer=self._dialer,
            tls_context=lambda host: self._tls_context(machine.policy, host),
            sibling=lambda name, port: self._sibling(machine_id, name, port),
        )
        await self._run(machine_id, machine, serve(guest, around))

    async def _accept_socket(self, machine_id: str, path: str, stream: ByteStream) -> None:
        """Join a connection to a door in the machine with the host's socket it stands for; what cannot be is hung up on."""
        machine = self._machines.get(machine_id)
        if machine is not None and len(machine.open) < CONNECTIONS_MAX:
            await self._run(machine_id, machine, self._serve_socket(machine_id, machine, path, stream))

    async def _serve_socket(self, machine_id: str, machine: _Machine, path: str, stream: ByteStream) -> None:
        host = machine.policy.sockets.get(path, "")

        def note(allowed: bool, reason: str) -> None:
            shown = host or path
            self._add(machine_id, Decision(self._clock.wall_s(), "socket", shown, 0, "", "", allowed, reason))

        if not host:
            note(False, "no such socket is shared with this machine")
            return
        try:
            if not self._may_act(machine_id, machine):
                raise Fenced("this machine may not act")
            pipe = await connect_socket(host)
            if not self._may_act(machine_id, machine):  # connecting took time
                abort(pipe[1])
                raise Fenced("this machine may not act")
        except RecessError as exc:
            note(False, exc.message)
            return
        note(True, f"socket {path}")
        await carry(stream, pipe)

    async def _run(self, machine_id: str, machine: _Machine, work: Coroutine[Any, Any, None]) -> None:
        """Serve one connection as one of the machine's, which a cut ends."""
        task = asyncio.create_task(_quietly(work), name=f"broker-{machine_id}")
        machine.open.add(task)
        try:
            await asyncio.wait({task})  # its cancellation (a cut) is not ours
        finally:
            task.cancel()
            machine.open.discard(task)

    def _may_act(self, machine_id: str, machine: _Machine) -> bool:
        """Ask the gate for one call. A yes is watched from here on, not from when the connection came: one that was
        opened before the lease was ours (a pool's, an adopted machine's) carries calls that must be cut as well."""
        if self._machines.get(machine_id) is not machine or not self._gate.may_act(machine_id, machine.epoch):
            return False
        if machine.watcher is None:
            machine.watcher = asyncio.create_task(self._watch(machine_id, machine), name=f"broker-watch-{machine_id}")
        return True

    async def _sibling(self, machine_id: str, name: str, port: int) -> Pipe:
        if self._siblings is None:
            raise Unavailable("machines do not reach each other on this node yet")
        return await self._siblings.connect(machine_id, name, port)

    def _tls_context(self, policy: Policy, host: str | Address) -> ssl.SSLContext:
        if self._authorities is None or not policy.authority:
            raise Refused("this machine has no authority to speak TLS for a secret's host")
        authority = self._authorities.open(policy.authority, policy.bindings)
        return self._authorities.server_context(authority, host, self._clock.wall_s())

    def certificate(self, policy: Policy) -> bytes:
        """Return the certificate (PEM) that a machine of this policy has to trust; empty if none."""
        if self._authorities is None or not policy.authority or not policy.bindings:
            return b""
        return self._authorities.open(policy.authority, policy.bindings).certificate

    async def _watch(self, machine_id: str, machine: _Machine) -> None:
        """Cut what is open at the moment the epoch is lost; new calls are stopped by `may_act` all the same."""
        try:
            await self._gate.wait_lost(machine_id, machine.epoch)
            while self._gate.may_act(machine_id, machine.epoch):  # it may return early
                await self._gate.wait_lost(machine_id, machine.epoch)
        finally:
            machine.cut()
            machine.watcher = None

    def _note(self, machine_id: str, method: str, target: Target | None, allowed: bool, reason: str) -> None:
        self._add(machine_id, describe(method, target, allowed, reason, self._clock.wall_s()))

    def _add(self, machine_id: str, decision: Decision) -> None:
        journal = self._journals.get(machine_id)
        if journal is None:
            journal = self._journals[machine_id] = Journal()
            if len(self._journals) > JOURNALS_MAX:
                self._journals.popitem(last=False)
        journal.add(decision)


async def _refuse(guest: GuestSide, error: RecessError) -> None:
    await guest.send_problem(error.http_status, error.to_dict())
    await guest.linger()


async def _quietly(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end; a cut link or a guest that breaks HTTP while being answered concerns nobody else."""
    try:
        await work
    except (RecessError, h11.LocalProtocolError, OSError):
        return


async def _close(stream: ByteStream) -> None:
    await _quietly(stream.close())
