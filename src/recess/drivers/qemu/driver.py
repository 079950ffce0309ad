"""The QEMU driver: the contract's front, over the procedures in this package."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recess.config import Config
from recess.drivers.kept.cgroup import Groups, describe
from recess.drivers.kept.keeper import end_vm
from recess.drivers.kept.layout import layout_for, vms_in
from recess.drivers.kept.vm import hello_timeout_s
from recess.drivers.qemu import start
from recess.drivers.qemu.argv import CPU_MODEL, MACHINE_TYPE
from recess.drivers.qemu.card import OFF, card_of
from recess.drivers.qemu.host import HostFacts, find_tools, host_facts, run_tiny_guest
from recess.drivers.qemu.journal import read_journal
from recess.drivers.qemu.pool import WarmPool
from recess.drivers.qemu.pool_member import start_member, sweep
from recess.drivers.qemu.vm import QemuVm
from recess.errors import DriverFailed, MissingTool
from recess.machines.contract import Capabilities, Fingerprint, KeptReady, RestoreParts, VmSpec

BOOT_TIMEOUT_S = 120.0
TB_MIB = 32  # of small programs: 32 to 256 measured, the same speed, and 32 keeps 20 MB less of a busy VM resident


class QemuDriver:
    """Runs VMs on the host's QEMU; see `recess.machines.contract.Driver`. The host is inspected on first use.

    `tb_mib` is the least size of TCG's translation cache in MiB. `devices_command` False makes the driver do without
    QEMU's `xen-save-devices-state`, as it must where that is missing.
    """

    name = "qemu"
    capabilities = Capabilities(
        snapshot=True,
        fork=True,
        live_snapshot=True,
        dirty_tracking=True,
        lazy_memory=True,
        mapped_memory=True,
        early_start=True,
    )

    def __init__(
        self,
        config: Config,
        *,
        tb_mib: int = TB_MIB,
        devices_command: bool = True,
        boot_timeout_s: float = BOOT_TIMEOUT_S,
    ) -> None:
        self._config = config
        self.capabilities = dataclasses.replace(self.capabilities, network_full=config.network_cards != OFF)
        self._tb_mib = tb_mib
        self._devices_command = devices_command
        self._boot_timeout_s = boot_timeout_s
        self._facts: HostFacts | None = None
        self._pool: WarmPool | None = None
        self._inspecting = asyncio.Lock()

    @classmethod
    def from_config(cls, config: Config) -> QemuDriver:
        """Return the driver as a node uses it."""
        return cls(config)

    async def probe(self, *, fresh: bool = False) -> Mapping[str, Any]:
        """Say what is known of this host; `fresh` inspects it anew and runs a tiny guest on the chosen accelerator."""
        facts = await self._host(fresh=fresh)
        if fresh:
            binary, keeper = find_tools(self._config)
            verdict = await run_tiny_guest(self._config, binary, keeper, facts.qemu.accelerator)
            if verdict:
                raise DriverFailed(f"QEMU does not run guests here: {verdict}", hint="see recess doctor", log=verdict)
        return {
            "driver": self.name,
            "qemu": str(facts.qemu.binary),
            "version": facts.version,
            "accelerator": facts.qemu.accelerator,
            "why": facts.why,
            "device_state": "command" if facts.qemu.devices_command else "migration",
            "tsc_khz": facts.tsc_khz,
            "network_cards": self._config.network_cards
            if facts.qemu.cards
            else "none: this QEMU has no network for them",
            "limits": await asyncio.to_thread(describe, self._config.vmm_limits),
        }

    async def fingerprint(self, spec: VmSpec) -> Fingerprint:
        """Return what a snapshot taken here would carry. Raises Unsupported for a network card that cannot be had here, so
        that nothing is made for it first."""
        facts = await self._host()
        card_of(spec, self._config.network_cards, able=facts.qemu.cards)
        return self._fingerprint(facts, spec)

    async def boot(self, vm_id: str, spec: VmSpec, directory: Path, *, for_template: bool = False) -> QemuVm:
        """Cold-boot."""
        start.check_spec(spec)
        place = await self._place(vm_id, spec, directory)
        return QemuVm(await start.boot(place, spec, for_template=for_template))

    async def restore(self, vm_id: str, spec: VmSpec, parts: RestoreParts, directory: Path) -> QemuVm:
        """Bring a VM back."""
        start.check_spec(spec)
        place = await self._place(vm_id, spec, directory)
        return QemuVm(await start.restore(place, spec, parts, await self._warm_pool()))

    async def adopt(self, vm_id: str, directory: Path) -> QemuVm | None:
        """Take over a VM of an earlier server."""
        layout = layout_for(self._config.run_dir, vm_id, directory)
        journal = read_journal(layout)
        if journal is None:
            await end_vm(layout, None)
            return None
        try:
            place = await self._place(vm_id, journal.spec, directory)
        except MissingTool:
            await end_vm(layout, None)  # its row falls: it must not run on
            raise
        handles = await start.adopt(place)
        return None if handles is None else QemuVm(handles)

    def list_leftovers(self) -> Sequence[str]:
        """Return the ids that have a run folder; one whose start did not get as far as a journal is of this driver."""
        return vms_in(self._config.run_dir, {self.name, ""})

    async def kept_ready(self) -> KeptReady:
        """Say what the warm pool holds."""
        return (await self._warm_pool()).about()

    async def close(self) -> None:
        """End the VMs that wait for the next restore."""
        if self._pool is not None:
            await self._pool.close()

    async def resize_pool(self, limit: int) -> None:
        """Have at most this many VMs wait for the next restores from now on; 0 ends them."""
        await (await self._warm_pool()).resize(limit)

    async def pool_settled(self) -> None:
        """Return when as many VMs wait as demand and memory allow."""
        await (await self._warm_pool()).settled()

    async def _warm_pool(self) -> WarmPool:
        async with self._inspecting:
            if self._pool is None:
                await asyncio.to_thread(sweep, self._config.run_dir)
                await asyncio.to_thread(lambda: Groups.find().sweep())
                self._pool = WarmPool(self._config.warm_pool_max, start_member)
            return self._pool

    async def _host(self, *, fresh: bool = False) -> HostFacts:
        async with self._inspecting:
            if self._facts is None or fresh:
                facts = await host_facts(self._config, tb_mib=self._tb_mib, fresh=fresh)
                if not self._devices_command:
                    facts = dataclasses.replace(facts, qemu=dataclasses.replace(facts.qemu, devices_command=False))
                self._facts = facts
                can = facts.qemu.cards and self._config.network_cards != OFF
                self.capabilities = dataclasses.replace(self.capabilities, network_full=can)
            return self._facts

    def _fingerprint(self, facts: HostFacts, spec: VmSpec) -> Fingerprint:
        return Fingerprint(
            driver=self.name,
            driver_version=facts.version,
            accelerator=facts.qemu.accelerator,
            cpu_model=CPU_MODEL,
            cpu_flags=facts.cpu_flags,
            machine_type=MACHINE_TYPE,
            kernel_hash=spec.boot.kernel_hash,
        )

    async def _place(self, vm_id: str, spec: VmSpec, directory: Path) -> start.Place:
        facts = await self._host()
        return start.Place(
            layout=layout_for(self._config.run_dir, vm_id, directory),
            host=facts,
            keeper_binary=find_tools(self._config)[1],
            fingerprint=self._fingerprint(facts, spec),
            hello_timeout_s=hello_timeout_s(self._boot_timeout_s, spec.memory_bytes),
            page_tracking=self._config.page_tracking,
            cards=self._config.network_cards,
            limited=self._config.vmm_limits != "off",
        )
