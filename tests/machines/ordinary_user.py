"""What a driver does for an ordinary user, played in a process of its own; root becomes that user for it.

A process of its own, not a child by `fork` of the one that tests: threads that hash are gone after a fork, and what
waits for them waits for ever. Everything is imported, and what is closed to that user copied, before the rights go.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import importlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from recess.config import Config, load_config
from recess.drivers.gvisor import GvisorDriver
from recess.drivers.gvisor.runsc import find_runsc
from recess.drivers.qemu import QemuDriver
from recess.machines.contract import DISK_NAME, BootFiles, Driver, RestoreParts, VmSpec
from recess.testing.driver_suite import NO_PAGES, new_thaw, quiet_capture, shell
from recess.testing.qemu_rig import DISK_BYTES, MEMORY_BYTES, QemuHome

NOBODY = 65534
_PLAYER = __name__  # the module that is run for it
# To this host's loopback behind the card: the keeper's filter refuses, which it does without rights.
REFUSED = """import errno, socket
print(errno.errorcode[socket.socket().connect_ex(("10.0.2.2", 22))])"""
_LIMIT_S = 100.0  # below the limit of one test, so that what was said until then is seen


def play_as_nobody(driver: str, images_dir: Path) -> None:
    """Play the story of one driver, "qemu" or "gvisor", without rights. Raises AssertionError with what went wrong."""
    place = Path(tempfile.mkdtemp(prefix="recess-nobody-"))
    run_dir = Path("/dev/shm") / f"recess-nobody-{secrets.token_hex(4)}"
    words = [sys.executable, "-m", _PLAYER, driver, str(images_dir), str(place), str(run_dir)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
        assert done.returncode == 0, done.stderr
        assert not list((run_dir / "m").iterdir())
    finally:
        _end_what_is_left(run_dir)
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(run_dir, ignore_errors=True)


def _end_what_is_left(run_dir: Path) -> None:
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and os.fsencode(run_dir) in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


def main(driver: str, images_dir: Path, place: Path, run_dir: Path) -> None:
    """Copy what the user must read, become that user (if still root), play the story."""
    spec = readable_spec(images_dir, place)
    own = {"runsc_bin": shutil.copy(find_runsc(load_config()), place / "bin" / "runsc")} if driver == "gvisor" else {}
    config = load_config(home=str(place / "home"), run_dir=str(run_dir), bin_dir=str(place / "bin"), **own)
    codecs.lookup("cp437")  # what zip files need; this Python's library may be closed to that user
    codecs.lookup("idna")
    importlib.import_module("numpy.ma")  # numpy imports it when it first needs it
    if os.getuid() == 0:
        for path in (place, *place.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    asyncio.run(gvisors_story(config, spec, place) if driver == "gvisor" else qemus_story(config, spec, place))


def readable_spec(images_dir: Path, place: Path) -> VmSpec:
    home = QemuHome.shared(images_dir)
    (place / "bin").mkdir()
    (place / "m").mkdir()
    shutil.copy(home.config.bin_dir / "keeper", place / "bin" / "keeper")
    boot = home.spec.boot
    copies = {}
    for name in ("kernel", "initrd", "root"):
        copies[name] = Path(shutil.copy(getattr(boot, name), place / name))
    home.blank_disk(place / "m")
    (place / "carded").mkdir()
    home.blank_disk(place / "carded")
    files = BootFiles(copies["kernel"], "k", copies["initrd"], "i", copies["root"], "r")
    return VmSpec(memory_bytes=MEMORY_BYTES, cpus=1, disk_bytes=DISK_BYTES, boot=files)


async def qemus_story(config: Config, spec: VmSpec, place: Path) -> None:
    await nobodys_story(QemuDriver(config), QemuDriver(config), spec, config.run_dir, place)
    driver, carded = QemuDriver(config), replace(spec, network="full")
    vm = await driver.boot("carded", carded, place / "carded")
    await vm.link.thaw(new_thaw())
    assert (
        await shell(vm.link, "cat /etc/resolv.conf; python3 -c '" + REFUSED + "'")
        == "nameserver 10.0.2.3\nEHOSTUNREACH"
    )
    await vm.kill()


async def nobodys_story(driver: Driver, second: Driver, spec: VmSpec, run_dir: Path, place: Path) -> None:
    assert os.getuid() != 0
    vm = await driver.boot("template", spec, place / "m", for_template=True)
    await vm.link.thaw(new_thaw())
    await vm.link.freeze(sync=True)
    ref = await vm.export_template(run_dir / "template")
    fork = await driver.restore("f", spec, RestoreParts(ref, NO_PAGES, NO_PAGES, ref.vmstate.read_bytes()), place / "f")
    await fork.link.thaw(new_thaw())
    await shell(fork.link, "echo mine > /dev/shm/word")
    await fork.detach()
    adopted = await second.adopt("f", place / "f")
    assert adopted is not None
    assert (await adopted.stats()).pss_bytes > 0
    capture = await quiet_capture(adopted, resume=True)
    parts = RestoreParts(ref, capture.memory, capture.disk, capture.vmstate)
    child = await second.restore("r", spec, parts, place / "r")
    await child.link.thaw(new_thaw())
    assert await shell(child.link, "cat /dev/shm/word") == "mine"
    capture.close()
    await adopted.kill()
    await child.kill()


async def gvisors_story(config: Config, spec: VmSpec, place: Path) -> None:
    await nobodys_story(GvisorDriver(config), GvisorDriver(config), spec, config.run_dir, place)
    vm = await GvisorDriver(config).boot("users", spec, blank(place / "users", spec))
    await vm.link.thaw(new_thaw())
    assert await shell(vm.link, "touch /root/x; chown 33:33 /root/x; stat -c %u:%g /root/x") == "33:33"
    assert await shell(vm.link, "setpriv --reuid 1000 --regid 1000 --clear-groups id -u") == "1000"
    await vm.kill()


def blank(directory: Path, spec: VmSpec) -> Path:
    directory.mkdir()
    with (directory / DISK_NAME).open("wb") as disk:
        disk.truncate(spec.disk_bytes)
    return directory


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
