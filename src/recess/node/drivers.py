"""Which drivers this node has, and which one its machines run on unless they ask for another: the only place that names
concrete drivers.

`auto` takes the strongest that works here: hardware virtualisation (Firecracker, QEMU on KVM), then gVisor, then QEMU in
software. Works means that it ran something just now, or since the host's last boot: a device that can be opened, or a
program that is installed, proves nothing. gVisor comes before QEMU in software because its kernel is made to be a
boundary, which QEMU's own makers do not claim of their emulator, and because programs run at the processor's speed.

Nothing that fails here keeps a node from starting: `recess ps`, `logs` and `doctor` must work on a host that cannot run a
guest; an attempt to start one then says what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from recess.config import Config
from recess.drivers.fake import FakeDriver, FakeImages
from recess.drivers.firecracker import FirecrackerDriver
from recess.drivers.gvisor import GvisorDriver
from recess.drivers.qemu import QemuDriver
from recess.errors import BadInput, RecessError
from recess.machines.contract import Driver
from recess.machines.imagefiles import StoredImages
from recess.machines.parts import ImageFiles, Progress

KNOWN = ("auto", "firecracker", "qemu", "gvisor", "fake")
HARDWARE = "kvm"


@dataclass(frozen=True)
class Trial:
    """What came of trying a driver. `engine`: what runs the guest's instructions (kvm, systrap, tcg), "" if nothing does;
    `said`: why it does not work, or what is to be said of it."""

    name: str
    engine: str
    said: str = ""


@dataclass(frozen=True)
class Chosen:
    """The node's own driver and why it was chosen; `others` for machines that ask for them, by name."""

    driver: Driver
    reason: str
    others: Mapping[str, Driver] = field(default_factory=dict)


def strongest(trials: Sequence[Trial]) -> tuple[str, str]:
    """Return which driver `auto` means, out of what was tried, and why. Without any that works: QEMU."""
    works = {trial.name: trial for trial in trials if trial.engine}
    for trial in trials:
        if trial.engine == HARDWARE:
            return trial.name, "auto: hardware virtualisation ran a guest"
    without = "; ".join(f"{trial.name}: {trial.said}" for trial in trials if trial.said)
    if "gvisor" in works:
        return (
            "gvisor",
            f"auto: it ran a program, and there is no hardware virtualisation ({without or 'none was found'})",
        )
    if "qemu" in works:
        return "qemu", f"auto: in software, for nothing stronger works here ({without or 'nothing else was found'})"
    return "qemu", f"auto: nothing works here ({without or 'nothing was tried'})"


async def choose_drivers(config: Config) -> Chosen:
    """Return the node's drivers. Raises BadInput for an unknown name in the configuration."""
    if config.driver not in KNOWN:
        raise BadInput(f"driver: unknown {config.driver!r}", hint=f"known: {', '.join(KNOWN)}")
    if config.driver == "fake":
        return Chosen(FakeDriver(), "the configuration names it")
    drivers = real_drivers(config)
    name, reason = config.driver, "the configuration names it"
    if name == "auto":
        name, reason = strongest(await _tried(config, drivers))
    own = drivers.pop(name)
    return Chosen(own, reason, drivers)


def real_drivers(config: Config) -> dict[str, Driver]:
    """Return one of each driver that runs real machines, strongest first. None is started or looked for."""
    return {
        "firecracker": FirecrackerDriver(config), "qemu": QemuDriver(config), "gvisor": GvisorDriver(config),
    }  # fmt: skip


async def try_driver(driver: Driver) -> Trial:
    """Run something under a driver."""
    try:
        found = await driver.probe(fresh=True)
    except RecessError as exc:
        return Trial(driver.name, "", exc.message)
    return Trial(driver.name, str(found.get("accelerator") or found.get("platform") or "?"), str(found.get("why", "")))


async def _tried(config: Config, drivers: Mapping[str, Driver]) -> list[Trial]:
    """Return what is known of this host, or try: until one works, those that may have hardware under them first."""
    path = config.run_dir / f"drivers-{_key(config)}.json"
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=list[Trial])
    hardware = config.accelerator != "tcg" and os.access("/dev/kvm", os.F_OK)
    order = ["firecracker", "qemu", "gvisor"] if hardware else ["gvisor", "qemu"]
    trials: list[Trial] = []
    if not hardware:
        trials.append(Trial("kvm", "", "pinned off" if config.accelerator == "tcg" else "/dev/kvm is not there"))
    for driver in [drivers[name] for name in order if name in drivers]:
        trials.append(await try_driver(driver))
        if trials[-1].engine == HARDWARE or (driver.name == "gvisor" and trials[-1].engine):
            break
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):  # a cache: without it the next start tries again
        aside.write_bytes(msgspec.json.encode(trials))
        aside.replace(path)
    return trials


def _key(config: Config) -> str:
    """Return a name for everything the trials depend on; the run folder is in memory, so a reboot forgets them."""
    names = [
        config.firecracker_bin or "firecracker", config.qemu_bin or "qemu-system-x86_64", config.runsc_bin or "runsc",
    ]  # fmt: skip
    paths = [
        *(config.home / "bin" / name for name in ("firecracker", "runsc")),
        *(config.bin_dir / name for name in ("guestd", "keeper")),
    ]
    paths += [Path(found) for name in names if (found := shutil.which(name))]
    files = []
    for path in paths:
        with contextlib.suppress(OSError):
            files.append((str(path), path.stat().st_mtime_ns, path.stat().st_size))
    kvm = os.access("/dev/kvm", os.R_OK | os.W_OK)
    text = repr((files, config.accelerator, config.runsc_bin, config.qemu_bin, kvm, os.getuid()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def make_images(config: Config, driver: Driver, progress: Progress) -> ImageFiles:
    """Return the boot files that the node's machines start from, the same under every real driver."""
    if driver.name == "fake":
        return FakeImages()
    return StoredImages(config.images_dir, config.bin_dir / "guestd", progress, kernel=config.kernel)
