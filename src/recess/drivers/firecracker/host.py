"""What the Firecracker of this host is, and whether it truly runs guests here: found by running it.

A version is asked for once per binary and kept in this process. This module knows nothing of machines' images or states.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from recess.config import Config
from recess.drivers.firecracker.api import API_SOCKET, Api
from recess.drivers.firecracker.calls import KERNEL_FILE, tiny_calls
from recess.drivers.firecracker.jail import why_no_jail
from recess.drivers.firecracker.tiny import tiny_kernel
from recess.drivers.kept import keeper as keepers
from recess.drivers.kept.keeper import Keeper, Obituary, end_vm
from recess.drivers.kept.layout import Layout
from recess.errors import DriverFailed, MissingTool, RecessError

MINIMUM_VERSION = (1, 16, 1)
"""Earlier ones restore machines wrongly: a dead vsock, a jump of the monotonic clock, damaged changes over 3 GiB."""

PROBE_PREFIX = "probe-fc-"
_VERSION_S = 10.0
_TRIAL_S = 20.0
_COUNT_S = 5.0  # hardware needs 10 ms; a KVM that interprets needs minutes
_HINT = "recess doctor --install-firecracker, or set RECESS_FIRECRACKER_BIN to a release's binary"


@dataclass(frozen=True)
class HostFacts:
    """The Firecracker that machines run on here. `cpu_model`, `cpu_flags`: what a guest sees is the host's."""

    binary: Path
    keeper: Path
    version: tuple[int, int, int]
    no_jail: str  # why VMs are not jailed; "" when they are
    cpu_model: str
    cpu_flags: tuple[str, ...]

    @property
    def version_text(self) -> str:
        """Like "1.16.1"."""
        return ".".join(map(str, self.version))


def find_tools(config: Config) -> tuple[Path, Path]:
    """Return (Firecracker, keeper). Raises MissingTool."""
    own = config.home / "bin" / "firecracker"
    found = config.firecracker_bin or shutil.which("firecracker") or (str(own) if own.is_file() else "")
    if not found or not Path(found).is_file():
        raise MissingTool(f"Firecracker is not there: {config.firecracker_bin or 'firecracker'}", hint=_HINT)
    keeper = config.bin_dir / "keeper"
    if not keeper.is_file():
        raise MissingTool(f"the keeper is not built: {keeper}", hint="run tools/setup.sh")
    return Path(found).absolute(), keeper


def read_host(config: Config) -> HostFacts:
    """Look at the host; starts the binary once for its version. Raises MissingTool, DriverFailed."""
    binary, keeper = find_tools(config)
    version = ask_version(binary)
    if version < MINIMUM_VERSION:
        wanted = ".".join(map(str, MINIMUM_VERSION))
        raise MissingTool(f"Firecracker {'.'.join(map(str, version))} is too old", hint=f"{wanted} or later: {_HINT}")
    check_kvm(Path("/dev/kvm"))
    model, flags = parse_cpu(Path("/proc/cpuinfo").read_text())
    return HostFacts(binary, keeper, version, why_no_jail(binary, root=os.geteuid() == 0), model, flags)


def ask_version(binary: Path) -> tuple[int, int, int]:
    """Return the version that the binary says it has. Raises DriverFailed."""
    try:
        done = subprocess.run(
            [str(binary), "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=_VERSION_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise DriverFailed(f"{binary} does not run here: {exc}", log="") from exc
    text = done.stdout[:4096].decode(errors="replace")
    match = re.match(r"Firecracker v(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise DriverFailed(f"{binary} is not Firecracker", hint=_HINT, log=text)
    return int(match[1]), int(match[2]), int(match[3])


def check_kvm(node: Path) -> None:
    """Raise MissingTool unless this user may open KVM: Firecracker has nothing else to run guests with."""
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise MissingTool(f"no {node}: Firecracker needs hardware virtualisation", hint="use the driver qemu") from None
    except OSError as exc:
        raise MissingTool(
            f"{node} may not be opened: {exc.strerror}", hint="usermod -aG kvm USER, then log in again"
        ) from exc


def parse_cpu(cpuinfo: str) -> tuple[str, tuple[str, ...]]:
    """Return (model, features) of the first processor of /proc/cpuinfo."""
    rows = (line.partition(":") for line in cpuinfo.split("\n\n", 1)[0].splitlines())
    facts = {key.strip(): value.strip() for key, _, value in rows}
    family = "/".join(facts.get(key, "?") for key in ("vendor_id", "cpu family", "model", "stepping"))
    return f"{facts.get('model name', 'unknown')} ({family})", tuple(sorted(facts.get("flags", "").split()))


async def run_tiny_guest(config: Config, facts: HostFacts) -> str:
    """Run a guest of a few instructions. Returns "" if they were executed, else what happened, in one line."""
    name = f"{PROBE_PREFIX}{secrets.token_hex(6)}"
    layout = Layout(config.run_dir / "m" / name, config.run_dir / name)
    layout.run.mkdir(parents=True, mode=0o700)
    layout.directory.mkdir(mode=0o700)
    keeper: Keeper | None = None
    try:
        kernel = layout.run / KERNEL_FILE
        kernel.write_bytes(tiny_kernel())
        await asyncio.to_thread(keepers.launch, facts.keeper, layout, kernel, command(facts.binary))
        keeper = Keeper.connect(layout)
        await keeper.deadline(_TRIAL_S)
        api = Api(layout.run)
        await api.wait_ready(_TRIAL_S)
        *prepare, begin = tiny_calls()
        for call in prepare:
            await api.call(call)
        await keeper.deadline(_COUNT_S)
        await api.call(begin)
        return verdict(await keeper.death)
    except RecessError as exc:
        return exc.message
    finally:
        await end_vm(layout, keeper)
        if keeper is not None:
            keeper.close()
        shutil.rmtree(layout.directory, ignore_errors=True)


def verdict(end: Obituary) -> str:
    """Say what the end of the tiny guest means: "" is good."""
    if end.end == "exit:0":
        return ""
    if end.reason.startswith("deadline"):
        return f"a guest of 7 instructions did not end within {_COUNT_S:g} s"
    return (end.log.strip().splitlines() or [end.line()])[-1]


def command(binary: Path) -> list[str]:
    """Return Firecracker's command line. Its working folder is the run folder, so names there are relative.

    Standard output is the guest's serial console, and Firecracker can send it nowhere else over a restore: the shell, which
    is replaced at once, makes it the keeper's console pipe (descriptor 4); Firecracker's own words go to the log.
    """
    own = [str(binary), "--api-sock", API_SOCKET, "--level", "Warning", "--log-path", "/proc/self/fd/2"]
    return ["/bin/sh", "-c", 'exec "$0" "$@" >&4 4>&- 3>&-', *own]
