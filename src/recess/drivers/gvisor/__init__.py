"""The gVisor driver: machines as processes under gVisor's kernel under `runsc`, for hosts without hardware virtualisation."""

from recess.drivers.gvisor.driver import GvisorDriver
from recess.drivers.gvisor.vm import GvisorVm

__all__ = ["GvisorDriver", "GvisorVm"]
