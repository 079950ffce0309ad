"""Which pages of a VM differ from what, and where their content as of the last capture lies. One per VM, in its run folder.

    pages       sparse file of the guest's size: every page that a capture has brought, as of the last one (absent before
                the first capture; then it is that capture's own file)
    shm/ram     what the VM was restored from, if it was: its template's memory and the snapshot's pages over it
    ledger      the record below
    poisoned    exists while Firecracker's own list of changes cannot be trusted

Firecracker's Diff holds what was written since the last capture and clears its list. So the content of everything that
was ever written is gathered here, outside the pause, and a capture that must not depend on an earlier snapshot needs no
more from the guest than the Diff.

*Poison.* The list is cleared before we know that the Diff is safe: a server that dies in between, a full disk, a failed
fsync lose it. So the mark is made before Firecracker is asked, and removed when the ledger that has the Diff in it is
written. A capture that finds the mark takes everything (Full), and starts the ledger anew.

This module knows files and page numbers; it must know nothing of Firecracker's API, of the guest, or of who asks.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from recess.drivers.firecracker.calls import DIFF, FULL, RAM_FILE
from recess.drivers.kept import disk
from recess.errors import DriverFailed
from recess.images.files import space_errors
from recess.units import MIB, PAGE_BYTES

PAGES_FILE, LEDGER_FILE, POISON_FILE = "pages", "ledger", "poisoned"
DELTA, ALL = "delta", "all"

_SLICE_PAGES = 4 * MIB // PAGE_BYTES
_VERSION = 1

Numbers = NDArray[np.uint32]
_NONE: Numbers = np.empty(0, np.uint32)


@dataclass(frozen=True)
class Ledger:
    """The record. `base`: the stored snapshot that `since` counts from, "" for none; `since` goes up to the last capture,
    `fresh` are pages that were taken in after it (`absorb`). `over`: pages that a restore put over the template. `whole`:
    the content of everything that differs from the template is at hand here."""

    base: str = ""
    generation: int = 0
    since: Numbers = field(default_factory=lambda: _NONE)
    over: Numbers = field(default_factory=lambda: _NONE)
    whole: bool = True
    fresh: Numbers = field(default_factory=lambda: _NONE)


@dataclass(frozen=True)
class Plan:
    """What a capture asks Firecracker for (`kind`: Full or Diff) and gives out (`which`: delta or all)."""

    kind: str
    which: str
    parent: str = ""


def plan_capture(ledger: Ledger, parent: str, *, poisoned: bool) -> Plan:
    """Decide for a capture whose caller can build on the snapshot `parent` ("" on none)."""
    if poisoned:
        return Plan(FULL, ALL)
    if parent and parent == ledger.base:
        return Plan(DIFF, DELTA, parent)
    return Plan(DIFF if ledger.whole else FULL, ALL)


def committed(ledger: Ledger, generation: int, snapshot: str) -> Ledger:
    """Return the ledger after a capture was stored: later ones count from it. A word that comes too late (another capture
    was taken since) changes nothing. Generation 0 is what the VM was started from."""
    return replace(ledger, base=snapshot, since=_NONE) if generation == ledger.generation else ledger


class _Record(msgspec.Struct, array_like=True):
    version: int
    base: str
    generation: int
    whole: bool
    since: bytes
    over: bytes
    fresh: bytes


def write_ledger(run: Path, ledger: Ledger) -> None:
    """Write the record in one step (temp name, rename); the folder is in memory, so there is nothing to sync."""
    since, over, fresh = (n.astype("<u4").tobytes() for n in (ledger.since, ledger.over, ledger.fresh))
    record = _Record(_VERSION, ledger.base, ledger.generation, ledger.whole, since, over, fresh)
    aside = run / f"{LEDGER_FILE}.new"
    with space_errors(str(aside)):
        aside.write_bytes(msgspec.msgpack.encode(record))
        aside.replace(run / LEDGER_FILE)


def read_ledger(run: Path) -> Ledger:
    """Return the record. Raises DriverFailed when there is none that can be read: nothing is known of the VM then."""
    try:
        record = msgspec.msgpack.decode((run / LEDGER_FILE).read_bytes(), type=_Record)
        raws = (record.since, record.over, record.fresh)
        since, over, fresh = (np.frombuffer(raw, "<u4").astype(np.uint32) for raw in raws)
    except (OSError, ValueError, msgspec.MsgspecError) as exc:
        raise DriverFailed(f"what is known of the VM's memory cannot be read: {exc}", log="") from exc
    if record.version != _VERSION:
        raise DriverFailed(f"a ledger of version {record.version}", log="")
    return Ledger(record.base, record.generation, since, over, record.whole, fresh)


def poison(run: Path) -> None:
    """Note that the list of changes is about to be cleared."""
    (run / POISON_FILE).touch()


def is_poisoned(run: Path) -> bool:
    """Tell whether an earlier capture failed, or was interrupted, after the list may have been cleared."""
    return (run / POISON_FILE).exists()


def enter(run: Path, ledger: Ledger, plan: Plan, taken: Path, template: Path | None) -> tuple[Ledger, Numbers]:
    """Take a capture's memory file (`taken`; it is gone afterwards) into the ledger, and end the poison.

    Returns the new ledger and the numbers of the pages that the capture gives out; `collect` has their content. A Full
    one replaces all that was known; only what differs from the template (or from zeros) is kept of it.
    """
    pages = run / PAGES_FILE
    generation = ledger.generation + 1
    if plan.kind == FULL:
        aside = run / f"{PAGES_FILE}.new"
        numbers = _keep_differing(taken, aside, template)
        taken.unlink()
        aside.replace(pages)
        ledger = Ledger("", generation, numbers, _NONE, True)
    else:
        since = np.union1d(np.union1d(ledger.since, ledger.fresh), _take_in(pages, taken))
        ledger = replace(ledger, generation=generation, since=since, fresh=_NONE)
        numbers = since if plan.which == DELTA else np.union1d(ledger.over, _pages_with_data(pages))
    _settle(run, ledger)
    return ledger, numbers.astype(np.uint32)


def absorb(run: Path, ledger: Ledger, taken: Path) -> Ledger:
    """Take a Diff into the ledger that is nobody's capture, and end the poison; return the new ledger."""
    ledger = replace(ledger, fresh=np.union1d(ledger.fresh, _take_in(run / PAGES_FILE, taken)))
    _settle(run, ledger)
    return ledger


def _take_in(pages: Path, taken: Path) -> Numbers:
    """Put a Diff's pages over those that are known; return which pages that is. `taken` is gone afterwards."""
    numbers = _pages_with_data(taken)
    if pages.exists():
        fd = os.open(pages, os.O_RDWR | os.O_CLOEXEC)
        with contextlib.closing(os.fdopen(fd, "r+b")):
            disk.copy_data(taken, fd)
        taken.unlink()
    else:
        taken.replace(pages)
    return numbers


def _settle(run: Path, ledger: Ledger) -> None:
    write_ledger(run, ledger)
    (run / POISON_FILE).unlink(missing_ok=True)


def collect(run: Path, numbers: Numbers) -> disk.Packed:
    """Return these pages, packed in memory of their own: from the captures' file, else from what was restored."""
    out = os.memfd_create("recess-capture", os.MFD_CLOEXEC)
    try:
        with contextlib.ExitStack() as stack, space_errors("pages"):
            known = stack.enter_context((run / PAGES_FILE).open("rb"))
            inside = np.isin(numbers, _pages_with_data(run / PAGES_FILE), assume_unique=True)
            files = {True: known.fileno()}
            if not inside.all():
                files[False] = stack.enter_context((run / RAM_FILE).open("rb")).fileno()
            at = 0
            for first, end in _runs(numbers, inside):
                length = (end - first) * PAGE_BYTES
                _copy(files[bool(inside[first])], int(numbers[first]) * PAGE_BYTES, out, at, length)
                at += length
            _write_all(out, numbers.astype("<u4").tobytes(), at)
    except BaseException:
        os.close(out)
        raise
    return disk.map_packed(out, len(numbers))


def _pages_with_data(path: Path) -> Numbers:
    with path.open("rb") as handle:
        return disk.blocks_with_data(handle.fileno())


def _runs(numbers: Numbers, inside: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) positions of neighbouring pages in the same file, at most a slice long."""
    if not len(numbers):
        return
    cuts = np.flatnonzero((np.diff(numbers.astype(np.int64)) != 1) | (inside[1:] != inside[:-1])) + 1
    for first, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(numbers)], strict=True):
        yield from ((at, min(at + _SLICE_PAGES, end)) for at in range(first, end, _SLICE_PAGES))


def _copy(source: int, offset: int, target: int, at: int, length: int) -> None:
    """Inside the kernel where it can (not between all file systems), else through a buffer."""
    while length:
        try:
            count = os.copy_file_range(source, target, length, offset, at)
        except OSError as exc:
            if exc.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS):
                raise
            count = os.pwrite(target, os.pread(source, min(length, MIB), offset), at)
        if count == 0:
            raise DriverFailed("a file of pages is too short", log="")
        offset, at, length = offset + count, at + count, length - count


def _write_all(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, at)
        view, at = view[count:], at + count


def _keep_differing(full: Path, target: Path, template: Path | None) -> Numbers:
    """Copy out of a full memory file what differs from the template (or from zeros); return which pages that is.

    With a template a page of zeros may differ, and then is data in `target`.
    """
    size = full.stat().st_size
    kept = [_NONE]
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(full.open("rb")).fileno()
        base = None if template is None else stack.enter_context(template.open("rb")).fileno()
        stack.enter_context(space_errors(str(target)))
        target.unlink(missing_ok=True)
        out = stack.enter_context(os.fdopen(disk.create_sparse(target, size), "r+b")).fileno()
        for first in range(0, size // PAGE_BYTES, _SLICE_PAGES):
            count = min(_SLICE_PAGES, size // PAGE_BYTES - first)
            now = _read(source, first, count)
            differs = now.any(axis=1) if base is None else (now != _read(base, first, count)).any(axis=1)
            numbers = (first + np.flatnonzero(differs)).astype(np.uint32)
            for start, end in _runs(numbers, np.ones(len(numbers), np.bool_)):
                offset = int(numbers[start]) * PAGE_BYTES
                _copy(source, offset, out, offset, (end - start) * PAGE_BYTES)
            kept.append(numbers)
    return np.concatenate(kept)


def _read(fd: int, first: int, count: int) -> NDArray[np.uint64]:
    data = os.pread(fd, count * PAGE_BYTES, first * PAGE_BYTES)
    return np.frombuffer(data.ljust(count * PAGE_BYTES, b"\0"), np.uint64).reshape(count, -1)
