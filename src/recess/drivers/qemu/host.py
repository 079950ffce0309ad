"""What this host's QEMU is and can do: found by running it. The accelerator is the one that truly runs a guest.

Found once a host boot: the answer is kept in the run folder (in memory), under a key of everything it depends on.

Every QEMU here is started through a keeper with a deadline of its own, so a server that dies meanwhile leaves a
leftover that ends by itself. This module knows nothing of machines' images or states.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from recess.config import Config
from recess.drivers.kept import keeper as keepers
from recess.drivers.kept.keeper import Keeper, Obituary, end_vm, last_words
from recess.drivers.kept.layout import Layout
from recess.drivers.qemu.argv import (
    CONSOLE_FD,
    CPU_MODEL,
    FILTER_OPTION,
    MACHINE_TYPE,
    MONITOR_FD,
    Qemu,
    cpu_argument,
    cpu_properties,
)
from recess.drivers.qemu.pvh import DEBUG_PORT, EXIT_CODE, tiny_kernel
from recess.drivers.qemu.qmp import Qmp, QmpRefused
from recess.errors import DriverFailed, MissingTool, RecessError

MINIMUM_VERSION = (7, 2, 0)
PROBE_PREFIX = "probe-"

_DEADLINE_S = 20.0
_TINY_GUEST_S = 2.0  # hardware needs 0.1 s in all
_MEMORY_BYTES = 32 << 20


@dataclass(frozen=True)
class HostFacts:
    """The QEMU that machines run on here. `cpu_flags`: the features a guest sees, sorted."""

    qemu: Qemu
    cpu_flags: tuple[str, ...]
    tsc_khz: int
    why: str  # why this accelerator, for people

    @property
    def version(self) -> str:
        """Like "7.2.22"."""
        return ".".join(map(str, self.qemu.version))


def find_tools(config: Config) -> tuple[Path, Path]:
    """Return (QEMU, keeper). Raises MissingTool."""
    found = config.qemu_bin or shutil.which("qemu-system-x86_64") or ""
    if not found or not Path(found).is_file():
        raise MissingTool(
            f"QEMU is not there: {config.qemu_bin or 'qemu-system-x86_64'}",
            hint="apt-get install qemu-system-x86, or set RECESS_QEMU_BIN",
        )
    keeper = config.bin_dir / "keeper"
    if not keeper.is_file():
        raise MissingTool(f"the keeper is not built: {keeper}", hint="run tools/setup.sh")
    return Path(found).absolute(), keeper


async def host_facts(config: Config, *, tb_mib: int, fresh: bool = False) -> HostFacts:
    """Return what is known of this host, or find out (`fresh`: in any case). Raises MissingTool, DriverFailed."""
    binary, keeper = find_tools(config)
    path = config.run_dir / f"qemu-{_key(config, binary, keeper, tb_mib)}.json"
    if not fresh:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(path.read_bytes(), type=HostFacts, dec_hook=lambda kind, value: kind(value))
    facts = await inspect_host(config, binary, keeper, tb_mib=tb_mib)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a second at the next start
        aside.write_bytes(msgspec.json.encode(facts, enc_hook=str))
        aside.replace(path)
    return facts


def _key(config: Config, binary: Path, keeper: Path, tb_mib: int) -> str:
    """Return a name for everything the facts depend on."""
    files = [(str(path), stat.st_mtime_ns, stat.st_size) for path in (binary, keeper) for stat in [path.stat()]]
    kvm = os.access("/dev/kvm", os.R_OK | os.W_OK)
    text = repr((files, config.accelerator, kvm, tb_mib, os.getuid(), cpu_argument("tcg")))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


async def inspect_host(config: Config, binary: Path, keeper: Path, *, tb_mib: int) -> HostFacts:
    """Run QEMU and say what it is. Raises MissingTool, DriverFailed."""
    accelerator, why = await choose_accelerator(config, binary, keeper)
    asked = await _ask(config, binary, keeper, accelerator)
    version = asked.version
    if version < MINIMUM_VERSION:
        raise MissingTool(
            f"QEMU {'.'.join(map(str, version))} is too old", hint="7.2 or later is needed; set RECESS_QEMU_BIN"
        )
    tsc_khz = await asyncio.to_thread(measure_tsc_khz, keeper)
    qemu = Qemu(
        binary, version, accelerator, tb_mib,
        devices_command="xen-save-devices-state" in asked.commands, confines=asked.confines, cards=asked.cards,
    )  # fmt: skip
    return HostFacts(qemu, asked.cpu_flags, tsc_khz, why)


async def choose_accelerator(config: Config, binary: Path, keeper: Path) -> tuple[str, str]:
    """Return the accelerator and why: what the configuration pins, else KVM if it runs a guest, else TCG."""
    if config.accelerator == "tcg":
        return "tcg", "pinned by the configuration"
    verdict = "/dev/kvm is not there"
    if os.access("/dev/kvm", os.F_OK):
        verdict = await run_tiny_guest(config, binary, keeper, "kvm")
    if not verdict:
        return "kvm", "KVM ran a guest"
    if config.accelerator == "kvm":
        raise DriverFailed(f"KVM does not run guests here: {verdict}", hint="set RECESS_ACCELERATOR=tcg", log="")
    return "tcg", f"KVM does not run guests here: {verdict}"


async def run_tiny_guest(config: Config, binary: Path, keeper: Path, accelerator: str) -> str:
    """Boot a guest of a few instructions. Returns "" if they were executed, else what happened, in one line."""
    deadline_s = _TINY_GUEST_S if accelerator == "kvm" else _DEADLINE_S
    async with _Trial(config) as trial:
        kernel = trial.layout.run / "kernel"
        kernel.write_bytes(tiny_kernel())
        extra = ["-kernel", str(kernel), "-device", f"isa-debug-exit,iobase={DEBUG_PORT},iosize=4"]
        try:
            await trial.start(keeper, [str(binary), *_arguments(accelerator), *extra], deadline_s=deadline_s)
            obituary = await trial.death()
        except RecessError as exc:
            return exc.message
    if obituary.end == f"exit:{EXIT_CODE}":
        return ""
    if obituary.reason.startswith("deadline"):
        return f"a guest of 40 instructions did not end within {deadline_s:g} s"
    return (obituary.log.strip().splitlines() or [obituary.line()])[-1]


@dataclass(frozen=True)
class _Answers:
    """What a QEMU that stands still says of itself. `commands`: its monitor's."""

    version: tuple[int, int, int]
    cpu_flags: tuple[str, ...]
    commands: frozenset[str]
    confines: bool
    cards: bool


async def _ask(config: Config, binary: Path, keeper: Path, accelerator: str) -> _Answers:
    async with _Trial(config) as trial:
        await trial.start(keeper, [str(binary), *_arguments(accelerator), "-S"])
        try:
            qmp = await Qmp.connect(trial.layout.run, timeout_s=_DEADLINE_S)
        except RecessError as exc:
            raise await trial.explain(exc) from exc
        try:
            numbers = (await qmp.execute("query-version"))["qemu"]
            names = await qmp.execute("query-commands")
            options = {str(entry["option"]) for entry in await qmp.execute("query-command-line-options")}
            wanted = {"name": CPU_MODEL, "props": cpu_properties(accelerator)}
            model = await qmp.execute("query-cpu-model-expansion", {"type": "full", "model": wanted})
            cards = await has_network(qmp)
        finally:
            await qmp.close()
    flags = sorted(name for name, value in model["model"]["props"].items() if value is True)
    version = (int(numbers["major"]), int(numbers["minor"]), int(numbers["micro"]))
    return _Answers(
        version=version,
        cpu_flags=tuple(flags),
        commands=frozenset(str(entry["name"]) for entry in names),
        confines=FILTER_OPTION[1:] in options,
        cards=cards,
    )


async def has_network(qmp: Qmp) -> bool:
    """Say whether this QEMU makes a network for a card: by making one. Its list of kinds names those it was built without,
    too."""
    try:
        await qmp.execute("netdev_add", {"type": "user", "id": "probe"})
        await qmp.execute("netdev_del", {"id": "probe"})
    except QmpRefused:
        return False
    return True


def measure_tsc_khz(keeper: Path) -> int:
    """Return the rate of the host's time stamp counter in kHz (takes 30 ms). Raises DriverFailed."""
    try:
        done = subprocess.run([str(keeper), "tsc-khz"], capture_output=True, check=True, timeout=10)
        return int(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as exc:
        raise DriverFailed(f"the keeper does not run here: {exc}", log="") from exc


def _arguments(accelerator: str) -> list[str]:
    return [
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", accelerator),
        *(
            "-cpu",
            cpu_argument(accelerator),
            "-m",
            f"{_MEMORY_BYTES >> 20}M",
            "-M",
            f"{MACHINE_TYPE},acpi=on,pit=on,pic=off,rtc=on",
        ),
        *("-chardev", f"socket,id=monitor,fd={MONITOR_FD},server=on,wait=off", "-mon", "chardev=monitor,mode=control"),
        *("-add-fd", f"fd={CONSOLE_FD},set=1"),
    ]


class _Trial:
    """A QEMU for a moment, in a run folder of its own that is gone afterwards."""

    def __init__(self, config: Config) -> None:
        name = f"{PROBE_PREFIX}{secrets.token_hex(6)}"
        self.layout = Layout(config.run_dir / "m" / name, config.run_dir / name)
        self._keeper: Keeper | None = None
        self._obituary: Obituary | None = None

    async def __aenter__(self) -> _Trial:
        self.layout.run.mkdir(parents=True, mode=0o700)
        self.layout.directory.mkdir(mode=0o700)
        return self

    async def __aexit__(self, *_exc: Any) -> None:
        await end_vm(self.layout, self._keeper)
        if self._keeper is not None:
            self._keeper.close()
        shutil.rmtree(self.layout.directory, ignore_errors=True)

    async def start(self, keeper: Path, argv: list[str], *, deadline_s: float = _DEADLINE_S) -> None:
        """Start it, to be dead in `deadline_s` at the latest."""
        ram = self.layout.ram
        ram.touch()
        await asyncio.to_thread(keepers.launch, keeper, self.layout, ram, argv)
        try:
            self._keeper = Keeper.connect(self.layout)
            await self._keeper.deadline(deadline_s)
        except DriverFailed:
            self._obituary = keepers.read_obituary(self.layout)  # it may have done its work already
            if self._obituary is None:
                raise

    async def death(self) -> Obituary:
        """Return how it ended."""
        if self._obituary is not None:
            return self._obituary
        if self._keeper is None:
            raise DriverFailed("nothing was started", log="")
        return await self._keeper.death

    async def explain(self, error: RecessError) -> RecessError:
        """Return the error with QEMU's last words, if it is dead."""
        obituary = self._obituary or (await last_words(self._keeper) if self._keeper else None)
        if obituary is None:
            return error
        return DriverFailed(f"QEMU does not run here: {obituary.line()}", log=obituary.log)
