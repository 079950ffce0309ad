"""What a host must have before a guest is tried: facts read once, judged by a pure function.

`read_host` is the only part that touches the host; `judge_host` turns facts into lines of the report. Neither starts a
guest: that is the driver's probe and `doctoring`. This module must know nothing of drivers or machines.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recess.config import Config
from recess.errors import MissingTool, RecessError
from recess.images import kernels
from recess.images.tools import find_tool
from recess.units import GIB, format_bytes

MIN_MEMORY_BYTES = 2 * GIB
MIN_SHARED_BYTES = GIB
MIN_HOME_BYTES = 2 * GIB
_VERSION_WAIT_S = 10.0

# tool -> (arguments that print a version, Debian package, needed to run machines)
_TOOLS: Mapping[str, tuple[tuple[str, ...], str, bool]] = {
    "qemu-system-x86_64": (("--version",), "qemu-system-x86", True),
    "mkfs.ext4": (("-V",), "e2fsprogs", True),
    "mmdebstrap": (("--version",), "mmdebstrap", False),
    "newuidmap": ((), "uidmap", False),
}


@dataclass(frozen=True)
class HostCheck:
    """One line of the report. `ok=False` means that machines cannot run; a warning is ok with a hint."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class HostFacts:
    """The host as found. Sizes in bytes; `kvm` is absent | denied | ready; a tool maps to its version or None."""

    system: str
    machine: str
    kernel: tuple[int, int]
    python: tuple[int, int]
    cores: int
    memory_bytes: int
    shared_path: str
    shared_free_bytes: int
    home: str
    home_writable: bool
    home_free_bytes: int
    kvm: str
    user_is_root: bool
    tools: Mapping[str, str | None] = field(default_factory=dict)
    programs: Mapping[str, bool] = field(default_factory=dict)  # guestd, keeper: built?
    base_image: bool = False
    guest_kernel: str = ""  # what new machines start from; empty: none is here yet
    kernel_problem: str = ""


def judge_host(facts: HostFacts) -> list[HostCheck]:
    """Return the host's part of the report, in the order in which a person would fix things."""
    return [_platform(facts), *_resources(facts), _kvm(facts), *_tools(facts), *_built(facts)]


def _platform(facts: HostFacts) -> HostCheck:
    detail = f"{facts.system} {facts.kernel[0]}.{facts.kernel[1]} on {facts.machine}, Python {facts.python[0]}.{facts.python[1]}"
    if (facts.system, facts.machine) != ("Linux", "x86_64"):
        return HostCheck("platform", False, detail, "Recess runs on Linux on x86_64")
    if facts.kernel < (5, 10):
        return HostCheck("platform", False, detail, "a kernel of 5.10 or newer is needed (pidfd, close_range)")
    return HostCheck("platform", True, detail)


def _resources(facts: HostFacts) -> list[HostCheck]:
    memory = HostCheck("memory", True, f"{format_bytes(facts.memory_bytes)}, {facts.cores} cores")
    if facts.memory_bytes < MIN_MEMORY_BYTES:
        memory = HostCheck("memory", False, memory.detail, f"at least {format_bytes(MIN_MEMORY_BYTES)} are needed")
    shared = f"{format_bytes(facts.shared_free_bytes)} free in {facts.shared_path}"
    home = f"{format_bytes(facts.home_free_bytes)} free in {facts.home}"
    return [
        memory,
        HostCheck(
            "shared memory",
            facts.shared_free_bytes >= MIN_SHARED_BYTES,
            shared,
            ""
            if facts.shared_free_bytes >= MIN_SHARED_BYTES
            else f"templates live there: make room for {format_bytes(MIN_SHARED_BYTES)}, or set RECESS_RUN_DIR",
        ),
        HostCheck("home", False, f"{facts.home} is not writable", "set RECESS_HOME to a folder of yours")
        if not facts.home_writable
        else HostCheck(
            "home",
            facts.home_free_bytes >= MIN_HOME_BYTES,
            home,
            "" if facts.home_free_bytes >= MIN_HOME_BYTES else f"make room for {format_bytes(MIN_HOME_BYTES)}",
        ),
    ]


def _kvm(facts: HostFacts) -> HostCheck:
    """Report hardware virtualisation; without it machines run all the same, slower."""
    if facts.kvm == "ready":
        return HostCheck("kvm", True, "/dev/kvm can be opened (whether it boots a guest is tried below)")
    if facts.kvm == "denied":
        return HostCheck(
            "kvm", True, "/dev/kvm may not be opened by this user", "usermod -aG kvm USER, then log in again"
        )
    return HostCheck("kvm", True, "no /dev/kvm: guests run in software, their CPU is slower")


def _tools(facts: HostFacts) -> list[HostCheck]:
    checks = []
    for name, version in facts.tools.items():
        package, needed = _TOOLS[name][1], _TOOLS[name][2]
        if version is not None:
            checks.append(HostCheck(name, True, version or "installed"))
        elif name == "newuidmap" and facts.user_is_root:
            continue  # root builds images without it
        else:
            why = "" if needed else " (only for building images)"
            checks.append(HostCheck(name, not needed, f"not installed{why}", f"apt-get install {package}"))
    return checks


def _built(facts: HostFacts) -> list[HostCheck]:
    hint = "make setup"
    checks = [
        HostCheck(name, there, "built" if there else "not built", "" if there else hint)
        for name, there in facts.programs.items()
    ]
    image = "the image base is there" if facts.base_image else "the image base is not built"
    return [
        *checks,
        _guest_kernel(facts),
        HostCheck("base image", facts.base_image, image, "" if facts.base_image else hint),
    ]


def _guest_kernel(facts: HostFacts) -> HostCheck:
    if facts.kernel_problem:
        return HostCheck("guest kernel", False, facts.kernel_problem, "RECESS_KERNEL: auto, trimmed, debian or a path")
    there = bool(facts.guest_kernel)
    return HostCheck("guest kernel", there, facts.guest_kernel or "none", "" if there else "make setup")


def read_kernel(config: Config) -> tuple[str, str]:
    """Return (the kernel that new machines start from, what is wrong): one of the two is empty, both if there is none."""

    def none_here() -> kernels.Kernel:
        raise MissingTool("none")

    try:
        return kernels.choose(config.images_dir, config.kernel, none_here).label, ""
    except MissingTool:
        return "", ""
    except RecessError as exc:
        return "", exc.message


def read_host(config: Config, *, base_image: bool) -> HostFacts:
    """Look at the host. Starts each tool once for its version (bounded wait); changes nothing."""
    shared = _existing(config.run_dir)
    home = _existing(config.home)
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    guest_kernel, kernel_problem = read_kernel(config)
    return HostFacts(
        system=platform.system(),
        machine=platform.machine(),
        kernel=(int(release[1]), int(release[2])) if release else (0, 0),
        python=sys.version_info[:2],
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        shared_path=str(shared),
        shared_free_bytes=shutil.disk_usage(shared).free,
        home=str(home),
        home_writable=os.access(home, os.W_OK),
        home_free_bytes=shutil.disk_usage(home).free,
        kvm=_kvm_state(Path("/dev/kvm")),
        user_is_root=os.geteuid() == 0,
        tools={name: tool_version(config.qemu_bin if "qemu" in name and config.qemu_bin else name, arguments)
               for name, (arguments, _package, _needed) in _TOOLS.items()},
        programs={name: os.access(config.bin_dir / name, os.X_OK) for name in ("guestd", "keeper")},
        base_image=base_image,
        guest_kernel=guest_kernel, kernel_problem=kernel_problem,
    )  # fmt: skip


def _existing(path: Path) -> Path:
    """Return the path or the nearest folder above it that exists."""
    while not path.is_dir():
        path = path.parent
    return path


def _kvm_state(node: Path) -> str:
    try:
        if not stat.S_ISCHR(node.stat().st_mode):
            return "absent"
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return "absent"
    except OSError:
        return "denied"
    return "ready"


def tool_version(name: str, arguments: tuple[str, ...]) -> str | None:
    """Return the first line a tool prints about its version, "" if it says none, None if it is not installed."""
    try:
        path = find_tool(name)
    except MissingTool:
        return None
    if not arguments:
        return ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [path, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=_VERSION_WAIT_S, check=False,
        )  # fmt: skip
        lines = done.stdout[:4096].decode(errors="replace").strip().splitlines()
        return lines[0].strip() if lines else ""
    return ""
