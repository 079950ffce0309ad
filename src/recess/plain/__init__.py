"""Plain processes in place of machines: the `Machines` service over folders and process groups of this host, no VM.

For agents that were deployed with `backend="process"`: the same file, the same log, the same effects. What a VM gives is
not there and every wake says so: memory is not frozen (the process is ended, the folder kept: rung 4), nothing keeps the
process from this host's files and network. Must know nothing of sessions.
"""

from recess.plain.backends import Backends
from recess.plain.machines import PlainMachines

__all__ = ["Backends", "PlainMachines"]
