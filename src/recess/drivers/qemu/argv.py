"""QEMU's command line and the guest kernel's, as pure functions of what the machine is. Works with 7.2 and later.

Sources: QEMU's docs/system/i386/microvm.rst and qapi/*.json; why each kernel parameter is there is said beside it.
The device list must be the same at boot and at restore, in the same order: the device state names devices by it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recess.drivers.kept.layout import LINK_SOCKET, Layout
from recess.drivers.qemu.card import card_arguments, kernel_words
from recess.machines.contract import VmSpec

MACHINE_TYPE = "microvm"
CPU_MODEL = "max"
DISK_NODE = "disk"
PORT_NAME = "recess"
MONITOR_FD = 3
CONSOLE_FD = 4

_MACHINE_OPTIONS = "acpi=on,pit=on,pic=off,rtc=on,isa-serial=on,pcie=off,usb=off"
_CACHE_PART, _CACHE_MAX_MIB = 8, 512
_RECONNECT_MS_SINCE = (9, 2)
# No program, no other user, no other priority, whatever runs inside it (qemu-options.hx).
FILTER_OPTION = "-sandbox"
_FILTER = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class Qemu:
    """The QEMU of this host. `tb_mib`: the least size of TCG's translation cache in MiB. `devices_command`: device state is
    saved by `xen-save-devices-state` (see state.py). `confines`: it can confine itself. `cards`: it has a network for a card
    (card.py), which is an option of its build."""

    binary: Path
    version: tuple[int, int, int]
    accelerator: str  # kvm | tcg
    tb_mib: int = 32
    devices_command: bool = True
    confines: bool = False  # it was built with its filter of system calls
    cards: bool = True


def cpu_properties(accelerator: str) -> dict[str, bool]:
    """Return what the guest's CPU has unlike the model.

    TCG runs a repeated string instruction one step at a time, so a kernel and a C library that take "fast" at its word
    clear and copy memory byte by byte: without the two flags they use wide moves, and reading or writing files takes
    half the CPU time.

    AVX2 was new in QEMU 7.2, and computes wrongly there: numpy's `argsort`, which uses it, returned orders that were none in 14 of
    21 tries, and none without it. A wrong number is worse than a slow one, and in software the wide registers gain nothing.
    """
    return {"erms": False, "fsrm": False, "avx2": False} if accelerator == "tcg" else {}


def cpu_argument(accelerator: str) -> str:
    """Return the value of `-cpu`."""
    return ",".join([CPU_MODEL, *(f"{k}={'on' if v else 'off'}" for k, v in cpu_properties(accelerator).items())])


def cache_mib(qemu: Qemu, spec: VmSpec) -> int:
    """Return the size of TCG's translation cache in MiB: an eighth of the machine's memory. Pure.

    What does not fit is translated again and again. Processor time that a browser took to open a page: 76 s with 512 MiB, 99 s
    with 128, and with 32 no page after 290; a script of node's and an encode together: 11 s with 128, 13 s with 64, 17 s with 32.
    Memory is taken as the cache is filled, so small programs pay for none of it.
    """
    return max(qemu.tb_mib, min(_CACHE_MAX_MIB, (spec.memory_bytes >> 20) // _CACHE_PART))


def kernel_command_line(spec: VmSpec, tsc_khz: int) -> str:
    """Return the guest kernel's parameters; `tsc_khz` is the host's time stamp counter rate."""
    words = [
        "console=ttyS0 quiet panic=-1 reboot=t",
        "recess.root=/dev/vda recess.rootfs=erofs recess.disk=/dev/vdb",
        "init_on_free=1 init_on_alloc=0",  # freed pages are zero pages, which cost a snapshot nothing
        "mitigations=off",  # one tenant a kernel; the boundary is the VM
        "random.trust_cpu=on",
        # The PIT calibration fails on a busy host, and microvm has no other reference.
        f"tsc=reliable no_timer_check tsc_early_khz={tsc_khz}",
        "nokaslr",  # forks share the kernel's pages with each other and with its file
        "cryptomgr.notests audit=0",
        # One tenant a kernel: no policy of a distribution to enforce, no pressure to report. Landlock stays, for
        # programs that confine themselves. Less of the kernel runs in a fork's first milliseconds.
        "psi=0 lsm=landlock nowatchdog",
        kernel_words(spec),
        spec.boot.cmdline_extra,
    ]
    return " ".join(word for word in words if word)


def command(
    qemu: Qemu,
    spec: VmSpec,
    layout: Layout,
    *,
    ram: Path,
    share: bool,
    boot: str | None,
    disk: Path | None = None,
    card: str = "",
) -> list[str]:
    """Return the whole command line. `boot` is the kernel's parameters, or None for a VM that waits for its state; `disk`
    the writable disk's name if it is not yet the layout's, `card` which network card (`card.card_of`).

    The VM starts stopped in both cases: its disk's changes are tracked from the first instruction on.
    """
    accelerator = f"tcg,thread=multi,tb-size={cache_mib(qemu, spec)}" if qemu.accelerator == "tcg" else qemu.accelerator
    memory = {
        "qom-type": "memory-backend-file",
        "id": "ram0",
        "size": spec.memory_bytes,
        "mem-path": str(ram),
        "share": share,
        "merge": False,  # else a host that merges equal pages (KSM) would, of machines of different users, too
    }
    out = [str(qemu.binary), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S"]
    out += [FILTER_OPTION, _FILTER] if qemu.confines else []
    out += [
        "-accel",
        accelerator,
        "-cpu",
        cpu_argument(qemu.accelerator),
        "-smp",
        str(spec.cpus),
        "-m",
        f"{spec.memory_bytes >> 20}M",
    ]
    out += ["-M", f"{MACHINE_TYPE},{_MACHINE_OPTIONS},mem-merge=off,memory-backend=ram0", "-object", json.dumps(memory)]
    out += ["-add-fd", f"fd={CONSOLE_FD},set=1", "-chardev", "file,id=console,path=/dev/fdset/1,append=on"]
    out += ["-serial", "chardev:console"]
    for node in [*_disk_nodes("root", spec.boot.root, read_only=True), *_disk_nodes(DISK_NODE, disk or layout.disk)]:
        out += ["-blockdev", json.dumps(node)]
    out += ["-device", "virtio-blk-device,drive=root", "-device", f"virtio-blk-device,drive={DISK_NODE}"]
    # The monitor before the link: once QEMU has connected the link, the monitor is served.
    out += ["-chardev", f"socket,id=monitor,fd={MONITOR_FD},server=on,wait=off", "-mon", "chardev=monitor,mode=control"]
    out += ["-chardev", f"socket,id=link,path={LINK_SOCKET},{_reconnect(qemu.version)}"]
    out += ["-device", "virtio-serial-device,id=ports"]
    out += ["-device", f"virtserialport,bus=ports.0,nr=1,chardev=link,name={PORT_NAME}"]
    out += card_arguments(card)
    if qemu.devices_command:  # its stream lacks the section that a migration's begins with
        out += ["-global", "migration.send-configuration=off"]
    if boot is None:
        return [*out, "-incoming", "defer"]
    return [*out, "-kernel", str(spec.boot.kernel), "-initrd", str(spec.boot.initrd), "-append", boot]


def _reconnect(version: tuple[int, int, int]) -> str:
    return "reconnect-ms=50" if version[:2] >= _RECONNECT_MS_SINCE else "reconnect=1"


def _disk_nodes(name: str, path: Path, *, read_only: bool = False) -> list[dict[str, Any]]:
    """Return the block nodes of one disk: the file and the raw format over it.

    Flushes are not passed on: what must survive a host crash is a snapshot, never a running machine's disk.
    """
    common: dict[str, Any] = {"read-only": read_only, "cache": {"direct": False, "no-flush": True}}
    if not read_only:
        common["discard"] = "unmap"
    file = {"driver": "file", "node-name": f"{name}-file", "filename": str(path), "locking": "off", **common}
    raw = {"driver": "raw", "node-name": name, "file": f"{name}-file", **common}
    if not read_only:
        raw["detect-zeroes"] = "unmap"
    return [file, raw]
