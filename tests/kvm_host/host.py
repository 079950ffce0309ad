"""A host with KVM for tests, where there is none: a machine under QEMU's software emulation whose processor has SVM.

QEMU's TCG emulates AMD's nested virtualisation, so the kernel modules kvm and kvm-amd of Debian's cloud kernel work in
such a machine, and real VMMs run real guests in it, at the speed of emulation twice over. The host is made of Debian
packages by the image builder, starts guestd as its first process, and is spoken to as any machine is.

    DIR/kernel DIR/initrd DIR/root.erofs    the host; kept, made again when what it is made of has changed (DIR/*.made-of)
    DIR/work.ext4                           this repository, its Python packages, images, the binary under test; per run
    (a file without a name)                 swap, sparse: room for large guests; per run

The work disk is mounted at this repository's own path, read-write, and thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recess.config import load_config
from recess.drivers.gvisor.runsc import find_runsc
from recess.errors import MissingTool, RecessError
from recess.guestlink.client import Link, connect
from recess.guestlink.link import ExecRequest, Thaw
from recess.images import debian, kernel, kernel_debian
from recess.images.boot import build_initrd
from recess.images.store import ImageStore

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = (3, 11)  # of the host's Debian, which must be able to use this environment's packages

_PACKAGES = ("e2fsprogs", "procps", "python3", "qemu-system-x86")
# Newer than the release's own: what tells which pages were written (PAGEMAP_SCAN) came with 6.7.
_KERNEL_SOURCE = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm-backports main"
_MODULES = (*kernel_debian.WANTED_MODULES, "kvm_amd")
_RECIPE = 2  # to be raised when the way of making it changes
_WORK_MIB = 1400
# A guest's kernel zeroes all its memory at its first boot, and a template of it is in shared memory for a while: a machine of
# 8 GiB wants twice that of the host. The host's kernel notes pages of zeros that it puts away without writing them anywhere.
_SWAP_BYTES = 24 << 30
# cx16: QEMU 7.2 leaves wrong flags behind the 16-byte compare-and-exchange, and a newer kernel that uses it panics in its
# first allocation. Programs still see it: numpy wants it.
_COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 reboot=t recess.root=/dev/vda recess.rootfs=erofs mitigations=off nokaslr "
    "tsc=reliable no_timer_check lsm=landlock,yama nowatchdog audit=0 cryptomgr.notests clearcpuid=cx16"
)
# A first VM, a first limit on processor time and their last ends switch code of the host's scheduler on and off. The kernel
# does that by a breakpoint instruction for a moment; with a second processor QEMU 7.2 may run that once more when it is gone
# already, which the kernel takes for an invalid one ("int3"), and panics. So one of each is held for as long as the host runs,
# from a moment when there is no second processor. The same holds for KVM's switches for a processor without a local APIC, with
# one that is off, and with one that the guest has not enabled yet, which every boot of a guest has for a moment.
_HELD = """
import fcntl, os, pathlib, signal
others = list(pathlib.Path("/sys/devices/system/cpu").glob("cpu[1-9]*/online"))
for other in others:
    other.write_text("0")
groups = pathlib.Path("/sys/fs/cgroup")
(groups / "cgroup.subtree_control").write_text("+cpu")
(groups / "held").mkdir()
(groups / "held" / "cpu.max").write_text("100000 100000")
kvm, kept = os.open("/dev/kvm", os.O_RDWR), []
for kind in ("none", "off", "not enabled"):
    vm = fcntl.ioctl(kvm, 0xAE01, 0)  # KVM_CREATE_VM
    if kind != "none":
        fcntl.ioctl(vm, 0xAE60, 0)  # KVM_CREATE_IRQCHIP
    cpu = fcntl.ioctl(vm, 0xAE41, 0)  # KVM_CREATE_VCPU
    if kind == "off":
        registers = bytearray(312)
        fcntl.ioctl(cpu, 0x8138AE83, registers)  # KVM_GET_SREGS
        registers[272:280] = bytes(8)  # apic_base
        fcntl.ioctl(cpu, 0x4138AE84, registers)  # KVM_SET_SREGS
    kept += [vm, cpu]
for other in others:
    other.write_text("1")
print("held", flush=True)
signal.pause()
"""
_HELLO_S = 300.0
_END_S = 10.0
# Not needed to run the tests there, and large.
_LEAVE_OUT = (
    "PIL", "pillow*", "matplotlib*", "mpl_toolkits", "fontTools", "fonttools*", "moto*", "boto*", "mypy*", "pip*",
    "*__mypyc*", "ruff*", "__pycache__", "numpy*tests",
)  # fmt: skip


@dataclass(frozen=True)
class KvmHost:
    """A host that is made. `folder` holds its files."""

    folder: Path

    @contextlib.asynccontextmanager
    async def running(self, work: Path, *, memory: str = "3G", cpus: int = 2) -> AsyncIterator[Link]:
        """Boot it with this work disk, mount that, and yield the link; afterwards it is gone."""
        with tempfile.TemporaryDirectory(prefix="kvm-host-") as temp, tempfile.TemporaryFile(dir=self.folder) as swap:
            swap.truncate(_SWAP_BYTES)
            path = Path(temp) / "link"
            joined: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
            joined = asyncio.get_running_loop().create_future()

            def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                if not joined.done():
                    joined.set_result((reader, writer))

            server = await asyncio.start_unix_server(join, str(path))
            with (Path(temp) / "said").open("wb") as said:
                process = await asyncio.create_subprocess_exec(
                    *self._command(work, path, memory, cpus, swap.fileno()), stdin=asyncio.subprocess.DEVNULL, pass_fds=[swap.fileno()],
                    stdout=said, stderr=said, start_new_session=True,
                )  # fmt: skip
            try:
                link = await self._begin(joined)
                yield link
                await link.close()
            except (RecessError, TimeoutError) as exc:
                with contextlib.suppress(TimeoutError):  # a host whose link is cut is about to end
                    await asyncio.wait_for(process.wait(), _END_S)
                ended = f"it ended with {process.returncode}" if process.returncode is not None else "it still runs"
                last = [Path(temp, name).read_text(errors="replace")[-3000:] for name in ("console", "said")]
                raise RuntimeError("\n".join([f"the host: {exc}; {ended}", *last])) from exc
            finally:
                server.close()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()

    @staticmethod
    async def _begin(joined: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> Link:
        """Wait for the host, thaw it and mount the work disk there."""
        async with asyncio.timeout(_HELLO_S):
            reader, writer = await joined
            link = await connect(reader, writer, hello_timeout_s=_HELLO_S)
        name = secrets.token_hex(4)
        thaw = Thaw(time.time_ns(), os.urandom(32), name, 1, f"kvm-{name}", secrets.token_hex(16))
        await link.thaw(thaw, timeout_s=_HELLO_S)
        code = await run(link, f"mkdir -p {REPOSITORY} && mount /dev/vdb {REPOSITORY}")
        assert code == 0, "the work disk could not be mounted"
        swap = f"mkswap /dev/vdc >/dev/null && swapon /dev/vdc && mount -o remount,size={_SWAP_BYTES} /dev/shm"
        assert await run(link, swap) == 0, "there is no room for large guests"
        holder = await link.exec(ExecRequest(["python3", "-c", _HELD]))
        async for _stream, data in holder.output():
            assert data == b"held\n", data
            break
        await holder.detach()
        return link

    def _command(self, work: Path, link: Path, memory: str, cpus: int, swap: int) -> list[str]:
        # Without AVX2, which QEMU 7.2 computes wrongly (drivers/qemu/argv.py): numpy sorted pages into orders that were none.
        out = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        out += ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "EPYC,+svm,-avx2", "-smp", str(cpus), "-m", memory]
        out += ["-M", "q35,usb=off", "-kernel", str(self.folder / "kernel"), "-initrd", str(self.folder / "initrd")]
        out += ["-append", _COMMAND_LINE, "-serial", f"file:{link.with_name('console')}"]
        for name, path, options in (
            ("root", self.folder / "root.erofs", "readonly=on"),
            ("work", work, "cache=unsafe"),
            ("swap", Path(f"/proc/self/fd/{swap}"), "cache=unsafe"),
        ):
            out += ["-drive", f"if=none,id={name},file={path},format=raw,{options}"]
            out += ["-device", f"virtio-blk-pci,drive={name}"]
        out += ["-device", "virtio-serial-pci,id=ports", "-chardev", f"socket,id=link,path={link}"]
        return [*out, "-device", "virtserialport,bus=ports.0,nr=1,chardev=link,name=recess"]


async def run(link: Link, script: str) -> int:
    """Run a shell script there, its output passed on as it comes; return its exit code."""
    job = await link.exec(ExecRequest(["sh", "-c", script]))
    async for _stream, data in job.output():
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    return await job.wait()


def make_host(folder: Path, guestd: Path) -> KvmHost:
    """Return the host, made now where it must be (some minutes, with network). Raises as `recess.images` does.

    Its root comes of Debian packages alone, and is not made again for another guestd.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _unless_made(folder / "root.made-of", repr((_RECIPE, _PACKAGES))) as making:
        if making:
            with tempfile.TemporaryDirectory(dir=folder) as temp:
                work = Path(temp) / "root"
                work.mkdir()
                debian.build_root(_PACKAGES, work, _say).replace(folder / "root.erofs")
    recipe = repr((_RECIPE, _MODULES, hashlib.sha256(guestd.read_bytes()).hexdigest()))
    with _unless_made(folder / "kernel.made-of", recipe) as making:
        if making:
            with tempfile.TemporaryDirectory(dir=folder) as temp:
                _make_kernel(folder, guestd, Path(temp))
            # The guests' own kernel, with the modules that this version of the set-up keeps.
            (folder / "images").mkdir(exist_ok=True)
            kernel_debian.fetch_kernel(folder / "images", _say)
    return KvmHost(folder)


@contextlib.contextmanager
def _unless_made(stamp: Path, recipe: str) -> Iterator[bool]:
    """Yield whether something must be made, because this stamp does not say that it was made of this; then it says so."""
    if stamp.is_file() and stamp.read_text() == recipe:
        yield False
        return
    stamp.unlink(missing_ok=True)
    yield True
    stamp.write_text(recipe)


def _make_kernel(folder: Path, guestd: Path, temp: Path) -> None:
    _name, tar = kernel_debian.fetch_package(temp, _say, source=_KERNEL_SOURCE)
    image, modules, built_in = kernel_debian.read_package(tar, "/kvm/")
    order = kernel.load_order(modules, built_in, _MODULES)
    (folder / "kernel").write_bytes(image)
    numbered = [(f"{number:02}-{name}.ko", modules[name]) for number, name in enumerate(order)]
    (folder / "initrd").write_bytes(build_initrd(guestd.read_bytes(), numbered))


def make_work(host: KvmHost, images_dir: Path, binary: Path | None, target: Path) -> None:
    """Write the work disk: what the tests need of this repository, the Firecracker to be tested (`bin/firecracker`), with its
    jailer if that is beside it, and the runsc of here if there is one."""
    site = Path(sys.prefix) / "lib" / f"python{PYTHON[0]}.{PYTHON[1]}" / "site-packages"
    if sys.version_info[:2] != PYTHON or not site.is_dir():
        raise RuntimeError(f"this environment's Python must be the host's: {PYTHON[0]}.{PYTHON[1]}")
    store = ImageStore(images_dir)
    wanted = [store.ensure_base(), *(store.get(name) for name in os.environ.get("RECESS_KVM_HOST_IMAGES", "").split())]
    with tempfile.TemporaryDirectory(dir=target.parent) as temp:
        top = Path(temp) / "top"
        top.mkdir()
        skip = shutil.ignore_patterns("__pycache__", ".pytest_cache")
        for name in ("src", "agent", "tests", "benchmarks"):
            shutil.copytree(REPOSITORY / name, top / name, symlinks=True, ignore=skip)
        shutil.copy(REPOSITORY / "pyproject.toml", top)
        shutil.copytree(
            site, top / "site", symlinks=True, ignore=shutil.ignore_patterns(*_LEAVE_OUT), copy_function=_link
        )
        images = top / "home" / "images"
        (images / "names").mkdir(parents=True)
        for image in wanted:
            shutil.copy(images_dir / "names" / f"{image.name}.json", images / "names")
            root = Path("roots") / image.root_hash
            shutil.copytree(images_dir / root, images / root, copy_function=_link)
        shutil.copytree(host.folder / "images" / "kernel", images / "kernel", copy_function=_link)
        trimmed = REPOSITORY / "build" / "kernel" / "vmlinux"
        (top / "bin").mkdir()
        if trimmed.is_file():
            shutil.copy(trimmed, top / "bin" / "vmlinux")
        if binary is not None:
            shutil.copy(binary, top / "bin" / "firecracker")
            if binary.with_name("jailer").is_file():
                shutil.copy(binary.with_name("jailer"), top / "bin" / "jailer")
        with contextlib.suppress(MissingTool):
            (top / "home" / "bin").mkdir()
            shutil.copy(find_runsc(load_config()), top / "home" / "bin" / "runsc")
        target.unlink(missing_ok=True)
        size_mib = _WORK_MIB + sum(image.size_bytes >> 20 for image in wanted[1:])
        command = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(top), str(target), f"{size_mib}M"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _link(source: str, target: str) -> None:
    """Copy a file, without its bytes where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def pytest_command(arguments: Sequence[str], **environment: str) -> str:
    """Return the shell command that runs pytest there, in this repository."""
    words = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.kvm_host.patience", *arguments]
    known = {
        "RECESS_TEST_HOME": f"{REPOSITORY}/home",
        "RECESS_RUNSC_BIN": f"{REPOSITORY}/home/bin/runsc",
        "RECESS_HARD": "1",
        "RECESS_HARD_IMAGES": "given",
    }
    return _python_command(words, {**known, **environment})


def bench_command(arguments: Sequence[str], **environment: str) -> str:
    """Return the shell command that runs the benchmark of drivers there: of KVM alone, for in it there is nothing else."""
    patient = (
        "from tests.kvm_host.patience import make_patient; make_patient(); from benchmarks.drivers import main; main()"
    )
    known = {"RECESS_HOME": f"{REPOSITORY}/home", "RECESS_ACCELERATOR": "kvm", **environment}
    return _python_command(["-c", patient, *arguments], known)


def _python_command(words: Sequence[str], environment: Mapping[str, str]) -> str:
    known = {
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/src:{REPOSITORY}/site",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",  # who waits for minutes sees where it is
        "HOME": "/root",
        **environment,
    }
    settings = " ".join(f"{key}={value}" for key, value in known.items())
    return f"cd {REPOSITORY} && env {settings} python3 {shlex.join(words)}"


def _say(line: str) -> None:
    print(f"   {line}", file=sys.stderr)
