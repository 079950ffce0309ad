"""What is different between two states of a machine: pages, files, processes. Pure, but for reading a guest's listing.

Pages are compared byte for byte, whatever layer they are stored in. Files and processes are what guestd tells of a scratch
machine whose workload is frozen: that sees what the machine saw, unwritten page cache and file systems in memory
included, which reading the disk's ext4 from outside would not, and needs no tool of the host or of the image.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from recess.errors import BadInput, NotFound, RecessError
from recess.guestlink.link import FileStat, GuestLink
from recess.machines.contract import PageSet
from recess.snapshots.contract import PageData
from recess.units import PAGE_BYTES

SKIPPED = frozenset({"/proc", "/sys"})  # the kernel speaking, not files
FILES_MAX = 1_000_000
PROCESSES_MAX = 65_536
_AT_ONCE = 16
_CHUNK = 4096  # pages: 16 MiB of each side at a time
_PROC_BYTES = 64 * 1024


@dataclass(frozen=True)
class PageDiff:
    """How two states of one part differ. `reverted`: of the changed pages those that are, on the right, the base's."""

    pages_total: int
    listed: int  # pages that either side has of its own
    changed: int
    zeroed: int
    reverted: int


def compare_pages(left: PageSet, right: PageSet, left_base: PageData | None, right_base: PageData | None, pages_total: int) -> PageDiff:  # fmt: skip
    """Compare two sets of pages, each over its base (None: zeros). Only pages that can differ are looked at."""
    sides = [_Side.of(left, left_base), _Side.of(right, right_base)]
    listed = np.union1d(sides[0].indices, sides[1].indices)
    same_base = left_base is right_base
    changed = zeroed = reverted = 0
    for numbers in _batches(listed if same_base else np.arange(pages_total, dtype=np.int64)):
        mine, theirs = sides[0].take(numbers), sides[1].take(numbers)
        differ = (mine != theirs).any(axis=1)
        changed += int(differ.sum())
        if differ.any():
            there = theirs[differ]
            zeroed += int((~there.any(axis=1)).sum())
            reverted += int((there == sides[1].base_pages(numbers[differ])).all(axis=1).sum())
    return PageDiff(pages_total, len(listed), changed, zeroed, reverted)


@dataclass(frozen=True)
class _Side:
    indices: NDArray[np.int64]
    words: NDArray[np.uint64]
    base: NDArray[np.uint64] | None

    @classmethod
    def of(cls, pages: PageSet, base: PageData | None) -> _Side:
        data = np.frombuffer(pages.data, np.uint8).reshape(-1, PAGE_BYTES)
        indices = np.frombuffer(pages.indices, "<u4").astype(np.int64)
        return cls(indices, data.view(np.uint64), None if base is None else base.view(np.uint64))

    def base_pages(self, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
        if self.base is None:
            return np.zeros((len(numbers), PAGE_BYTES // 8), np.uint64)
        found: NDArray[np.uint64] = self.base[numbers]
        return found

    def take(self, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
        out = self.base_pages(numbers)
        if len(self.indices):
            at = np.minimum(np.searchsorted(self.indices, numbers), len(self.indices) - 1)
            own = self.indices[at] == numbers
            out[own] = self.words[at[own]]
        return out


def _batches(numbers: NDArray[np.int64]) -> Iterable[NDArray[np.int64]]:
    return (numbers[low : low + _CHUNK] for low in range(0, len(numbers), _CHUNK))


@dataclass(frozen=True)
class GuestState:
    """What guestd told of one machine: paths with kind, size, mode and time; processes as (pid, start) -> command."""

    files: Mapping[str, FileStat]
    processes: Mapping[tuple[int, str], str]


@dataclass(frozen=True)
class Changes:
    """Names that are only left (removed), only right (added), or on both sides and not the same. Sorted."""

    added: Sequence[str] = field(default_factory=tuple)
    removed: Sequence[str] = field(default_factory=tuple)
    changed: Sequence[str] = field(default_factory=tuple)


def compare_files(left: Mapping[str, FileStat], right: Mapping[str, FileStat]) -> Changes:
    """Compare two listings. A folder's own size and time say only that something in it changed: they do not count."""

    def key(one: FileStat) -> tuple[object, ...]:
        return (one.kind, one.mode) if one.kind == "dir" else (one.kind, one.mode, one.size, one.mtime_s)

    both = left.keys() & right.keys()
    return Changes(
        sorted(right.keys() - left.keys()), sorted(left.keys() - right.keys()),
        sorted(path for path in both if key(left[path]) != key(right[path])),
    )  # fmt: skip


def compare_processes(left: Mapping[tuple[int, str], str], right: Mapping[tuple[int, str], str]) -> Changes:
    """Compare two process tables; a process is its pid and start time, so a number that is used again is another one."""

    def shown(table: Mapping[tuple[int, str], str], keys: Iterable[tuple[int, str]]) -> list[str]:
        return [f"{pid} {table[pid, start]}" for pid, start in sorted(keys)]

    execed = [key for key in left.keys() & right.keys() if left[key] != right[key]]
    return Changes(
        shown(right, right.keys() - left.keys()), shown(left, left.keys() - right.keys()), shown(right, execed)
    )


async def look_at(link: GuestLink) -> GuestState:
    """Read a guest's files and processes. Raises GuestFailed, Timeout, BadInput (more files than FILES_MAX)."""
    files: dict[str, FileStat] = {}
    room = asyncio.Semaphore(_AT_ONCE)

    async def below(path: str) -> list[FileStat]:
        async with room:
            try:
                return await link.list_dir(path)
            except NotFound:
                return []  # a folder of a file system that went with the boot

    waiting = ["/"]
    while waiting:
        batch, waiting = waiting[-_AT_ONCE:], waiting[:-_AT_ONCE]  # from the end: what waits stays short
        for folder, rows in zip(batch, await asyncio.gather(*map(below, batch)), strict=True):
            # A guest may say anything: only what is new and really below is taken, so the walk ends.
            fresh = [one for one in rows if one.path not in files and _is_in(folder, one.path)]
            files.update((one.path, one) for one in fresh)
            waiting += [one.path for one in fresh if one.kind == "dir" and one.path not in SKIPPED]
        if len(files) > FILES_MAX:
            raise BadInput(f"the machine has more than {FILES_MAX} files: too many to compare")
    return GuestState(files, await _processes(link, room))


def _is_in(folder: str, path: str) -> bool:
    parent, _, name = path.rpartition("/")
    return parent == folder.rstrip("/") and name not in ("", ".", "..")


async def _processes(link: GuestLink, room: asyncio.Semaphore) -> dict[tuple[int, str], str]:
    """Read the process table from /proc; of a guest without one, the jobs."""
    try:
        pids = [int(one.path.rpartition("/")[2]) for one in await link.list_dir("/proc") if _is_pid(one.path)]
    except (NotFound, BadInput):
        pids = []
    if not pids:
        return {
            (job.pid, f"{job.started_s:.3f}"): " ".join(job.argv) for job in await link.jobs() if job.exit_code is None
        }

    async def one(pid: int) -> tuple[tuple[int, str], str] | None:
        async with room:
            try:
                stat = await link.read_file(f"/proc/{pid}/stat", _PROC_BYTES)
                words = await link.read_file(f"/proc/{pid}/cmdline", _PROC_BYTES)
            except RecessError:
                return None  # it ended, or its arguments are over the bound
        return parse_process(pid, stat, words)

    found = await asyncio.gather(*map(one, pids[:PROCESSES_MAX]))
    return dict(row for row in found if row is not None)


def _is_pid(path: str) -> bool:
    return path.rpartition("/")[2].isdecimal()


def parse_process(pid: int, stat: bytes, cmdline: bytes) -> tuple[tuple[int, str], str] | None:
    """Return ((pid, start time in ticks), command) from /proc/PID/stat and cmdline; None for a kernel thread or what is
    no such file. The name in parentheses may hold anything, parentheses and spaces too."""
    head, bracket, tail = stat.rpartition(b")")
    fields = tail.split()
    if not bracket or len(fields) < 20:
        return None
    name = head.partition(b"(")[2].decode(errors="replace")
    words = [word.decode(errors="replace") for word in cmdline.split(b"\0") if word]
    if not words:
        return None  # a kernel thread, or a zombie
    return (pid, fields[19].decode(errors="replace")), " ".join(words) or name
