"""The jail of a VM that root starts: Firecracker's own jailer, a user id without rights, namespaces of its own.

    DIRECTORY/jail/NAME/ID/root      the root folder that Firecracker sees; its files are mounted there, privately
      root disk kernel initrd template        bind mounts of the VM's files
      shm                                     bind mount of RUN/shm: what goes through shared memory
      api.sock v.sock uffd.sock               sockets, reachable from outside by their path here

The chain is keeper -> `keeper jail` -> its first process -> jailer, which becomes Firecracker. The jailer changes the user id,
and with it the kernel forgets that Firecracker should die with its parent; so all of it is in a process namespace whose first
process keeps its rights and dies with the keeper, and the kernel ends the rest. The mounts are in a namespace of theirs, too:
they are gone with the processes, and nobody else ever sees them (guest/keeper/src/jail.rs). The jailer is told of no control
group: the keeper has put all of the chain into one (kept/cgroup.py), which the jailer would leave half of it out of.

A jail needs root, the jailer beside the binary, and a file system that may hold device nodes; where one is missing the VM
runs without, and `recess doctor` says why. This module knows paths and command lines; it starts nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from recess.drivers.firecracker.api import API_SOCKET
from recess.drivers.firecracker.calls import SHM
from recess.drivers.kept.layout import Layout

UIDS = range(2_100_000_000, 2_100_065_536)
"""User ids of jails: nobody's on any sane host. One per VM, by its name; two of 65536 may meet."""

JAIL_FOLDER = "jail"


@dataclass(frozen=True)
class Jail:
    """One VM's jail. `root` is the folder as the host sees it."""

    jailer: Path
    binary: Path
    base: Path
    id: str
    uid: int

    @property
    def root(self) -> Path:
        """Where the jailer puts the VM (it makes the path of these parts)."""
        return self.base / self.binary.name / self.id / "root"


def why_no_jail(binary: Path, *, root: bool) -> str:
    """Return why VMs of this binary are not jailed, "" if they are."""
    if not root:
        return "only root can make a jail"
    if not binary.with_name("jailer").is_file():
        return f"there is no jailer beside {binary}"
    return ""


def holds_devices(folder: Path) -> bool:
    """Tell whether device nodes below this folder work: a file system mounted `nodev` has none."""
    return not os.statvfs(folder).f_flag & os.ST_NODEV


def jail_of(binary: Path, layout: Layout) -> Jail:
    """Return the jail of this VM, as it is or is to be made."""
    name = layout.run.name
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") % len(UIDS)
    own = hashlib.blake2b(str(layout.run).encode(), digest_size=12).hexdigest()  # the jailer takes letters and digits
    return Jail(binary.with_name("jailer"), binary, layout.directory / JAIL_FOLDER, own, UIDS[number])


def prepare(jail: Jail, shm: Path, files: Mapping[str, Path], writable: Path) -> None:
    """Make the folders; give the VM's user what it must write (`shm`, `writable`) and what it must read (`files`, which
    are below folders that only their owner may enter)."""
    jail.root.mkdir(parents=True, mode=0o700)
    for path in files.values():
        path.chmod(path.stat().st_mode | 0o444)
    for path in (writable, shm, *shm.iterdir()):
        os.chown(path, jail.uid, jail.uid)


def command(jail: Jail, keeper: Path, shm: Path, files: Mapping[str, Path]) -> list[str]:
    """Return the command line that starts Firecracker in its jail. `files`: by their names in it."""
    words = [str(keeper), "jail", "--root", str(jail.root), "--folder", SHM, str(shm)]
    for name, path in files.items():
        words += ["--file", name, str(path)]
    words += ["--", str(jail.jailer), "--id", jail.id, "--exec-file", str(jail.binary)]
    words += ["--chroot-base-dir", str(jail.base), "--uid", str(jail.uid), "--gid", str(jail.uid)]
    return [*words, "--", "--api-sock", API_SOCKET, "--level", "Error"]


def remove(jail: Jail) -> None:
    """Remove what is left of a jail whose processes are gone. Never fails; what cannot be removed stays."""
    shutil.rmtree(jail.base, ignore_errors=True)


def descendants(pid: int) -> list[int]:
    """Return the processes below this one, itself first; those that end meanwhile may be missing."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        current = waiting.pop()
        found.append(current)
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{current}/task").glob("*/children"):
                waiting += [int(child) for child in task.read_text().split() if int(child) not in found]
    return found
