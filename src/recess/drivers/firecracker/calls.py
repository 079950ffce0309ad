"""What is asked of Firecracker, as pure functions: method, path and body of each call.

Source: firecracker.yaml of version 1.16. Paths in bodies are names in the VMM's working folder: a snapshot's device state
holds them, and every machine has a folder of its own where the same names mean its own files. `shm` is in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recess.machines.contract import VmSpec
from recess.units import MIB

ROOT_FILE, DISK_FILE = "root", "disk"
KERNEL_FILE, INITRD_FILE = "kernel", "initrd"
TEMPLATE_FILE = "template"
SHM = "shm"
RAM_FILE, STATE_FILE = f"{SHM}/ram", f"{SHM}/state"  # what a VM is loaded from
TAKEN_STATE, TAKEN_MEMORY = f"{SHM}/taken.state", f"{SHM}/taken.memory"  # what a capture has Firecracker write
VSOCK_SOCKET = "v.sock"
FAULT_SOCKET = "uffd.sock"
GUEST_CID = 3
GUEST_PORT = 1024
FULL, DIFF = "Full", "Diff"
FILE, UFFD = "File", "Uffd"


@dataclass(frozen=True)
class Call:
    """One request."""

    method: str
    path: str
    body: dict[str, Any]


def kernel_command_line(spec: VmSpec) -> str:
    """Return the guest kernel's parameters; why each is there is said beside it."""
    words = [
        "console=ttyS0 quiet panic=-1 reboot=k",  # a reset by the keyboard controller is what ends the VMM
        "8250.nr_uarts=1 i8042.nokbd i8042.noaux i8042.nomux i8042.dumbkbd",  # nothing else is behind that controller
        f"recess.root=/dev/vda recess.rootfs=erofs recess.disk=/dev/vdb recess.vsock={GUEST_PORT}",
        "init_on_free=1 init_on_alloc=0",  # freed pages are zero pages, which cost a snapshot nothing
        "mitigations=off",  # one tenant a kernel; the boundary is the VM
        "random.trust_cpu=on",
        "clocksource=kvm-clock tsc=reliable no_timer_check",
        "nokaslr",  # forks share the kernel's pages with each other and with its file
        "cryptomgr.notests audit=0",
        "psi=0 lsm=landlock nowatchdog",
        spec.boot.cmdline_extra,
    ]
    return " ".join(word for word in words if word)


def boot_calls(spec: VmSpec) -> list[Call]:
    """Return what makes and starts a machine, in order; the last one starts it."""
    return [
        Call("PUT", "/machine-config", machine_config(spec)),
        Call("PUT", "/boot-source", boot_source(spec)),
        Call("PUT", f"/drives/{ROOT_FILE}", drive(ROOT_FILE, read_only=True)),
        Call("PUT", f"/drives/{DISK_FILE}", drive(DISK_FILE)),
        Call("PUT", "/vsock", {"guest_cid": GUEST_CID, "uds_path": VSOCK_SOCKET}),
        Call("PUT", "/actions", {"action_type": "InstanceStart"}),
    ]


def tiny_calls() -> list[Call]:
    """Return what makes and starts a guest that is a kernel and nothing else, in order; the last one starts it."""
    return [
        Call("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64}),
        Call("PUT", "/boot-source", {"kernel_image_path": KERNEL_FILE, "boot_args": ""}),
        Call("PUT", "/actions", {"action_type": "InstanceStart"}),
    ]


def machine_config(spec: VmSpec) -> dict[str, Any]:
    """Return the size. Changes are tracked from the first instruction on: the first snapshot is a Diff, too."""
    return {
        "vcpu_count": spec.cpus,
        "mem_size_mib": spec.memory_bytes // MIB,
        "smt": False,
        "track_dirty_pages": True,
        "huge_pages": "None",
    }


def boot_source(spec: VmSpec) -> dict[str, Any]:
    """Return kernel, initial root and parameters."""
    return {
        "kernel_image_path": KERNEL_FILE,
        "initrd_path": INITRD_FILE,
        "boot_args": kernel_command_line(spec),
    }


def drive(name: str, *, read_only: bool = False) -> dict[str, Any]:
    """Return a disk. Flushes are not passed on: what must survive a host crash is a snapshot, never a running machine's
    disk. None is the root device: guestd mounts both."""
    return {
        "drive_id": name,
        "path_on_host": name,
        "is_root_device": False,
        "is_read_only": read_only,
        "cache_type": "Unsafe",
        "io_engine": "Sync",
    }


def pause() -> Call:
    """Stop the vCPUs. May be asked of a VM that is paused."""
    return Call("PATCH", "/vm", {"state": "Paused"})


def resume() -> Call:
    """Let them run. May be asked of a VM that runs."""
    return Call("PATCH", "/vm", {"state": "Resumed"})


def create_snapshot(kind: str, state: str, memory: str) -> Call:
    """Write device state and memory (`kind`: Full, or Diff: what was written since the last one) into these files."""
    return Call("PUT", "/snapshot/create", {"snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory})


def load_snapshot(state: str, backend: str, memory: str) -> Call:
    """Load a snapshot into a fresh VMM and leave it paused. `backend`: File (mapped privately, never to change again) or
    Uffd (`memory` is the fault handler's socket). Tracking is not in the snapshot: it is asked for each time."""
    return Call(
        "PUT",
        "/snapshot/load",
        {
            "snapshot_path": state,
            "mem_backend": {"backend_type": backend, "backend_path": memory},
            "track_dirty_pages": True,
            "resume_vm": False,
        },
    )
