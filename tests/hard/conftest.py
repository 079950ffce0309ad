"""Hard guests: other people's programs, frozen in the middle of their work. They need images of their own (minutes to build,
1.5 GB) and minutes under emulation, so `make hard` runs them, and the soak does; without it they are not collected."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from recess.config import load_config
from recess.drivers.gvisor.runsc import find_runsc
from recess.errors import NotFound
from recess.images import ImageStore
from recess.node.local import LocalNode
from recess.testing.firecracker_rig import why_no_firecracker
from recess.testing.gvisor_rig import has_runsc
from tests.conftest import left_processes

PACKAGES = {
    "hard": ("ffmpeg", "nodejs", "postgresql", "vim", "procps"),
    "browser": ("chromium", "procps"),
}

collect_ignore_glob = [] if os.environ.get("RECESS_HARD") else ["test_*.py"]


@pytest.fixture(scope="session")
def hard_images(images_dir: Path) -> Path:
    """The folder of images, with those of the hard guests; in the emulated host, with those that it was given."""
    if os.environ.get("RECESS_HARD_IMAGES") == "given":
        return images_dir
    store = ImageStore(images_dir)
    for name, packages in PACKAGES.items():
        try:
            store.get(name)
        except NotFound:
            store.create(name, packages, print)
    return images_dir


@pytest.fixture(params=["gvisor", "qemu", "firecracker"])
def driver(request: pytest.FixtureRequest) -> str:
    """Each driver that may be had here; `RECESS_HARD_DRIVERS` names fewer."""
    name = str(request.param)
    if name not in os.environ.get("RECESS_HARD_DRIVERS", name).split(","):
        pytest.skip("not asked for")
    if name == "gvisor" and not has_runsc():
        pytest.skip("runsc is not installed")
    if name == "firecracker" and (why := why_no_firecracker()):
        pytest.skip(why)
    return name


@pytest.fixture
def run_base() -> Path:
    """Where the run folder is made, and so where a VM's memory is at its first boot."""
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")


@pytest.fixture
async def node(hard_images: Path, tmp_path: Path, run_base: Path) -> AsyncIterator[LocalNode]:
    """A node on a fresh home; nothing is left of it."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(hard_images)
    run_dir = run_base / f"recess-h-{secrets.token_hex(4)}"
    user = load_config()
    tools = {
        "runsc_bin": str(find_runsc(user)) if has_runsc() else "",
        "firecracker_bin": user.firecracker_bin,
        "kernel": user.kernel,
    }
    opened = await LocalNode.open(
        load_config({}, home=str(home), run_dir=str(run_dir), driver="qemu", **tools), progress=print
    )
    try:
        yield opened
    finally:
        for row in await opened.machines.list_machines(everything=True):
            await opened.machines.remove(row.id, force=True)
        await opened.close(detach=False)
        left = left_processes(run_dir, home)
        shutil.rmtree(run_dir, ignore_errors=True)
        assert not left
