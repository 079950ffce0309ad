"""Machines as users and sessions see them: named, with a state, made from images, put away and brought back.

This module holds the interface and the plain records; `recess.machines.manager` implements it over a driver, the
snapshot store, the images and the catalog. It must never know of the context log: a log position is a number here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from recess.guestlink.link import GuestLink, IncomingHandler


@dataclass(frozen=True)
class Mount:
    """A volume of a machine: a folder (or file) of this host, by its absolute path, or a named one, that the machine has a
    copy of at `target`. `held`: it came along from the machine this one was made of, and moves only when somebody asks."""

    source: str
    target: str
    readonly: bool = False
    size_bytes: int = 1 << 30  # of what is in it, at most
    held: bool = False


Port = tuple[str, int, int | str]
"""A published port: host address, host port, guest port. A path for the address (host port 0) is a Unix socket of the host, a
path for the guest port one in the machine."""


@dataclass(frozen=True)
class MachineSpec:
    """What a user asks for. Sizes in bytes. `argv` is the main process (empty: none, the machine just runs)."""

    image: str = "base"
    memory_bytes: int = 512 << 20
    cpus: int = 1
    disk_bytes: int = 4 << 30
    argv: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/root"
    user: str = "root"
    tty: bool = False
    stdin: bool = False  # keep the main process's stdin open for an attached client
    remove_on_exit: bool = False  # docker's --rm: forget the machine when its main process has ended
    network: str = "broker"
    allow: tuple[str, ...] = ()  # broker policy: host, *.domain, cidr, host:port
    routes: Mapping[str, str] = field(default_factory=dict)  # route name -> upstream base URL (secret joined by name)
    secrets: tuple[str, ...] = ()  # "NAME@host[:port],…": the guest holds a placeholder, the broker the value
    authority: str = ""  # in whose name the broker speaks TLS to the guest for them; forks and restores keep it
    ports: tuple[Port, ...] = ()
    sockets: tuple[tuple[str, str], ...] = ()  # (a Unix socket of the host, where the machine finds it)
    labels: Mapping[str, str] = field(default_factory=dict)
    restart: str = ""  # of the main process: no | on-failure[:TIMES] | always | unless-stopped
    driver: str = ""  # "": the node's own choice
    volumes: tuple[Mount, ...] = ()
    idle_s: float = 0.0  # unused for so long it is suspended, and wakes when it is used; 0: never


@dataclass(frozen=True)
class Changes:
    """What is different in a machine made from a snapshot. `env` and `labels` are added, `ports` replace (None: the
    snapshot's guest ports, on free host ports)."""

    env: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[Port, ...] | None = None


@dataclass(frozen=True)
class MachineRow:
    """A machine. `state`: creating | running | paused | suspended | exited | dead (see machines.states), or stalled: it
    runs, but stands still until the host's disk has room; or damaged: its row cannot be read, and everything else may be
    empty. Of both `status` says why and `meta["hint"]` what to do."""

    id: str
    name: str
    state: str
    spec: MachineSpec
    driver: str
    template: str
    snapshot: str  # newest own snapshot, "" if none
    session: str
    created: float
    exit_code: int | None
    status: str  # one line for people: why it is dead, how it resumed
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SnapshotRow:
    """A stored snapshot with its figures; `id` is the manifest's hash with prefix `snp_`."""

    id: str
    name: str
    machine: str
    session: str
    log_position: int
    epoch: int
    why: str
    created: float
    template: str
    parent: str
    figures: Mapping[str, Any]  # standstill_s (host), freezer_s, durable_s, new_bytes, pages_*, timings_s


@dataclass(frozen=True)
class ResumeReport:
    """How a machine came back: the rung of the ladder, why this one, and what it took (seconds, bytes)."""

    rung: int  # 1 warm, 2 local snapshot, 3 remote snapshot, 4 disk only, 5 fresh
    why: str
    seconds: float
    snapshot: str = ""
    log_position: int = 0
    bytes_read: int = 0
    power_cut: bool = False  # the disk is what a VM left that ended without warning: what nobody had synced is missing
    timings_s: Mapping[str, float] = field(default_factory=dict)


class Machines(Protocol):
    """The service. Refs are ids, names or unambiguous id prefixes. Raises NotFound, NameInUse, IllegalState, ..."""

    async def create(self, spec: MachineSpec, *, name: str = "", session: str = "", epoch: int = 0) -> MachineRow:
        """Fork the image's template (made and announced on first use); returns a thawed, running machine."""
        ...

    async def get(self, ref: str) -> MachineRow:
        """Return one."""
        ...

    async def list_machines(self, *, everything: bool = False) -> list[MachineRow]:
        """Return those that run (or all), newest first."""
        ...

    async def link(self, machine_id: str) -> GuestLink:
        """Return the connected guest link of a running machine; IllegalState otherwise."""
        ...

    async def pause(self, ref: str) -> None:
        """Freeze the workload, then stop the vCPUs (a session's parked state)."""
        ...

    async def unpause(self, ref: str) -> None:
        """Let a paused machine run again."""
        ...

    async def snapshot(
        self,
        ref: str,
        *,
        name: str = "",
        why: str = "manual",
        log_position: int = 0,
        epoch: int = 0,
        resume: bool = True,
        idle_s: float | None = None,
    ) -> SnapshotRow:
        """Take and store a snapshot. `resume=False` leaves the machine paused (then `evict` or `unpause`). `idle_s`: how
        long it has not been used, if the caller knows better than whoever hands out its link."""
        ...  # fmt: skip

    async def evict(self, ref: str, *, snapshot: str) -> None:
        """End the VM of a paused machine whose snapshot is stored: state suspended, memory given back."""
        ...

    async def discard_snapshot(self, ref: str, snapshot: str) -> None:
        """Take back a snapshot of this machine that came to nothing, row and bytes, at once. One that is gone, or that
        something needs by now, is left alone."""
        ...

    async def stored_snapshots(self, ids: Collection[str]) -> set[str]:
        """Return those of `ids` that are still stored."""
        ...

    async def suspend(self, ref: str, *, why: str = "suspend") -> SnapshotRow:
        """Snapshot and evict: put away under its identity."""
        ...

    async def resume(self, ref: str, *, epoch: int = 0) -> ResumeReport:
        """Bring back a paused (rung 1) or suspended machine (rung 2), same id and name. One rung, no other."""
        ...

    async def bring_back(
        self,
        ref: str,
        *,
        snapshots: Sequence[str] = (),
        rungs: Collection[int] = (1, 2, 3, 4),
        own_disk: bool = True,
        epoch: int = 0,
    ) -> ResumeReport:
        """Bring a machine that does not run back under its identity by the best of the allowed rungs that works.

        Rung 1: it is paused. Rungs 2 and 3: a snapshot, memory and disk of one instant. Rung 4: its disk boots cold:
        files are kept, memory and processes are gone, the main process is started anew. The report's `why` says what
        failed on the way down, rung by rung; `snapshot` and `log_position` are of what it came back from ("" and 0
        for its own disk, which is newer than every snapshot).

        `snapshots` are tried in this order, each whole first (rung 2), later for its disk alone (rung 4); without
        any, its newest own. A machine's *own* disk is what its last VM left: there after a crash, `kill`, `stop`, an
        exit; not after `suspend` and `evict`, whose snapshot holds the same. Use `own_disk=False` when the
        machine shall go back to an older state (a rewind): then only the disks of `snapshots` count.

        A step that can never work here (Corrupt, NotFound, Incompatible, Unsupported) leads to the next. Any other
        error is raised at once, the machine as it was: it may work later (Unavailable, DriverFailed, Timeout,
        OutOfSpace); who does not want to wait calls again with `rungs=(4,)`. Raises IllegalState when it runs, or
        when nothing is left of it that the rungs allow; when every step failed, the first one's error, with
        `details["reasons"]` for all of them.
        """
        ...

    async def reboot(self, ref: str, *, image: str = "", memory_bytes: int = 0, epoch: int = 0) -> ResumeReport:
        """End a running machine's VM and boot its own disk again (rung 4) with another image, more memory, or both ("" and 0:
        as before). What cannot be is refused before anything is touched: NotFound (no such image), InvalidSpec, Unsupported
        (its driver keeps files in memory), IllegalState. After any other error it has exited, as what it was to be."""
        ...

    async def restore(
        self,
        snapshot: str,
        *,
        name: str = "",
        session: str = "",
        epoch: int = 0,
        machine_id: str = "",
        disk_only: bool = False,
    ) -> tuple[MachineRow, ResumeReport]:
        """Make a new machine from a snapshot (id, name or prefix). Raises Incompatible with reasons. With
        `machine_id`, bring that dead or suspended machine back from this snapshot under its own identity. With
        `disk_only` its disk boots cold (rung 4), whatever its memory and device state are like."""
        ...

    async def fork(self, ref: str, count: int = 1, *, names: Sequence[str] = (), session: str = "") -> list[MachineRow]:
        """Snapshot a running machine once and restore it `count` times; the parent goes on. New identity each."""
        ...

    async def stop(self, ref: str, *, timeout_s: float = 10.0) -> None:
        """SIGTERM the main process, wait, sync the disk, then end the VM (state exited). The disk is kept."""
        ...

    async def kill(self, ref: str, *, why: str) -> None:
        """End the VM at once; state dead, with `why`. Its disk is kept as after a power cut. May be called again."""
        ...

    async def remove(self, ref: str, *, force: bool = False) -> str:
        """Forget a machine that does not run (or kill it first): its disk and row; snapshots stay. Returns where files
        of it were left, "" for nowhere (only those of a damaged row are)."""
        ...

    async def set_deadline(self, machine_id: str, seconds: float | None) -> None:
        """The keeper kills the VM unless this is called again in time."""
        ...

    async def wait_dead(self, machine_id: str) -> str:
        """Return the reason when the VM is gone."""
        ...

    def set_incoming(self, machine_id: str, service: str, handler: IncomingHandler | None) -> None:
        """Route streams the guest opens for this service ("session", "proxy") to a handler; survives link renewals."""
        ...
