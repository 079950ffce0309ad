"""The fake driver: complete, in memory, shipped; control-plane tests and benchmarks need no VM with it."""

from recess.drivers.fake.driver import FakeDriver, FakeHost
from recess.drivers.fake.images import FakeImages

__all__ = ["FakeDriver", "FakeHost", "FakeImages"]
