"""One VM that waits to be used, and how it becomes a machine's.

What a QEMU is given at its start and can never change (its memory's file, root, sizes, devices, its own binary) is its
`Kind`; only a restore of exactly that kind may take it. What makes it somebody's it gets when it is taken: id, run folder,
journal, the name of its disk, console, the record of its end.

The disk. QEMU opens it at the start, so it is made before: a nameless file on the file system of the machines' disks, with
the template's content. It gets its name, the machine's, by a hard link when it is taken; until then nothing of it can
be left on that file system, whatever dies. QEMU knows it as `disk` in the run folder, a symbolic link, which is turned to
the new name: should QEMU ever open it again, it is the same file.

Why no crash leaves a VM that nobody owns, or two machines one VM:

1. Waiting, the VM hangs on a pipe that only its server holds (the keeper's tether). The server dies, by whatever
   signal: the keeper ends the VM and removes the folder. The keeper dies: the kernel ends the VM, and `sweep` of a later
   server removes the folder.
2. A restore claims its machine's run folder by making it, as every start does. The journal (phase "starting") is
   written into the waiting VM's folder, and that folder is renamed over the claimed one, which is empty: one step, before
   which the VM is nobody's and after which it is this machine's, in a phase that `adopt` ends.
3. The tether is untied when the journal says "running". A server that dies between the two takes the VM along, which
   the next one finds gone: a machine whose restore nobody was told of.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from recess.drivers.kept import disk
from recess.drivers.kept.cgroup import Limits
from recess.drivers.kept.keeper import Process, read_pids
from recess.drivers.kept.layout import Layout
from recess.drivers.kept.stats import process_stats
from recess.drivers.kept.steps import all_of, in_thread
from recess.drivers.qemu.argv import Qemu, command
from recess.drivers.qemu.begun import Begun
from recess.drivers.qemu.blocks import track_disk
from recess.drivers.qemu.host import HostFacts
from recess.drivers.qemu.journal import Journal, write_journal
from recess.errors import DriverFailed
from recess.images.files import space_errors
from recess.machines.contract import TemplateRef, VmSpec

FOLDER = "warm"
_DISK_LINK = "disk"
_WAITS = "inmigrate"  # QEMU's run state before its device state comes (qapi/run-state.json)

FileId = tuple[str, int, int, int, int]
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Kind:
    """What is fixed when a QEMU starts. `files`: the very files, so that one that was replaced is another."""

    template: str
    spec: VmSpec
    qemu: Qemu
    files: tuple[FileId, ...]
    device: int  # the file system of the machines' disks


@dataclass(frozen=True)
class Order:
    """What it takes to start one. `disks`: a folder on the file system of the machines' disks."""

    kind: Kind
    template: TemplateRef
    host: HostFacts
    keeper_binary: Path
    hello_timeout_s: float
    run_dir: Path
    disks: Path
    limits: Limits | None

    def is_current(self) -> bool:
        """Tell whether the files are still those that the kind names."""
        try:
            return self.kind.files == _identities(self.template, self.kind.spec, self.host.qemu, self.keeper_binary)
        except OSError:
            return False


def order_for(
    layout: Layout,
    spec: VmSpec,
    template: TemplateRef,
    host: HostFacts,
    keeper_binary: Path,
    hello_timeout_s: float,
    limits: Limits | None = None,
) -> Order | None:
    """Return the order that a restore of this machine could be served by; None if a file is missing: then no VM can wait
    for it (the restore itself will say what is wrong)."""
    spec = replace(spec, network="none")  # networks differ only above the VM
    disks = layout.directory.parent
    try:
        device = disks.stat().st_dev
        files = _identities(template, spec, host.qemu, keeper_binary)
    except OSError:
        return None
    kind = Kind(template.id, spec, host.qemu, files, device)
    return Order(kind, template, host, keeper_binary, hello_timeout_s, layout.run.parent.parent, disks, limits)


def _identities(template: TemplateRef, spec: VmSpec, qemu: Qemu, keeper_binary: Path) -> tuple[FileId, ...]:
    paths = (template.ram, template.disk, spec.boot.root, qemu.binary, keeper_binary)
    about = ((path, path.stat()) for path in paths)
    return tuple((str(path), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for path, s in about)


class Member:
    """A VM that waits. `bytes`: the memory it holds meanwhile, keeper included."""

    def __init__(self, order: Order, begun: Begun, disk_fd: int, tether: int) -> None:
        self.order = order
        self.begun = begun
        self.bytes = 0
        self.disk_fd = disk_fd
        self._tether = tether

    def alive(self) -> bool:
        """Tell whether nothing has ended it, as far as is known."""
        _, keeper, qmp = self.begun.whole()
        return not (keeper.death.done() or keeper.gone.done() or qmp.lost.done())

    def on_death(self, told: Callable[[object], None]) -> None:
        """Have a function called when it ends, whyever."""
        self.begun.whole()[1].death.add_done_callback(told)

    def not_on_death(self, told: Callable[[object], None]) -> None:
        """Have it called no more: somebody else looks after this VM now."""
        self.begun.whole()[1].death.remove_done_callback(told)

    async def become(self, layout: Layout, journal: Journal) -> None:
        """Become this machine's: its run folder (there, and empty) is now the VM's, its disk has its name.

        Raises RecessError, OSError: the VM is then to be ended, whosever it is by now.
        """
        _, keeper, qmp = self.begun.whole()
        layout.directory.mkdir(parents=True, exist_ok=True)
        _, status = await all_of(keeper.move(layout), qmp.execute("query-status"))
        if status["status"] != _WAITS:
            raise DriverFailed(f"a VM that waited is in the state {status['status']}")
        await in_thread(self._rename, layout, journal)
        self.begun.layout = layout

    def _rename(self, layout: Layout, journal: Journal) -> None:
        waits = self.begun.layout
        layout.remove_disks()
        _name_file(self.disk_fd, layout.disk)
        aside = waits.run / f"{_DISK_LINK}.new"
        aside.symlink_to(layout.disk)
        aside.replace(waits.run / _DISK_LINK)
        waits.console.unlink(missing_ok=True)
        write_journal(waits, journal)
        waits.run.rename(layout.run)

    def take_disk(self) -> int:
        """Return the disk, open; the caller closes it."""
        fd, self.disk_fd = self.disk_fd, -1
        return fd

    def untie(self) -> None:
        """From now on it lives on without this server."""
        with contextlib.suppress(OSError):  # it has died: whoever uses it is told
            os.write(self._tether, b"taken")
        self._close(self._tether)
        self._tether = -1

    async def end(self) -> None:
        """End it, and remove all of it. Never fails; may be called twice."""
        await self.begun.undo(keep_disk=True)
        self.let_go()

    def let_go(self) -> None:
        """Close what this server holds of it; a VM that is still tied ends by that. May be called twice."""
        for fd in (self.disk_fd, self._tether):
            self._close(fd)
        self.disk_fd = self._tether = -1

    @staticmethod
    def _close(fd: int) -> None:
        if fd >= 0:
            os.close(fd)


async def start_member(order: Order) -> Member:
    """Start a VM that waits. On any error, cancellation too, nothing of it is left. Raises RecessError, OSError."""
    me = os.getpid()
    name = f"{me}-{Process.of(me).start}-{next(_numbers)}"
    folder = order.run_dir / FOLDER / name
    begun = Begun(Layout(folder, folder))
    watched, tether = os.pipe()
    disk_fd = -1
    try:
        folder.mkdir(parents=True, mode=0o700)
        disk_fd = os.open(order.disks, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        await in_thread(_prepare, order, folder, disk_fd)
        begun.listen(order.hello_timeout_s)
        kind = order.kind
        argv = command(
            kind.qemu, kind.spec, begun.layout, ram=order.template.ram, share=False, boot=None, disk=Path(_DISK_LINK)
        )
        await begun.start(order.keeper_binary, order.template.ram, argv, limits=order.limits, tether=watched)
        member = Member(order, begun, disk_fd, tether)
        await track_disk(begun.whole()[2])
        member.bytes = (await in_thread(process_stats, list(read_pids(begun.layout).values()))).pss_bytes
        return member
    except BaseException:
        await asyncio.shield(begun.undo(keep_disk=True))
        for fd in (tether, disk_fd):  # only now: QEMU opens the disk by this descriptor's number
            if fd >= 0:
                os.close(fd)
        raise
    finally:
        os.close(watched)


def _prepare(order: Order, folder: Path, disk_fd: int) -> None:
    """Fill the disk, and give it a name that QEMU can open."""
    with space_errors(str(order.disks)):
        os.truncate(disk_fd, order.kind.spec.disk_bytes)
        disk.copy_data(order.template.disk, disk_fd)
        (folder / _DISK_LINK).symlink_to(f"/proc/{os.getpid()}/fd/{disk_fd}")


def _name_file(fd: int, path: Path) -> None:
    """Give an open file without a name one (open(2), O_TMPFILE)."""
    folder = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # With a folder given `os.link` follows the symbolic link, to the file itself.
        os.link(str(fd), path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def sweep(run_dir: Path) -> None:
    """Remove the folders of VMs that waited for a server that is gone, and whose keepers could not remove them."""
    folders = list((run_dir / FOLDER).iterdir()) if (run_dir / FOLDER).is_dir() else []
    for folder in folders:
        with contextlib.suppress(ValueError):
            pid, start, _ = (int(word) for word in folder.name.split("-"))
            owners = [Process(pid, start), *read_pids(Layout(folder, folder)).values()]
            if not any(owner.alive() for owner in owners):
                shutil.rmtree(folder, ignore_errors=True)
