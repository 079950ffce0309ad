"""What others do with the same guest and the same work: each peer takes and restores whole-machine snapshots.

A peer that this host does not have is skipped by name, with the reason and how to get it: `Missing`. Each measures, in
seconds and bytes: `standstill` (the workload stands still), `durable` (until the bytes are fsynced), `stored`, `restore` (from
a stopped state until the guest answers). Peers do none of what a thaw does (new randomness, clock, identity).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.bare import Bare, BareVm, Files, kernel_words
from recess.guestlink.client import connect
from recess.guestlink.link import ExecRequest, GuestLink

Samples = dict[str, list[float]]
KEYS = ("standstill", "durable", "stored", "restore")
BETWEEN_S = 1.0  # for the work to change something


class Missing(Exception):
    """This peer cannot be run here. Says why and how to get it."""


async def start_work(link: GuestLink, code: str) -> None:
    """Start a Python program in the guest and wait until it says that it is ready."""
    job = await link.exec(ExecRequest(argv=["python3", "-u", "-c", code], cwd="/root"))
    async for _stream, data in job.output():
        if b"ready" in data:
            break
    await job.detach()


def fsync(path: Path) -> None:
    """Make a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


async def qemu_migrate(files: Files, folder: Path, code: str, repeats: int) -> Samples:
    """QEMU `migrate` to a file: all memory, uncompressed."""
    out: Samples = {key: [] for key in KEYS}
    bare = Bare(files)
    try:
        await bare.make_template()
        vm, _ = await bare.fork()
        await start_work(vm.link, code)
        state = folder / "state"
        for _ in range(repeats):
            await asyncio.sleep(BETWEEN_S)
            began = time.perf_counter()
            out["standstill"].append(await vm.save(state))
            fsync(state)
            out["durable"].append(time.perf_counter() - began)
            out["stored"].append(float(state.stat().st_size))
            child, seconds = await bare.restore(state)
            out["restore"].append(seconds)
            await child.kill()
            for ram in bare.base.glob("ram[0-9]*"):
                ram.unlink()
            state.unlink()
        await vm.kill()
    finally:
        bare.close()
    return out


async def qemu_savevm(files: Files, folder: Path, code: str, repeats: int) -> Samples:
    """QEMU `savevm` into the machine's qcow2 disk, `-loadvm` in a new process."""
    convert = shutil.which("qemu-img")
    if convert is None:
        raise Missing("qemu-img is not installed: apt install qemu-utils")
    out: Samples = {key: [] for key in KEYS}
    disk, ram = folder / "disk.qcow2", folder / "ram"
    await run(convert, "convert", "-f", "raw", "-O", "qcow2", str(files.disk), str(disk))
    for number in range(repeats):
        vm = BareVm(files, folder / f"vm{number}", disk_format="qcow2")
        _blank(ram, files.memory_mib)
        if number == 0:
            await vm.start(ram, share=False, boot=True, disk=disk)
            await vm.ready()
            await start_work(vm.link, code)
        else:
            began = time.perf_counter()
            await vm.start(ram, share=False, boot=False, disk=disk, loadvm=f"s{number - 1}")
            await vm.ready()
            out["restore"].append(time.perf_counter() - began)
            await _monitor(vm, f"delvm s{number - 1}")
        await asyncio.sleep(BETWEEN_S)
        before = disk.stat().st_blocks
        began = time.perf_counter()
        await _monitor(vm, f"savevm s{number}")
        out["standstill"].append(time.perf_counter() - began)
        fsync(disk)
        out["durable"].append(time.perf_counter() - began)
        if number == 0:  # later ones go into the room of those that were deleted
            out["stored"].append((disk.stat().st_blocks - before) * 512.0)
        await vm.kill()
    return out


async def _monitor(vm: BareVm, line: str) -> None:
    said = str(await vm.qmp("human-monitor-command", command_line=line)).strip()
    if said:
        raise RuntimeError(f"{line}: {said}")


def _blank(path: Path, mib: int) -> None:
    with path.open("wb") as file:
        file.truncate(mib << 20)


# --- libvirt ----------------------------------------------------------------------------------------------------------


class Virsh:
    """A libvirt of our own: its daemon in a mount namespace where its folders are ours, and one domain."""

    def __init__(self, files: Files, folder: Path) -> None:
        found = [shutil.which(name) for name in ("virsh", "libvirtd", "unshare")]
        if not all(found):
            need = "libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients"
            raise Missing(f"virsh or libvirtd is not installed: apt install {need}")
        if os.geteuid():
            raise Missing("a libvirt beside the host's own needs root: run the benchmark as root")
        self._virsh, self._libvirtd, self._unshare = map(str, found)
        self._files, self._folder = files, folder

    def _prepare(self) -> str:
        """Make our folders; return the script that puts them in the place of the host's and becomes the daemon."""
        mounts = []
        for name, place in (("etc", "/etc/libvirt"), ("var", "/var/lib/libvirt"), ("run", "/run/libvirt")):
            (self._folder / name).mkdir()
            Path(place).mkdir(parents=True, exist_ok=True)
            mounts.append(f"mount --bind {self._folder / name} {place}")
        # Its QEMU runs as we do, on our files, and owns none of them.
        lines = (
            'user = "root"',
            'group = "root"',
            "dynamic_ownership = 0",
            'stdio_handler = "file"',
            'security_driver = "none"',
        )
        (self._folder / "etc" / "qemu.conf").write_text("\n".join((*lines, "cgroup_controllers = []", "")))
        # The user that Debian's libvirt-daemon-system would add: libvirtd insists that there is one, whatever qemu.conf says.
        for name, line in (
            ("passwd", "libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin"),
            ("group", "libvirt-qemu:x:64055:"),
        ):
            known = Path("/etc", name).read_text()
            own = self._folder / name
            own.write_text(known if "\nlibvirt-qemu:" in known else f"{known.rstrip()}\n{line}\n")
            mounts.append(f"mount --bind {own} /etc/{name}")
        return " && ".join((*mounts, f"exec {self._libvirtd}"))

    async def __aenter__(self) -> Virsh:
        """Start the daemon and listen for the guest."""
        script = self._prepare()
        self._links: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self._server = await asyncio.start_unix_server(self._on_link, self._folder / "link")
        with (self._folder / "libvirtd.log").open("wb") as log:
            self._daemon = await asyncio.create_subprocess_exec(
                self._unshare, "--mount", "--propagation", "private", "sh", "-c", script, stdout=log, stderr=log
            )
        for _ in range(100):
            with contextlib.suppress(RuntimeError):
                await self("uri")
                return self
            await asyncio.sleep(0.1)
        said = (self._folder / "libvirtd.log").read_text()[-300:]
        await self.__aexit__()
        raise Missing(f"libvirtd does not answer: {said}")

    async def __aexit__(self, *_: object) -> None:
        """End domain and daemon."""
        with contextlib.suppress(RuntimeError):
            await self("destroy", "recess-bench")
        with contextlib.suppress(ProcessLookupError):
            self._daemon.terminate()
        await self._daemon.wait()
        self._server.close()

    async def _on_link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.put_nowait((reader, writer))

    async def __call__(self, *words: str) -> None:
        """Run one virsh command. Raises RuntimeError with what it said."""
        address = f"qemu+unix:///system?socket={self._folder / 'run' / 'libvirt-sock'}"
        await run(self._virsh, "-q", "-c", address, *words)

    async def link(self) -> GuestLink:
        """Return the link of the guest that connected last."""
        reader, writer = await asyncio.wait_for(self._links.get(), 120)
        link = await connect(reader, writer, hello_timeout_s=120)
        await link.ping()
        return link

    def saved(self) -> Path:
        """Return the file that managedsave wrote."""
        return self._folder / "var" / "qemu" / "save" / "recess-bench.save"

    def xml(self, disk: Path) -> str:
        """Return the domain: the same kernel, initrd, root, disk and channel; `pc`, libvirt has no microvm."""
        f = self._files
        drives = "".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='raw' {more}/><source file='{path}'/>"
            f"<target dev='{name}' bus='virtio'/>{'<readonly/>' if name == 'vda' else ''}</disk>"
            for path, name, more in ((f.root, "vda", ""), (disk, "vdb", "cache='unsafe'"))
        )
        return (
            f"<domain type='qemu'><name>recess-bench</name><memory unit='MiB'>{f.memory_mib}</memory><vcpu>1</vcpu>"
            f"<os><type arch='x86_64' machine='pc'>hvm</type><kernel>{f.kernel}</kernel><initrd>{f.initrd}</initrd>"
            f"<cmdline>{kernel_words(f.tsc_khz)}</cmdline></os><features><acpi/></features><cpu mode='maximum'/>"
            f"<on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><devices><emulator>{f.qemu}</emulator>"
            f"{drives}<channel type='unix'><source mode='connect' path='{self._folder / 'link'}'/>"
            "<target type='virtio' name='recess'/></channel><memballoon model='none'/>"
            f"<serial type='file'><source path='{self._folder / 'console'}'/></serial></devices>"
            "<seclabel type='none'/></domain>"
        )


async def virsh_managedsave(files: Files, folder: Path, code: str, repeats: int) -> Samples:
    """`virsh managedsave` and `virsh start`: libvirt's way, all memory, uncompressed by default."""
    out: Samples = {key: [] for key in KEYS}
    disk, xml = folder / "disk", folder / "domain.xml"
    async with Virsh(files, folder) as virsh:
        await run("cp", "--sparse=always", str(files.disk), str(disk))
        xml.write_text(virsh.xml(disk))
        await virsh("define", str(xml))
        await virsh("start", "recess-bench")
        link = await virsh.link()
        await start_work(link, code)
        for _ in range(repeats):
            await asyncio.sleep(BETWEEN_S)
            await link.close()
            began = time.perf_counter()
            await virsh("managedsave", "recess-bench")
            out["standstill"].append(time.perf_counter() - began)  # it runs again only after a restore
            fsync(virsh.saved())
            out["durable"].append(time.perf_counter() - began)
            out["stored"].append(float(virsh.saved().stat().st_blocks * 512))
            began = time.perf_counter()
            await virsh("start", "recess-bench")
            link = await virsh.link()
            out["restore"].append(time.perf_counter() - began)
        await link.close()
        await virsh("destroy", "recess-bench")
        await virsh("undefine", "recess-bench")
    return out


# --- gVisor -----------------------------------------------------------------------------------------------------------


async def runsc_save(files: Files, folder: Path, code: str, repeats: int) -> Samples:
    """`runsc checkpoint --leave-running` and `runsc restore`: the same root and work, in a container without a kernel
    of its own."""
    binary = os.environ.get("RECESS_RUNSC_BIN") or _home_runsc() or shutil.which("runsc")
    extract = shutil.which("fsck.erofs")
    if binary is None or extract is None:
        raise Missing("runsc is not installed: tools/runsc.sh, and apt install erofs-utils")
    root, bundle = folder / "root", folder / "bundle"
    await run(extract, f"--extract={root}", str(files.root))
    bundle.mkdir()
    (bundle / "config.json").write_text(json.dumps(_bundle(root, code)))
    runsc = [binary, f"--root={folder / 'state'}", "--platform=systrap", "--network=none", "--overlay2=none"]
    runsc += ["--ignore-cgroups"]
    out: Samples = {key: [] for key in KEYS}
    names: list[str] = []

    async def start(name: str, *words: str) -> asyncio.subprocess.Process:
        # Through a file and not a pipe: the container inherits it, and it would never be closed.
        names.append(name)
        with (folder / f"{name}.out").open("wb") as said:
            return await asyncio.create_subprocess_exec(
                *runsc, *words, f"--bundle={bundle}", name, stdin=asyncio.subprocess.DEVNULL, stdout=said, stderr=said
            )

    processes = [await start("work", "run")]
    try:
        await _until(folder / "work.out", b"ready", 180)
        for number in range(repeats):
            await asyncio.sleep(BETWEEN_S)
            image = folder / f"image{number}"
            began = time.perf_counter()
            await run(*runsc, "checkpoint", "--leave-running", f"--image-path={image}", "work")
            out["standstill"].append(time.perf_counter() - began)
            for part in image.iterdir():
                fsync(part)
            out["durable"].append(time.perf_counter() - began)
            out["stored"].append(float(sum(part.stat().st_blocks * 512 for part in image.iterdir())))
            began = time.perf_counter()
            processes.append(await start(f"r{number}", "restore", f"--image-path={image}"))
            await _answers([*runsc, "exec", f"r{number}", "/bin/true"])
            out["restore"].append(time.perf_counter() - began)
            await run(*runsc, "delete", "-force", f"r{number}")
            names.remove(f"r{number}")
            shutil.rmtree(image)
    finally:
        for name in names:
            with contextlib.suppress(RuntimeError):
                await run(*runsc, "delete", "-force", name)
        for process in processes:
            await process.wait()
    return out


def _home_runsc() -> str | None:
    from recess.config import load_config

    return shutil.which(str(load_config().home / "bin" / "runsc"))


def _bundle(root: Path, code: str) -> dict[str, object]:
    kinds = ("pid", "network", "ipc", "uts", "mount")
    tmpfs = [{"destination": d, "type": "tmpfs", "source": "tmpfs"} for d in ("/dev", "/tmp", "/root")]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": ["python3", "-u", "-c", code], "cwd": "/root",
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        },
        "root": {"path": str(root), "readonly": True},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}, *tmpfs],
        "linux": {"namespaces": [{"type": kind} for kind in kinds]},
    }  # fmt: skip


async def _until(log: Path, text: bytes, seconds: float) -> None:
    """Wait for a text in a program's output."""
    end = time.monotonic() + seconds
    while text not in (said := await asyncio.to_thread(log.read_bytes)):
        if time.monotonic() > end:
            raise RuntimeError(f"it did not begin: {said[-300:]!r}")
        await asyncio.sleep(0.01)


async def _answers(argv: list[str]) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            await run(*argv)
            return
        except RuntimeError:
            if time.monotonic() > end:
                raise


async def run(*argv: str) -> None:
    """Run a program to its end. Raises RuntimeError with what it said."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{Path(argv[0]).name} {' '.join(argv[1:])[:80]}: {said.decode(errors='replace')[-300:]}")


Measure = Callable[[Files, Path, str, int], Awaitable[Samples]]
PEERS: dict[str, Measure] = {
    "QEMU migrate to a file": qemu_migrate,
    "QEMU savevm / loadvm": qemu_savevm,
    "virsh managedsave / start": virsh_managedsave,
    " ".join(("runsc", "checkpoint", "/ restore")): runsc_save,
}


async def measure_peers(
    files: Files, folder: Path, code: str, repeats: int, wanted: list[str]
) -> AsyncIterator[tuple[str, Samples | str]]:
    """Yield each peer's name with its samples, or with why it was skipped. One that fails is skipped, too, and says why."""
    for name, measure in PEERS.items():
        if wanted and not any(one in name for one in wanted):
            continue
        print(f"peer: {name}", file=sys.stderr, flush=True)
        own = folder / name.partition(" ")[0].lower() / str(list(PEERS).index(name))
        own.mkdir(parents=True)
        try:
            yield name, await measure(replace(files), own, code, repeats)  # a bare template changes its copy
        except Missing as why:
            yield name, f"skipped: {why}"
        except (RuntimeError, OSError, TimeoutError) as why:
            yield name, f"failed: {why!r}"
        finally:
            shutil.rmtree(own, ignore_errors=True)
