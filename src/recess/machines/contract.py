"""The driver contract: what a VMM driver does for one machine, and the plain data that crosses that line.

A driver knows how to run a VMM. It must never know of sessions, the context log, names, databases, blob stores or
compression: it hands out raw pages and takes raw pages. Everything here is asyncio; a call may be cancelled between
awaits, and after a cancelled or failed call `kill` must still succeed. Every method may raise `DriverFailed`.

Memory is an array of 4 KiB pages by guest RAM offset; a disk is an array of 4 KiB blocks by disk offset.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from recess.guestlink.link import GuestLink, WakeUp

DISK_NAME = "disk.raw"
"""The writable disk's file in a machine's directory. The caller of `boot` puts a formatted one there (ext4, exactly
`spec.disk_bytes`, sparse); `restore` writes it itself. A VM that ends by itself leaves it, as a power cut would: `boot`
takes it as it is (rung 4 of the ladder). `kill` removes this name and nothing else of it: the content lives on in a hard
link that the caller made before, and is complete in it once `kill` has returned."""

CONSOLE_NAME = "console.log"
"""The serial console's file in a machine's directory: bounded, the newest bytes last. Kept by `kill` for post-mortems."""


Hook = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Capabilities:
    """What a driver can do, as data. Asking for what is False raises `Unsupported`."""

    snapshot: bool
    fork: bool
    live_snapshot: bool  # the machine goes on after a capture
    lazy_memory: bool = False
    mapped_memory: bool = False  # memory that lies in files of this node is mapped in place (`RestoreParts.mapped`)
    dirty_tracking: bool = False  # exact changes since the last capture; else changes against the template
    network_full: bool = False
    own_kernel: bool = True
    own_disk: bool = True  # files are on a disk that boots again without the memory; else they are lost with it
    early_start: bool = False  # begins a restore while the parts are still being read (`RestoreParts.rest`)
    isolation: str = "vm"  # vm | sandbox | none


@dataclass(frozen=True)
class BootFiles:
    """Immutable, content-addressed files a machine starts from. Hashes are BLAKE3-256 hex of the file."""

    kernel: Path
    kernel_hash: str
    initrd: Path
    initrd_hash: str
    root: Path  # read-only erofs, uncompressed, page-aligned
    root_hash: str
    cmdline_extra: str = ""


@dataclass(frozen=True)
class VmSpec:
    """The size and the parts of one VM, all that a driver needs to start it."""

    memory_bytes: int
    cpus: int
    disk_bytes: int  # size of the writable disk
    boot: BootFiles
    network: str = "broker"  # broker | none | full
    driver: str = ""  # by name; "": the node's own


@dataclass(frozen=True)
class Fingerprint:
    """Everything that must match for a memory snapshot to be restorable; goes into the manifest as it is."""

    driver: str
    driver_version: str
    accelerator: str
    cpu_model: str
    cpu_flags: tuple[str, ...]
    machine_type: str
    kernel_hash: str


@dataclass(frozen=True)
class TemplateRef:
    """A template as a driver sees it: files on this node that forks start from.

    `ram` is a sparse file in shared memory, mapped privately by every fork. `disk` is a sparse file that each
    fork copies extent by extent. `vmstate` is the device state at the template's capture.
    """

    id: str
    ram: Path
    disk: Path
    vmstate: Path


@dataclass(frozen=True)
class PageSet:
    """Pages of one part: `indices` (uint32 little-endian page numbers, ascending) in `data` (4096 bytes each).

    Both are buffers (bytes, memoryview, mmap); the owner keeps them valid until `close` of the capture.
    """

    indices: memoryview
    data: memoryview

    @property
    def count(self) -> int:
        """How many pages."""
        return self.indices.nbytes // 4


@dataclass
class Capture:
    """The raw material of one snapshot, all of one instant.

    `memory` holds every page that may differ from `base` ("template": private pages against the template; "boot":
    every non-zero page of a machine without a template). `disk` likewise, against the template's disk or zeros. With a
    `parent`, `memory` holds only what may differ from that snapshot's memory, and with a `disk_parent` (then the same
    snapshot) `disk` only what may differ from its disk. `vmstate` is opaque. `standstill_s` is pause to unpause as the driver saw it (0.0 if it was left paused).
    """

    memory: PageSet
    disk: PageSet
    vmstate: bytes
    base: str
    fingerprint: Fingerprint
    standstill_s: float
    memory_pages_total: int
    disk_blocks_total: int
    timings_s: dict[str, float] = field(default_factory=dict)
    resources: list[Any] = field(default_factory=list)
    parent: str = ""  # the snapshot that memory left out is equal to
    disk_parent: str = ""  # the snapshot that blocks of the disk left out are equal to: `parent`, or none
    generation: int = 0  # the driver's own number, for `Vm.committed`
    disk_zeros: bytes = b""  # numbers (u32, little endian) of blocks in `disk` known to be zeros: nobody need read them
    memory_file: int = -1  # a descriptor, open until `close`: `memory.data` from its beginning, for good; -1: none

    def close(self) -> None:
        """Release buffers and temporary files. May be called twice."""
        while self.resources:
            self.resources.pop().close()


@dataclass(frozen=True)
class MappedMemory:
    """A machine's memory in files of this node, to be mapped in place: nothing is copied, and siblings share its pages.

    `files`: open descriptors, the owner's; their bytes never change again. `runs`: rows of four u32, little endian,
    ascending: first page, count, number of the file, first page in that file. What they leave out is the template's.
    `strays`, rows of the same form, are then copied over it: pages too scattered to be worth a mapping each.
    `owner` is what keeps the descriptors open: hold it as long as they are used.
    """

    files: tuple[int, ...]
    runs: bytes
    strays: bytes = b""
    owner: object = None


class LazyMemory(Protocol):
    """A machine's memory that comes while it runs, brought by a process of its own (a pager).

    Used once: `ranges`, then `process` and `serve`, or `read_all`; `close` at the end in any case.
    """

    async def ranges(self) -> int:
        """Return a descriptor, the caller's, with the runs of absent pages: u32 first page, u32 count, little endian.
        Raises DriverFailed, Timeout."""
        ...

    def process(self) -> int:
        """Return a pidfd of the pager, which stays this object's; known once `ranges` has returned. Raises DriverFailed."""
        ...

    async def serve(
        self,
        uffd: int,
        pipe: int,
        vmm: int,
        segments: Sequence[tuple[int, int, int]],
        first: Sequence[int] = (),
        *,
        whole: bool = False,
    ) -> None:
        """Answer the faults of this userfaultfd from now on; returns when it does. `segments`: (address in the process,
        first page, pages). The pager says a word on `pipe` when every page is there; if that closes without a word, or the
        pager ends, the machine must be ended. `vmm`: a pidfd of the process whose memory it is; the pager ends with that.
        `first`: pages to bring before they are asked for. `whole`: all of the memory is absent, not only the ranges, and
        nothing is protected against writing. The descriptors stay the caller's. Raises DriverFailed, Timeout."""
        ...

    async def read_all(self) -> PageSet:
        """Return all pages, for a host that cannot serve faults. Raises as a store's read does."""
        ...

    def about(self) -> Mapping[str, Any]:
        """Say how far it is, for people."""
        ...

    async def close(self) -> None:
        """Let go of the pager; one that serves goes on. May be called twice."""
        ...


@dataclass(frozen=True)
class RestoreParts:
    """What a driver needs to bring a machine back over its template (or over zeros when `template` is None).

    `snapshot` names the stored snapshot that this is, if it is one: what is captured next may count from it.
    With `rest`, memory, disk and device state are still being read: they are in what it returns (or raises, say
    Corrupt). Only a driver whose capabilities say `early_start` is given such parts.
    """

    template: TemplateRef | None
    memory: PageSet
    disk: PageSet
    vmstate: bytes
    snapshot: str = ""
    rest: asyncio.Future[RestoreParts] | None = None
    read_s: float = 0.0  # how long reading them took
    lazy: LazyMemory | None = None  # instead of `memory`, which is empty then
    mapped: MappedMemory | None = None  # the same pages as `memory`, or instead of it if that is empty
    choice: str = ""  # how the memory comes and why, in words
    wake: WakeUp | None = None  # may be sent with the hello, just before the vCPUs run; a driver may ignore it

    async def whole(self) -> RestoreParts:
        """Return the parts with everything in them; may be called again."""
        return self if self.rest is None else await asyncio.shield(self.rest)


@dataclass(frozen=True)
class VmStats:
    """Numbers of one running VM. `pss_bytes` counts all its processes, keeper included."""

    pss_bytes: int
    cpu_s: float
    private_bytes: int


@dataclass(frozen=True)
class KeptReady:
    """What a driver keeps started for restores to come: how many VMs, the memory they hold, at most how many; how many
    restores found one, and how many could have used one and found none. None of it is anybody's machine."""

    waiting: int = 0
    memory_bytes: int = 0
    limit: int = 0
    taken: int = 0
    missed: int = 0


class Vm(Protocol):
    """One VM, from start to `kill`. Its id is the machine id."""

    id: str

    @property
    def link(self) -> GuestLink:
        """The guest channel. Connected when `boot` or `restore` returns (but not yet thawed)."""
        ...

    async def pause(self) -> None:
        """Stop the vCPUs, keep the memory. A paused VM may be paused again."""
        ...

    async def unpause(self) -> None:
        """Let the vCPUs run. A running VM may be unpaused again."""
        ...

    async def capture(
        self,
        *,
        resume: bool,
        before_pause: Hook | None = None,
        after_resume: Hook | None = None,
        parent: str = "",
        disk_too: bool = False,
    ) -> Capture:
        """Take memory, disk and device state of one instant; compression is not the driver's business.

        The VM may be running or paused. `resume=True` lets it run again as early as possible (the disk is finished
        by copy-before-write); False leaves it paused. On any error the VM runs again if it ran before, and nothing
        half-made is left. Raises OutOfSpace, DriverFailed, Unsupported.

        `before_pause` is awaited when all that can be prepared is, right before the vCPUs stop (the caller freezes
        the workload there); `after_resume` as soon as they run again with `resume`, while the disk is still being
        finished (the caller lets the workload go there). Both may use the link; what they raise is raised here.

        `parent` is a snapshot that the caller can build on. A driver with `dirty_tracking` then leaves out the memory
        that was not written since, if it is the one that `committed` named last or that the VM was restored from
        (`RestoreParts.snapshot`); the result's `parent` says whether it did. With `disk_too` it may likewise leave out
        the disk's blocks that were not written since; the result's `disk_parent` says whether it did. (Whoever starts
        machines from the capture itself needs the disk whole.)
        """
        ...

    async def committed(self, capture: Capture | None, snapshot: str) -> None:
        """Tell that a capture (None: what the VM was started from) is stored durably as this snapshot, so that later
        ones may count from it. A capture that is never committed loses nothing: its pages are in the next one. A
        word that comes too late, after another capture, is ignored. No-op without `dirty_tracking`."""
        ...

    def about_memory(self) -> Mapping[str, str]:
        """Say in words how the VM's memory is handled on this host: what `recess inspect` shows."""
        ...

    async def export_template(self, directory: Path) -> TemplateRef:
        """End this VM and leave its memory, disk and device state in `directory` as a template's files.

        Only for a VM booted with `boot(..., for_template=True)`; IllegalState otherwise. `directory` is made if
        absent and should be in shared memory (forks map the RAM file). The returned ref carries this VM's id; the
        caller puts the template's own there (`dataclasses.replace`). Nothing of the VM itself is left.
        """
        ...

    async def kill(self) -> None:
        """End the VM and everything that belongs to it: processes, sockets, the writable disk. Never fails; may be
        called twice. The console's file stays (it is small); the caller removes the directory when it forgets it."""
        ...

    async def detach(self) -> None:
        """Drop every connection to the VM and let it go on, for the next server to adopt. The object is of no more
        use. May be called twice."""
        ...

    async def stalled(self) -> str:
        """Return why the VM stands still although nobody paused it, in one line, "" if it does not: the host's disk has
        no room for a write of the guest. The guest sees no error: the write is pending. Raises DriverFailed, Timeout."""
        ...

    async def wait_stalled(self) -> str:
        """Return when the VM stands still like that, at once if it does. Raises DriverFailed when it is gone."""
        ...

    async def go_on(self) -> None:
        """Try the pending write of a stalled VM again; it runs on, or stalls again. No-op if it is not stalled."""
        ...

    async def wait_dead(self) -> str:
        """Return when the VM's process is gone, with the reason in one line."""
        ...

    async def set_deadline(self, seconds: float | None) -> None:
        """The keeper kills the VM this many seconds from now by its own monotonic clock, unless it is set again."""
        ...

    def console_tail(self, limit: int = 65536) -> bytes:
        """Return the last bytes of the serial console."""
        ...

    async def stats(self) -> VmStats:
        """Return current numbers."""
        ...


class Driver(Protocol):
    """A way to run VMs. `name` is what `--driver` takes; `capabilities` is data, asked before use."""

    name: str
    capabilities: Capabilities

    async def probe(self, *, fresh: bool = False) -> Mapping[str, Any]:
        """Check that the tools are there and say versions and accelerator; `fresh` looks anew at everything that is
        kept from an earlier look, and runs what there is to run. Raises MissingTool with a hint, DriverFailed."""
        ...

    async def fingerprint(self, spec: VmSpec) -> Fingerprint:
        """Return what a snapshot taken of this spec here would carry. Raises Unsupported for what this host lacks."""
        ...

    async def boot(self, vm_id: str, spec: VmSpec, directory: Path, *, for_template: bool = False) -> Vm:
        """Cold-boot; returns when guestd has said hello. `directory` is the machine's own (disk, console).

        The caller has put a formatted writable disk there under `DISK_NAME` (raises InvalidSpec without one, or with
        one of another size); the disk a machine left behind may be booted again. On any error nothing of the VM is
        left except that disk and the console.
        """
        ...

    async def restore(self, vm_id: str, spec: VmSpec, parts: RestoreParts, directory: Path) -> Vm:
        """Bring a VM back, vCPUs running, workload still frozen by guestd; the caller does the thaw over the link.

        `directory` is made if absent. `parts` is not needed any more when this returns. On any error (a VMM that
        dies half-way, a full disk) nothing of the VM is left, its disk included.

        A fork of a template is a restore with empty page sets and the template's vmstate.
        """
        ...

    async def adopt(self, vm_id: str, directory: Path) -> Vm | None:
        """Take over a VM that an earlier server started; None if it is gone (its leftovers are then removed).

        A VM whose start or restore was not complete when that server died counts as gone: it is killed. One caught
        in the middle of a capture runs (or stays paused) as it did before the capture. A VM that was paused on
        purpose is still paused: `unpause` it. `link` is connected when this returns, of a paused VM when `unpause`
        does. Raises MissingTool where the driver's program is not there any more: the VM has been ended, for nobody could
        do anything with it.
        """
        ...

    def list_leftovers(self) -> Sequence[str]:
        """Return the ids of VMs of this run directory that some server started under this driver and nobody has killed
        yet. Drivers of one node share the directory: another driver's VM is not listed."""
        ...

    async def kept_ready(self) -> KeptReady:
        """Say what is kept started for restores to come; nothing, for most drivers."""
        ...

    async def close(self) -> None:
        """Let go of everything that is nobody's machine: what is kept ready. VMs go on. May be called twice; what is
        restored afterwards is restored all the same."""
        ...
