"""The Firecracker driver: the contract's front, over the procedures in this package."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recess.config import Config
from recess.drivers.firecracker import start
from recess.drivers.firecracker.handles import end_machine
from recess.drivers.firecracker.host import HostFacts, read_host, run_tiny_guest
from recess.drivers.firecracker.jail import JAIL_FOLDER, jail_of
from recess.drivers.firecracker.journal import read_journal
from recess.drivers.firecracker.vm import FirecrackerVm
from recess.drivers.kept.cgroup import Groups, describe
from recess.drivers.kept.keeper import end_vm
from recess.drivers.kept.layout import layout_for, vms_in
from recess.drivers.kept.vm import hello_timeout_s
from recess.errors import DriverFailed, MissingTool
from recess.machines.contract import Capabilities, Fingerprint, KeptReady, RestoreParts, VmSpec

BOOT_TIMEOUT_S = 120.0
MACHINE_TYPE = "firecracker-mmio"


class FirecrackerDriver:
    """Runs VMs on the user's Firecracker; see `recess.machines.contract.Driver`. The host is looked at on first use."""

    name = "firecracker"
    capabilities = Capabilities(snapshot=True, fork=True, live_snapshot=True, dirty_tracking=True, lazy_memory=True)

    def __init__(self, config: Config, *, boot_timeout_s: float = BOOT_TIMEOUT_S) -> None:
        self._config = config
        self._boot_timeout_s = boot_timeout_s
        self._facts: HostFacts | None = None
        self._looking = asyncio.Lock()

    @classmethod
    def from_config(cls, config: Config) -> FirecrackerDriver:
        """Return the driver as a node uses it."""
        return cls(config)

    async def probe(self, *, fresh: bool = False) -> Mapping[str, Any]:
        """Say what is known of this host; `fresh` looks anew and runs a tiny guest."""
        facts = await self._host(fresh=fresh)
        if fresh:
            verdict = await run_tiny_guest(self._config, facts)
            if verdict:
                raise DriverFailed(
                    f"Firecracker runs no guests here: {verdict}", hint="RECESS_DRIVER=qemu", log=verdict
                )
        return {
            "driver": self.name,
            "firecracker": str(facts.binary),
            "version": facts.version_text,
            "accelerator": "kvm",
            "jail": "none: " + facts.no_jail if facts.no_jail else "jailer, a user id of its own for each VM",
            "limits": await asyncio.to_thread(describe, self._config.vmm_limits),
            "why": "it ran a guest" if fresh else "it is the only one that Firecracker has",
        }

    async def fingerprint(self, spec: VmSpec) -> Fingerprint:
        """Return what a snapshot taken here would carry."""
        return self._fingerprint(await self._host(), spec)

    async def boot(self, vm_id: str, spec: VmSpec, directory: Path, *, for_template: bool = False) -> FirecrackerVm:
        """Cold-boot."""
        start.check_spec(spec)
        place = await self._place(vm_id, spec, directory)
        return FirecrackerVm(await start.boot(place, spec, for_template=for_template))

    async def restore(self, vm_id: str, spec: VmSpec, parts: RestoreParts, directory: Path) -> FirecrackerVm:
        """Bring a VM back."""
        start.check_spec(spec)
        place = await self._place(vm_id, spec, directory)
        return FirecrackerVm(await start.restore(place, spec, parts))

    async def adopt(self, vm_id: str, directory: Path) -> FirecrackerVm | None:
        """Take over a VM of an earlier server."""
        layout = layout_for(self._config.run_dir, vm_id, directory)
        journal = read_journal(layout)
        if journal is None:
            await end_vm(layout, None)
            shutil.rmtree(layout.directory / JAIL_FOLDER, ignore_errors=True)
            return None
        try:
            place = await self._place(vm_id, journal.spec, directory)
        except MissingTool:
            jail = jail_of(Path(journal.jailed), layout) if journal.jailed else None
            await end_machine(layout, None, jail, journal.group)
            raise  # its row falls: it must not run on
        handles = await start.adopt(place, journal)
        return None if handles is None else FirecrackerVm(handles)

    def list_leftovers(self) -> Sequence[str]:
        """Return the ids whose run folder holds a journal of this driver."""
        return vms_in(self._config.run_dir, {self.name})

    async def kept_ready(self) -> KeptReady:
        """Nothing is kept started for restores to come."""
        return KeptReady()

    async def close(self) -> None:
        """Nothing to let go of: there is nobody's machine here."""

    async def _host(self, *, fresh: bool = False) -> HostFacts:
        async with self._looking:
            if self._facts is None:
                await asyncio.to_thread(lambda: Groups.find().sweep())
            if self._facts is None or fresh:
                self._facts = await asyncio.to_thread(read_host, self._config)
            return self._facts

    def _fingerprint(self, facts: HostFacts, spec: VmSpec) -> Fingerprint:
        return Fingerprint(
            driver=self.name,
            driver_version=facts.version_text,
            accelerator="kvm",
            cpu_model=facts.cpu_model,
            cpu_flags=facts.cpu_flags,
            machine_type=MACHINE_TYPE,
            kernel_hash=spec.boot.kernel_hash,
        )

    async def _place(self, vm_id: str, spec: VmSpec, directory: Path) -> start.Place:
        facts = await self._host()
        return start.Place(
            layout=layout_for(self._config.run_dir, vm_id, directory),
            host=facts,
            fingerprint=self._fingerprint(facts, spec),
            hello_timeout_s=hello_timeout_s(self._boot_timeout_s, spec.memory_bytes),
            limited=self._config.vmm_limits != "off",
        )
