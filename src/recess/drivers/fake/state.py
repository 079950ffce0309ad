"""The plain data of a fake guest: everything that a snapshot of it holds, in MessagePack.

Two blobs, because they live on two parts: memory (jobs, tmpfs files, identity, RNG) and disk (all other files).
Knows nothing of asyncio, links or VMs.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import msgspec

RING_BYTES = 256 * 1024
TMPFS = ("/run", "/tmp", "/dev/shm", "/proc", "/sys")


class FileNode(msgspec.Struct):
    """One path of the guest's file system; kind is file | dir | symlink."""

    kind: str
    mode: int
    mtime_s: float
    data: bytes = b""


class JobState(msgspec.Struct):
    """One process: what it was asked, what it said, and what its program keeps in `memory` (JSON-like data)."""

    job_id: str
    pid: int
    argv: list[str]
    env: dict[str, str]
    cwd: str
    user: str
    tty: bool
    label: str
    started_s: float
    exit_code: int | None = None
    ring: list[tuple[int, bytes]] = msgspec.field(default_factory=list)
    ring_start: int = 0  # how many chunks were dropped before ring[0]
    stdin: bytes = b""
    stdin_open: bool = False
    memory: dict[str, Any] = msgspec.field(default_factory=dict)


class MemoryState(msgspec.Struct):
    """What the guest holds in RAM. `wall_offset_s`: guest wall clock minus guest uptime."""

    boot_id: str
    rng: bytes
    hostname: str = "localhost"
    machine_id: str = ""
    generation: str = ""
    epoch: int = 0
    uptime_s: float = 0.0
    wall_offset_s: float = 0.0
    frozen: bool = False
    next_pid: int = 100
    next_job: int = 1
    env: dict[str, str] = msgspec.field(default_factory=dict)
    files: dict[str, FileNode] = msgspec.field(default_factory=dict)
    jobs: dict[str, JobState] = msgspec.field(default_factory=dict)
    sealed: dict[str, str] = msgspec.field(default_factory=dict)  # what the workload cannot write: where the host does


class DiskState(msgspec.Struct):
    """What the guest holds on its writable disk."""

    files: dict[str, FileNode] = msgspec.field(default_factory=dict)


def fresh_memory() -> MemoryState:
    """Return the RAM of a guest that has just booted."""
    state = MemoryState(boot_id=secrets.token_hex(16), rng=secrets.token_bytes(32))
    state.files = {path: FileNode("dir", 0o1777 if path == "/tmp" else 0o755, 0.0) for path in TMPFS}
    return state


def fresh_disk() -> DiskState:
    """Return a disk with the folders that every image has."""
    folders = ("/", "/root", "/home", "/etc", "/usr", "/usr/bin", "/var", "/var/tmp", "/opt", "/srv")
    return DiskState(files={path: FileNode("dir", 0o755, 0.0) for path in folders})


def random_bytes(state: MemoryState, count: int) -> bytes:
    """Draw from the guest's RNG: deterministic in its state, so that two unseeded twins give the same bytes."""
    out = b""
    while len(out) < count:
        state.rng = hashlib.blake2b(state.rng, digest_size=32).digest()
        out += hashlib.blake2b(state.rng, digest_size=64, person=b"output").digest()
    return out[:count]


def reseed(state: MemoryState, entropy: bytes) -> None:
    """Mix fresh bytes into the RNG."""
    state.rng = hashlib.blake2b(state.rng + entropy, digest_size=32).digest()


def append_output(job: JobState, fd: int, data: bytes) -> None:
    """Add output to the ring, dropping the oldest chunks over RING_BYTES."""
    job.ring.append((fd, data))
    total = sum(len(chunk) for _, chunk in job.ring)
    while total > RING_BYTES and len(job.ring) > 1:
        total -= len(job.ring[0][1])
        job.ring.pop(0)
        job.ring_start += 1
