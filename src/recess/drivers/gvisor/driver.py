"""The gVisor driver: the contract's front, over the procedures in this package.

A gVisor machine is a weaker boundary than a VM (the guest's system calls are served by a user-space kernel on the host's own),
has no disk of its own (files are in its memory, and so in every snapshot) and no limit on its memory until a snapshot is
taken. The capabilities say so.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recess.config import Config
from recess.drivers.gvisor import bundle, start
from recess.drivers.gvisor.handles import end_machine
from recess.drivers.gvisor.journal import read_journal
from recess.drivers.gvisor.runsc import CONTAINER, FLAGS, PLATFORM, Runsc, find_runsc, inspect_runsc
from recess.drivers.gvisor.vm import GvisorVm
from recess.drivers.kept.cgroup import Groups, describe
from recess.drivers.kept.layout import layout_for, vms_in
from recess.errors import DriverFailed, MissingTool
from recess.machines.contract import Capabilities, Fingerprint, KeptReady, RestoreParts, VmSpec

_PROBE_TIMEOUT_S = 30.0


class GvisorDriver:
    """Runs machines as machines of the host's `runsc`; see `recess.machines.contract.Driver`."""

    name = "gvisor"
    capabilities = Capabilities(
        snapshot=True, fork=True, live_snapshot=True, own_kernel=False, own_disk=False, isolation="sandbox"
    )

    def __init__(self, config: Config) -> None:
        self._config = config
        self._runsc: Runsc | None = None
        self._inspecting = asyncio.Lock()

    async def probe(self, *, fresh: bool = False) -> Mapping[str, Any]:
        """Say what runs here; `fresh` looks anew and runs a program in a machine."""
        runsc = await self._host(fresh=fresh)
        if fresh:
            await asyncio.to_thread(_try_out, runsc, self._config.bin_dir / "guestd")
        return {
            "driver": self.name,
            "runsc": str(runsc.binary),
            "version": runsc.version,
            "platform": PLATFORM,
            "limits": await asyncio.to_thread(describe, self._config.vmm_limits),
            "user": "root" if os.geteuid() == 0 else "ordinary (user namespace)",
        }

    async def fingerprint(self, spec: VmSpec) -> Fingerprint:
        """Return what a snapshot taken here would carry: an image is only good for the same build and flags."""
        return _fingerprint(await self._host())

    async def boot(self, vm_id: str, spec: VmSpec, directory: Path, *, for_template: bool = False) -> GvisorVm:
        """Start a fresh machine."""
        start.check_spec(spec)
        return GvisorVm(await start.boot(await self._place(vm_id, directory), spec, for_template=for_template))

    async def restore(self, vm_id: str, spec: VmSpec, parts: RestoreParts, directory: Path) -> GvisorVm:
        """Bring a machine back."""
        start.check_spec(spec)
        return GvisorVm(await start.restore(await self._place(vm_id, directory), spec, parts))

    async def adopt(self, vm_id: str, directory: Path) -> GvisorVm | None:
        """Take over a machine of an earlier server."""
        layout = layout_for(self._config.run_dir, vm_id, directory)
        if read_journal(layout) is None:
            await end_machine(layout, None)
            return None
        try:
            place = await self._place(vm_id, directory)
        except MissingTool:
            await end_machine(layout, None)  # its row falls: it must not run on
            raise
        handles = await start.adopt(place)
        return None if handles is None else GvisorVm(handles)

    def list_leftovers(self) -> Sequence[str]:
        """Return the ids whose run folder holds a journal of this driver."""
        return vms_in(self._config.run_dir, {self.name})

    async def kept_ready(self) -> KeptReady:
        """Nothing is kept ready."""
        return KeptReady()

    async def close(self) -> None:
        """There is nothing to let go of."""

    async def _host(self, *, fresh: bool = False) -> Runsc:
        async with self._inspecting:
            if self._runsc is None:
                await asyncio.to_thread(lambda: Groups.find().sweep())
            if self._runsc is None or fresh:
                self._runsc = await asyncio.to_thread(inspect_runsc, find_runsc(self._config))
            return self._runsc

    async def _place(self, vm_id: str, directory: Path) -> start.Place:
        runsc = await self._host()
        keeper = self._config.bin_dir / "keeper"
        if not keeper.is_file():
            raise MissingTool(f"the keeper is not built: {keeper}", hint="run tools/setup.sh")
        layout = layout_for(self._config.run_dir, vm_id, directory)
        limited = self._config.vmm_limits != "off"
        return start.Place(layout, runsc, keeper, _fingerprint(runsc), limited)


def _fingerprint(runsc: Runsc) -> Fingerprint:
    return Fingerprint(
        driver="gvisor",
        driver_version=runsc.version,
        accelerator=PLATFORM,
        cpu_model="host",
        cpu_flags=_cpu_flags(),
        machine_type=" ".join(FLAGS),
        kernel_hash=runsc.digest,  # runsc is the machine's kernel
    )


def _cpu_flags() -> tuple[str, ...]:
    """Return the host's: programs in a machine run on the bare processor and may have chosen their code by them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return tuple(sorted(flags.partition(":")[2].split()))


def _try_out(runsc: Runsc, guestd: Path) -> None:
    """Run one small program in a machine. Raises MissingTool, DriverFailed with what runsc said."""
    if not guestd.is_file():
        raise MissingTool(f"guestd is not built: {guestd}", hint="run tools/setup.sh")
    folder = Path(tempfile.mkdtemp(prefix="recess-runsc-"))
    try:
        (folder / "root").mkdir()
        shutil.copy(guestd, folder / "root" / "guestd")
        content = bundle.trial(folder / "root", user=os.geteuid())
        (folder / "config.json").write_text(json.dumps(content))
        done = subprocess.run(
            runsc.argv(folder / "state", "run", f"--bundle={folder}", CONTAINER),
            stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise DriverFailed(f"runsc does not run here: {exc}", log="") from exc
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if done.returncode or not done.stdout.startswith(b"guestd "):
        log = done.stderr[:4000].decode(errors="replace").strip()
        first = log.splitlines()[0][:300] if log else f"status {done.returncode}"
        raise DriverFailed(f"runsc does not run a program here: {first}", log=log)
