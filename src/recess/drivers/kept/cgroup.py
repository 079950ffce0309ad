"""The control group of a VMM: what it may take of the host, whatever runs in it. Of cgroup 2 (Documentation/admin-guide/cgroup-v2).

    TOP                            the topmost group over the server's own that this user may write: the root's for root, what
                                   systemd hands over (user@UID.service) for an ordinary user
    TOP/recess/SERVER-START-N      one VMM's: memory.max, pids.max, cpu.max

The server makes the group and writes its limits; the keeper puts the VMM in before it is executed, so nothing of it ever runs
outside, and removes the group when the VMM is gone. What stays behind when a keeper is killed is empty, and has the name of
the server that made it (pid and start time): `sweep` of a later server removes it. A group is removed by `rmdir`, which the
kernel refuses as long as a process is in it, so no mistake here can take a running VM's limits away.

Where there is no group to be had VMs run without, and `recess doctor` says why. This module knows nothing of QEMU.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from recess.drivers.kept.keeper import Process
from recess.machines.contract import VmSpec
from recess.units import MIB

MOUNT = Path("/sys/fs/cgroup")
FOLDER = "recess"

_CONTROLLERS = ("cpu", "memory", "pids")
_SPARE_BYTES = 256 * MIB  # the VMM itself, its buffers, and the host's page cache for its disk
_TABLES = 64  # a page table of 4 KiB holds 2 MiB; with the kernel's other books never more than one part in 64
_PROCESSES = 128  # threads: one a processor, and QEMU's workers (64 at most)
_PERIOD_US = 100_000
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Limits:
    """What a VMM may take: bytes of memory, processes and threads, processors."""

    memory_bytes: int
    processes: int
    cpus: int

    @classmethod
    def of(cls, spec: VmSpec, extra_bytes: int, processes: int = _PROCESSES) -> Limits:
        """Return the limits of a VMM for this machine; `extra_bytes` is what it holds for itself. They hold a VMM that went
        wrong; one that works meets none: it has a processor more than its guest, for its devices."""
        memory = spec.memory_bytes + spec.memory_bytes // _TABLES + extra_bytes + _SPARE_BYTES
        return cls(memory, processes, spec.cpus + 1)

    def files(self, controllers: Collection[str]) -> Mapping[str, str]:
        """Return what is written into which file of a group that has these controllers."""
        wanted = {
            # One of its threads killed is no VM any more: all of it or none.
            "memory": {"memory.max": str(self.memory_bytes), "memory.oom.group": "1"},
            "pids": {"pids.max": str(self.processes)},
            "cpu": {"cpu.max": f"{self.cpus * _PERIOD_US} {_PERIOD_US}"},
        }
        return {name: value for one in _CONTROLLERS if one in controllers for name, value in wanted[one].items()}


def own_group(text: str) -> PurePosixPath | None:
    """Return this process's group, from /proc/self/cgroup; None for one that has none of cgroup 2 or is outside of what is
    mounted here."""
    for line in text.splitlines():
        if line.startswith("0::/"):
            path = PurePosixPath(line.removeprefix("0::"))
            return None if ".." in path.parts else path
    return None


class Groups:
    """Where groups of VMMs are made. `top` is None where there is no such place, and `why` says why not."""

    def __init__(self, top: Path | None, controllers: tuple[str, ...], why: str) -> None:
        self.top = top
        self.controllers = controllers
        self.why = why

    @classmethod
    def find(cls, mount: Path = MOUNT, own: Path = Path("/proc/self/cgroup")) -> Groups:
        """Find the place, and make it ready: its controllers are switched on for what is below. Never fails."""
        if not (mount / "cgroup.controllers").is_file():
            return cls(None, (), f"there is no cgroup 2 at {mount}")
        try:
            group = own_group(own.read_text())
        except OSError:
            group = None
        if group is None:
            return cls(None, (), "this process is in no control group that can be seen")
        path = mount / group.relative_to("/")
        tops = [top for top in (*reversed(path.parents), path) if top.is_relative_to(mount) and _may_write(top)]
        for top in tops:
            if _may_hand_on(top):
                return cls._ready(top)
        if tops:
            return cls(
                None, (), f"the control group {tops[-1]} has processes of its own, so it can limit none below it"
            )
        return cls(None, (), "this user may make no control groups")

    @classmethod
    def _ready(cls, top: Path) -> Groups:
        folder = top / FOLDER
        try:
            folder.mkdir(exist_ok=True)
            for group in (top, folder):
                _switch_on(group)
            found = set((folder / "cgroup.subtree_control").read_text().split())
        except OSError as exc:
            return cls(None, (), f"control groups below {top}: {exc.strerror}")
        controllers = tuple(name for name in _CONTROLLERS if name in found)
        if not controllers:
            return cls(None, (), f"the control group {top} hands no controller on")
        return cls(folder, controllers, "")

    def make(self, limits: Limits) -> Path | None:
        """Make a group with these limits; None where groups cannot be had. Raises OSError when this one cannot be."""
        if self.top is None:
            return None
        me = os.getpid()
        path = self.top / f"{me}-{Process.of(me).start}-{next(_numbers)}"
        path.mkdir()
        try:
            for name, value in limits.files(self.controllers).items():
                (path / name).write_text(value)
        except BaseException:
            remove(path)
            raise
        return path

    def sweep(self) -> None:
        """Remove the groups that servers which are gone have left; those with a VM in it stay. Never fails."""
        with contextlib.suppress(OSError):
            for path in self.top.iterdir() if self.top is not None else ():
                with contextlib.suppress(ValueError):
                    pid, start, _ = (int(word) for word in path.name.split("-"))
                    if not Process(pid, start).alive():
                        remove(path)


def describe(setting: str) -> str:
    """Say what a VMM may take of the host here under this `vmm_limits` (auto | off), and by what."""
    if setting == "off":
        return "none (vmm_limits = off)"
    groups = Groups.find()
    return f"none ({groups.why})" if groups.top is None else f"{', '.join(groups.controllers)} ({groups.top})"


def remove(path: Path) -> None:
    """Remove a group, unless a process is in it. Never fails."""
    with contextlib.suppress(OSError):
        path.rmdir()


def clear(path: Path, timeout_s: float) -> None:
    """End every process of a group, wait until the last is gone, and remove it. Blocks; never fails."""
    with contextlib.suppress(OSError):
        (path / "cgroup.kill").write_text("1")
    with contextlib.suppress(OSError), (path / "cgroup.events").open() as events:
        changed = select.poll()  # a change is told as POLLPRI (cgroup-v2, Basic Operations)
        changed.register(events, select.POLLPRI)
        until = time.monotonic() + timeout_s
        while "populated 1" in events.read() and (left := until - time.monotonic()) > 0:
            changed.poll(left * 1000)
            events.seek(0)
    remove(path)


def _may_write(group: Path) -> bool:
    """Tell whether this user may make groups below this one, and move its processes there (cgroup-v2, Delegation)."""
    return all(os.access(path, os.W_OK) for path in (group, group / "cgroup.procs", group / "cgroup.subtree_control"))


def _may_hand_on(group: Path) -> bool:
    """Tell whether a group may have groups with limits below it: the root, which has no type, or one without processes of its
    own (cgroup-v2, No Internal Process Constraint). Of others the kernel takes some controllers all the same (Threads), and
    nothing could join what is then made below."""
    try:
        kind = (group / "cgroup.type").read_text().strip()
        return kind == "domain" and not (group / "cgroup.procs").read_text().strip()
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _switch_on(group: Path) -> None:
    """Hand on what this group has of our controllers, one by one: one that cannot be is no reason to have none."""
    has = set((group / "cgroup.controllers").read_text().split())
    on = set((group / "cgroup.subtree_control").read_text().split())
    for name in _CONTROLLERS:
        if name in has and name not in on:
            with contextlib.suppress(OSError):
                (group / "cgroup.subtree_control").write_text(f"+{name}")
