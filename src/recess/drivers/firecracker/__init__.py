"""Firecracker: VMs on KVM, by an unpatched Firecracker of the user's. See docs/internals/firecracker.md."""

from recess.drivers.firecracker.driver import FirecrackerDriver
from recess.drivers.firecracker.vm import FirecrackerVm

__all__ = ["FirecrackerDriver", "FirecrackerVm"]
