"""The bare alternative: QEMU driven by hand, with nothing of Recess but the files it boots and guestd's ping.

No keeper, no layers, no dirty tracking, no thaw: QEMU's own `migrate` writes all memory while the machine stands
still, and its own `-incoming` reads it back. This is what a careful user would script, and what our figures are
compared with. Works with QEMU 7.2 and later.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recess.guestlink.client import connect

_MACHINE = "microvm,acpi=on,pit=on,pic=off,rtc=on,isa-serial=on,pcie=off,usb=off,memory-backend=ram0"


@dataclass(frozen=True)
class Files:
    """What the bare QEMU starts from: the same files as ours."""

    qemu: str
    kernel: Path
    initrd: Path
    root: Path
    disk: Path  # pristine, sparse
    memory_mib: int
    tsc_khz: int


def kernel_words(tsc_khz: int) -> str:
    """Return the guest kernel's command line, as ours is."""
    return (
        "console=ttyS0 quiet panic=-1 reboot=t recess.root=/dev/vda recess.rootfs=erofs recess.disk=/dev/vdb "
        "init_on_free=1 init_on_alloc=0 mitigations=off random.trust_cpu=on tsc=reliable no_timer_check "
        f"tsc_early_khz={tsc_khz} nokaslr cryptomgr.notests audit=0 psi=0 lsm=landlock nowatchdog"
    )


class BareVm:
    """One QEMU process and its two sockets."""

    def __init__(self, files: Files, folder: Path, *, disk_format: str = "raw") -> None:
        self.files, self.folder, self._disk_format = files, folder, disk_format
        self.raw_port = folder / "raw"  # the host's end of a port that nobody in the guest has open
        self._links: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def start(self, ram: Path, *, share: bool, boot: bool, loadvm: str = "", disk: Path | None = None) -> None:
        """Start QEMU: cold boot, waiting for its state (`-incoming defer`), or from a snapshot `loadvm` in its `disk`."""
        f = self.files
        self.folder.mkdir(parents=True)
        if disk is None:
            disk = self.folder / "disk"
            await asyncio.to_thread(_sparse_copy, f.disk, disk)
        self._server = await asyncio.start_unix_server(self._on_link, self.folder / "link")
        qmp = self.folder / "qmp"
        argv = [
            f.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", "tcg,thread=multi",
            "-cpu", "max", "-smp", "1", "-m", f"{f.memory_mib}M", "-M", _MACHINE,
            "-object", f"memory-backend-file,id=ram0,size={f.memory_mib}M,mem-path={ram},share={'on' if share else 'off'}",
            "-serial", f"file:{self.folder / 'console'}",
            "-drive", f"file={f.root},format=raw,if=none,id=d0,readonly=on,file.locking=off",
            "-device", "virtio-blk-device,drive=d0",
            "-drive", f"file={disk},format={self._disk_format},if=none,id=d1,file.locking=off,cache=unsafe",
            "-device", "virtio-blk-device,drive=d1",
            "-chardev", f"socket,id=link,path={self.folder / 'link'}", "-device", "virtio-serial-device",
            "-device", "virtserialport,nr=1,chardev=link,name=recess",
            "-chardev", f"socket,id=raw,path={self.raw_port},server=on,wait=off",
            "-device", "virtserialport,nr=2,chardev=raw,name=raw",
            "-qmp", f"unix:{qmp},server=on,wait=off",
        ]  # fmt: skip
        if boot:
            words = kernel_words(f.tsc_khz)
            argv += ["-kernel", str(f.kernel), "-initrd", str(f.initrd), "-append", words]
        elif loadvm:
            argv += ["-loadvm", loadvm]
        else:
            argv += ["-S", "-incoming", "defer"]
        self._log = (self.folder / "log").open("wb")
        self.process = await asyncio.create_subprocess_exec(*argv, stdout=self._log, stderr=self._log)
        for _ in range(2000):
            with contextlib.suppress(OSError):
                self._qr, self._qw = await asyncio.open_unix_connection(qmp, limit=1 << 20)
                break
            await asyncio.sleep(0.002)
        await self._qr.readline()
        await self.qmp("qmp_capabilities")

    async def _on_link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.put_nowait((reader, writer))

    async def qmp(self, command: str, **arguments: Any) -> Any:
        """Run one QMP command."""
        body = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        self._qw.write(json.dumps(body).encode() + b"\n")
        while True:
            answer = json.loads(await self._qr.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    async def wait_migrated(self) -> None:
        """Wait for a migration, in or out."""
        while True:
            status = (await self.qmp("query-migrate")).get("status")
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                raise RuntimeError(f"migration {status}: {(self.folder / 'log').read_text()[-300:]}")
            await asyncio.sleep(0.001)

    async def ready(self) -> None:
        """Wait until guestd answers a ping."""
        reader, writer = await asyncio.wait_for(self._links.get(), 60)
        self.link = await connect(reader, writer, hello_timeout_s=60)
        await self.link.ping()

    async def load(self, state: Path) -> None:
        """Load a state file and let the machine run."""
        await self.qmp("migrate-incoming", uri=f"exec:cat {state}")
        await self.wait_migrated()
        await self.qmp("cont")

    async def save(self, state: Path, *, ignore_shared: bool = False) -> float:
        """Write the whole state while the machine stands still; return the standstill in seconds."""
        caps = [{"capability": "x-ignore-shared", "state": ignore_shared}]
        await self.qmp("migrate-set-capabilities", capabilities=caps)
        await self.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
        started = time.perf_counter()
        await self.qmp("stop")
        await self.qmp("migrate", uri=f"exec:cat > {state}")
        await self.wait_migrated()
        await self.qmp("cont")
        return time.perf_counter() - started

    def pss_bytes(self) -> int:
        """Return the process's proportional set size."""
        for line in Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
        return 0

    async def kill(self) -> None:
        """End it and remove its folder."""
        if hasattr(self, "link"):
            await self.link.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        self._qw.close()
        self._server.close()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _sparse_copy(source: Path, target: Path) -> None:
    """Copy data extents only, as `cp --sparse` does."""
    with source.open("rb") as src, target.open("wb") as dst:
        end = os.fstat(src.fileno()).st_size
        dst.truncate(end)
        at = 0
        while at < end:
            try:
                at = os.lseek(src.fileno(), at, os.SEEK_DATA)
            except OSError:
                return
            stop = os.lseek(src.fileno(), at, os.SEEK_HOLE)
            os.lseek(dst.fileno(), at, os.SEEK_SET)
            os.lseek(src.fileno(), at, os.SEEK_SET)
            while at < stop:
                at += os.sendfile(dst.fileno(), src.fileno(), None, stop - at)


class Bare:
    """A bare template (memory file and state file in shared memory) and what can be done with it."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.base = Path(tempfile.mkdtemp(prefix="bare-", dir="/dev/shm"))
        self.ram, self.state = self.base / "ram", self.base / "state"
        self._count = 0

    def vm(self) -> BareVm:
        """Return a VM that is not started."""
        self._count += 1
        return BareVm(self.files, self.base / f"vm{self._count}")

    async def make_template(self) -> None:
        """Boot once, keep memory file, device state and disk."""
        vm = self.vm()
        await vm.start(self.ram, share=True, boot=True)
        await vm.ready()
        await vm.save(self.state, ignore_shared=True)
        await vm.qmp("stop")
        await asyncio.to_thread(_sparse_copy, vm.folder / "disk", self.base / "disk")
        object.__setattr__(self.files, "disk", self.base / "disk")
        await vm.kill()

    async def fork(self) -> tuple[BareVm, float]:
        """Start a fork of the template; return it and the seconds until guestd answered."""
        started = time.perf_counter()
        vm = self.vm()
        await vm.start(self.ram, share=False, boot=False)
        await vm.qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        await vm.load(self.state)
        await vm.ready()
        return vm, time.perf_counter() - started

    async def restore(self, state: Path) -> tuple[BareVm, float]:
        """Start a VM from a whole state file (all memory in it)."""
        started = time.perf_counter()
        vm = self.vm()
        ram = self.base / f"ram{self._count}"
        with ram.open("wb") as f:
            f.truncate(self.files.memory_mib << 20)
        await vm.start(ram, share=False, boot=False)
        await vm.load(state)
        await vm.ready()
        return vm, time.perf_counter() - started

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.base, ignore_errors=True)
