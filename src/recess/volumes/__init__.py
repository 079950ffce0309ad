"""Folders of this host that machines have copies of: what is in them, what changed on either side, and what to do about it.

Knows folders, names and times; it must know nothing of machines, guests or rows. What a guest says arrives here as plain
entries, already bounded.
"""

from recess.volumes.history import History, Seen
from recess.volumes.hostside import HostSide
from recess.volumes.merge import Pair, Step, plan
from recess.volumes.named import NamedVolumes
from recess.volumes.trees import DIR, ENTRIES_MAX, FILE, LINK, Entry, Tree

__all__ = [
    "DIR",
    "ENTRIES_MAX",
    "FILE",
    "LINK",
    "Entry",
    "History",
    "HostSide",
    "NamedVolumes",
    "Pair",
    "Seen",
    "Step",
    "Tree",
    "plan",
]
