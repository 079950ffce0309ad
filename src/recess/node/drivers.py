"""Which driver this node runs on: the only place that names concrete drivers.

`auto` takes QEMU (KVM when it truly boots a guest, else TCG; the driver itself decides and says so). Nothing is probed
here, because `recess ps`, `logs` and `doctor` must work, and start at once, on a host that cannot run a guest: an
attempt to start one then raises MissingTool with the hint.
"""

from __future__ import annotations

from dataclasses import dataclass

from recess.config import Config
from recess.drivers.fake import FakeDriver, FakeImages
from recess.drivers.firecracker import FirecrackerDriver
from recess.drivers.gvisor import GvisorDriver
from recess.drivers.qemu import QemuDriver
from recess.errors import BadInput
from recess.machines.contract import Driver
from recess.machines.imagefiles import StoredImages
from recess.machines.parts import ImageFiles, Progress

KNOWN = ("auto", "qemu", "firecracker", "gvisor", "fake")


@dataclass(frozen=True)
class Chosen:
    """A driver and why it was chosen."""

    driver: Driver
    reason: str


def choose_driver(config: Config) -> Chosen:
    """Return the driver that the configuration names. Raises BadInput for an unknown name."""
    if config.driver == "fake":
        return Chosen(FakeDriver(), "the configuration names it")
    if config.driver == "qemu":
        return Chosen(QemuDriver(config), "the configuration names it")
    if config.driver == "firecracker":
        return Chosen(FirecrackerDriver(config), "the configuration names it")
    if config.driver == "gvisor":
        return Chosen(GvisorDriver(config), "the configuration names it")
    if config.driver == "auto":
        return Chosen(QemuDriver(config), "the strongest one there is for any Linux")
    raise BadInput(f"driver: unknown {config.driver!r}", hint=f"known: {', '.join(KNOWN)}")


def make_images(config: Config, driver: Driver, progress: Progress) -> ImageFiles:
    """Return the boot files that this driver's machines start from."""
    if driver.name == "fake":
        return FakeImages()
    return StoredImages(config.images_dir, config.bin_dir / "guestd", progress, kernel=config.kernel)
