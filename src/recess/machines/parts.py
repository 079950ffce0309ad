"""What the machines room is given from outside, as narrow interfaces, and the small value types its files share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from recess.broker import Policy
from recess.catalog import Catalog
from recess.catalog.snapshots import SnapshotRecord
from recess.clock import Clock
from recess.errors import Unsupported
from recess.guestlink.link import IncomingHandler
from recess.machines.athand import AtHand
from recess.machines.contract import BootFiles, Driver, LazyMemory, PageSet
from recess.machines.events import Events
from recess.machines.retention import Keeping
from recess.snapshots.contract import PageSource, SnapshotStore
from recess.volumes import NamedVolumes

Progress = Callable[[str], None]
ReadAll = Callable[[], Awaitable[PageSet]]
FindElsewhere = Callable[[str], Awaitable[SnapshotRecord]]  # ref -> its row, made on the way; raises NotFound

UNDO = (Exception, asyncio.CancelledError)
"""What clean-up is done for: every failure and Ctrl-C, but not `crashpoints.Crashed`, which plays the death of this very
process, after which nobody cleans up but the next server."""

NO_PAGES = PageSet(memoryview(b""), memoryview(b""))


class ImageFiles(Protocol):
    """The files that machines boot from. Calls may block for long (a kernel fetched, an index built) but not the loop."""

    async def boot_files(self, image: str) -> BootFiles:
        """Return the files for a new machine of this image. Raises NotFound, MissingTool, Unavailable, Corrupt."""
        ...

    async def boot_files_by_hash(self, root_hash: str, kernel_hash: str, initrd_hash: str) -> BootFiles:
        """Return exactly these files again, for a template that is rebuilt. Raises NotFound naming what is missing."""
        ...

    async def sources(self, boot: BootFiles) -> list[PageSource]:
        """Return the page sources of these files (root first, then kernel); the same list every time."""
        ...

    async def blank_disk(self, size_bytes: int, target: Path) -> None:
        """Put a formatted, empty writable disk at `target`."""
        ...


class MakePager(Protocol):
    """Starts a pager for a part of a stored snapshot."""

    def __call__(
        self, snapshot: str, part: str, template: Path, files: Mapping[str, Path], read_all: ReadAll, /
    ) -> Awaitable[LazyMemory]:
        """Return one that is opening it. `template`: the part's file that gaps mean; `files`: image files by hash;
        `read_all`: for a host that cannot serve faults. Raises Unavailable, Timeout."""
        ...


class Egress(Protocol):
    """The broker, as this room uses it: who may go out, under which epoch."""

    def register(self, machine_id: str, epoch: int, policy: Policy) -> None:
        """Let a machine out under this policy."""
        ...

    def unregister(self, machine_id: str) -> None:
        """Cut what it has open; refuse what comes."""
        ...

    def handler(self, machine_id: str) -> IncomingHandler:
        """Return the handler of its "proxy" and "socket" streams."""
        ...

    def open_connections(self, machine_id: str) -> int:
        """Return how many calls the machine has open."""
        ...

    def certificate(self, policy: Policy) -> bytes:
        """Return the certificate (PEM) that the machine has to trust; empty if none."""
        ...


@dataclass(frozen=True)
class Parts:
    """Everything injected into the room. `run_dir` is shared memory (template caches); `machines_dir` is on disk."""

    driver: Driver
    store: SnapshotStore
    images: ImageFiles
    catalog: Catalog
    clock: Clock
    machines_dir: Path
    run_dir: Path
    egress: Egress | None = None
    progress: Progress = lambda _line: None
    keeping: Keeping = field(default_factory=Keeping)
    free_bytes: Callable[[], int] | None = None  # of the disk that snapshots are stored on
    make_pager: MakePager | None = None  # None: this node has none, and every page is read before a machine runs
    driver_why: str = ""  # why `driver` is the node's own
    others: Mapping[str, Driver] = field(default_factory=dict)  # by name, for machines that ask for them
    lazy_memory: str = "auto"  # auto | remap | lazy | inject (recess.paging.choice)
    first_pages: Callable[[str], Sequence[int]] | None = None  # of a snapshot's memory, as seen on this node; may block
    at_hand: AtHand | None = None  # memories kept uncompressed; None: none are
    drop_caches: float | None = None  # of a guest that is put away after that many idle seconds; None: of none
    find_elsewhere: FindElsewhere | None = None  # a snapshot that another home put into a shared store
    events: Events = field(default_factory=Events)
    volumes: NamedVolumes | None = None  # None: machines have volumes by path only

    def tell(self, action: str, machine_id: str, name: str, **details: Any) -> None:
        """Tell who watches what has happened to a machine, once its row says so."""
        self.events.publish(self.clock.wall_s(), action, machine_id, name, details)

    def driver_of(self, name: str) -> Driver:
        """Return the driver of this name, "" for the node's own. Raises Unsupported, naming those there are."""
        if name in ("", self.driver.name):
            return self.driver
        if name not in self.others:
            known = ", ".join(sorted({self.driver.name, *self.others}))
            raise Unsupported(f"this node has no driver {name!r}", hint=f"it has: {known}")
        return self.others[name]

    def why_driver(self, asked: str) -> str:
        """Say why a machine that asks for this driver ("": for none) runs under the one it gets."""
        return f"the node's own; {self.driver_why}" if not asked else "it was asked for"

    def leftovers(self) -> dict[str, Driver]:
        """Return the VMs that some server started and nobody has killed yet, with their drivers."""
        return {vm_id: one for one in (self.driver, *self.others.values()) for vm_id in one.list_leftovers()}

    def directory(self, machine_id: str) -> Path:
        """Return the machine's own folder: disk, console, log of its main process."""
        return self.machines_dir / machine_id
