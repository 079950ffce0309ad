"""QEMU, the default driver: microVMs on any Linux, with KVM where it truly runs guests, else emulated."""

from recess.drivers.qemu.driver import QemuDriver
from recess.drivers.qemu.vm import QemuVm

__all__ = ["QemuDriver", "QemuVm"]
