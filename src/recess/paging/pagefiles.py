"""Memories of snapshots in files of this node, uncompressed, to be mapped in place: a bounded cache, never the truth.

    FOLDER/KEY.map     where each page of a memory is (mapform.py); its rename makes an entry
    FOLDER/ID.pages    pages back to back, written once; several maps may refer to it

*A memory that grew out of another* (a snapshot that counts from its parent) writes only its own pages and refers to the
parent's files for the rest, until that gets too scattered or wasteful (layout.py); then the whole is written anew.

*Never another page than was written.* Data files are written by us, from pages that a VM held or that were verified
against their hashes, and sealed: inode, size and change time are in the map, which is hashed itself, and are compared on
the very descriptor that is then mapped. The kernel sets the change time at any write or cut, by whomever. What does not
fit is not served and goes. Nothing is fsynced, so entries of an earlier boot of the host don't count (a power cut may
have left zeros): the boot's id is in the map, too. Left over is a disk that gives back other bytes than it was given.

*A crash* leaves a data file no map names, or an unfinished map under another name: the next start removes both.

*Room*: `max_bytes` for all data files, and never so much that `free_bytes` falls under `reserve_bytes`. What was not used
for longest goes first; a file goes with the last map that names it. A machine that has it mapped keeps its content.

This module must know nothing of snapshots, templates or drivers: keys and grounds are names. One process uses a folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recess.crashpoints import crash_point
from recess.errors import Corrupt
from recess.paging.book import Numbers, Pages, gaps_of
from recess.paging.layout import Layout, Places, in_file, is_good, put_over, with_gaps
from recess.paging.mapform import BYTES_MAX, Map, Sealed, decode, encode
from recess.units import PAGE_BYTES

REWRITE_MAX = 524288  # pages: to write more than 2 GiB anew costs more than it saves
_SLICE = 1024  # pages
_MAP, _DATA, _NEW = ".map", ".pages", ".new"

log = logging.getLogger(__name__)

ReadPages = Callable[[Numbers], Pages]


def boot_id() -> str:
    """Return the id of the host's present boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class _Held:
    """Keeps descriptors open until it is forgotten."""

    def __init__(self, fds: Iterable[int]) -> None:
        for fd in fds:
            weakref.finalize(self, os.close, fd)


@dataclass(frozen=True)
class Found:
    """A memory that can be mapped. `files` are open as long as `owner` is held; `runs` and `strays` are rows of four u32:
    first page, count, file, first page in it. Strays are copied over what the runs put there."""

    files: tuple[int, ...]
    runs: bytes
    strays: bytes
    pages: int
    owner: object


@dataclass
class Counts:
    """What the cache did since it was opened."""

    hits: int = 0
    misses: int = 0
    refused: int = 0  # entries that were not as they had been written


class PageFiles:
    """The cache. Safe to use from several threads; never raises for a disk that is full or broken: it then holds less."""

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        free_bytes: Callable[[], int] | None = None,
        reserve_bytes: int = 0,
        boot: str | None = None,
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._free_bytes = free_bytes
        self._reserve_bytes = reserve_bytes
        self._boot = boot_id() if boot is None else boot
        self._writing = threading.Lock()  # one memory is written at a time; taken before the other
        self._lock = threading.RLock()  # what there is
        self._fresh = ""  # a data file that no map names yet
        self._closed = False
        self._maps: dict[str, Map] = {}  # in the order of their last use, the oldest first
        self.counts = Counts()
        with self._lock, self._quietly("opened"):
            self._load()

    # --- reading -----------------------------------------------------------------------------------------------

    def find(self, key: str, ground: str) -> Found | None:
        """Return a memory if it is here, over this ground, and as it was written."""
        with self._lock:
            known = self._maps.get(key)
            if known is None or known.ground != ground:
                self.counts.misses += 1
                return None
            found = None
            with self._quietly("read"):
                found = self._open(self._read_map(key))
            if found is None:
                self.counts.refused += 1
                self._forget([key])
                return None
            self.counts.hits += 1
            self._maps[key] = self._maps.pop(key)
            with contextlib.suppress(OSError):
                os.utime(self._folder / (key + _MAP))
            return found

    def has(self, key: str) -> bool:
        """Tell whether there is an entry; whether it is sound shows when it is used."""
        return key in self._maps

    def _read_map(self, key: str) -> Map:
        with (self._folder / (key + _MAP)).open("rb") as file:
            return decode(file.read(BYTES_MAX + 1))

    def _open(self, known: Map) -> Found:
        """Open all files of a map. Raises Corrupt when one is not what was sealed, OSError."""
        fds: list[int] = []
        try:
            for file in known.files:
                fds.append(os.open(self._folder / file.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
                if self._seal(fds[-1], file.name) != file:
                    raise Corrupt(f"page file {file.name} is not as it was written")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        pages = int(known.runs[:, 1].sum()) + int(known.strays[:, 1].sum())
        return Found(tuple(fds), known.runs.tobytes(), known.strays.tobytes(), pages, _Held(fds))

    @staticmethod
    def _seal(fd: int, name: str) -> Sealed:
        info = os.fstat(fd)
        return Sealed(name, info.st_size // PAGE_BYTES, info.st_ino, info.st_ctime_ns)

    # --- writing -----------------------------------------------------------------------------------------------

    def add(
        self, key: str, ground: str, pages_total: int, pages: Numbers, data: Pages, base: ReadPages, *, parent: str = ""
    ) -> bool:
        """Keep a memory: `pages` (ascending) with `data`, over the memory `parent`, or over the ground without one.

        `base` returns pages of the ground, for gaps that are cheaper filled than left out. Returns whether it is kept: a
        parent that is not here, or a disk that has no room, is a no.
        """
        with self._writing:
            if key in self._maps:
                return True
            with self._lock:
                below = self._maps.get(parent) if parent else None
                if parent and (below is None or below.ground != ground or below.pages != pages_total):
                    return False
                if parent:
                    self._maps[parent] = self._maps.pop(parent)  # the last to go for room
            new = _New(key, ground, pages_total, pages, data, base)
            with self._quietly("kept"):
                try:
                    return self._extend(new, below) if below is not None else self._add_whole(new, None)
                except Exception:
                    self._done()
                    raise
            return False

    def adopt(self, key: str, ground: str, pages_total: int, pages: Numbers, file: int) -> bool:
        """Keep a memory whose pages (ascending) somebody has written back to back into a nameless file of this folder.
        The descriptor stays the caller's; nobody may write to the file any more: who does unseals it."""
        with self._writing:
            layout = Layout(in_file(pages, 0))
            if key in self._maps or not is_good(layout, [len(pages)]):
                return False
            with self._quietly("adopted"):
                if os.fstat(file).st_size != len(pages) * PAGE_BYTES or not self._make_room(len(pages) * PAGE_BYTES):
                    return False
                self._fresh = secrets.token_hex(8) + _DATA
                new = _New(key, ground, pages_total, pages, np.empty((0, PAGE_BYTES), np.uint8), _no_pages)
                try:
                    self._give_name(file, self._fresh)
                    return self._publish(new, [self._seal(file, self._fresh)], layout)
                except Exception:
                    self._done()
                    raise
            return False

    def _done(self) -> None:
        """After a write that failed: a data file without a map goes."""
        with self._lock:
            self._fresh = ""
            self._sweep()

    def _give_name(self, file: int, name: str) -> None:
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # With a folder's descriptor it is linkat(2), which alone follows the link to the file.
            os.link(f"/proc/self/fd/{file}", name, dst_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)

    def _extend(self, new: _New, below: Map) -> bool:
        """Write the new pages only, if the parent's files and these make a good memory; else all."""
        layout = put_over(in_file(new.pages, len(below.files)), below.layout())
        kept = layout.files()
        sizes = [*(file.pages for file in below.files), len(new.pages)]
        if not is_good(layout, [sizes[number] for number in kept]):
            return self._add_whole(new, below)
        if not self._make_room(new.data.nbytes):
            return False
        files = [*below.files, self._write(len(new.pages), lambda low, high: new.data[low:high])]
        return self._publish(new, [files[number] for number in kept], layout.renumbered(kept))

    def _add_whole(self, new: _New, below: Map | None) -> bool:
        """Write everything into one file, small gaps filled, so that it takes few mappings."""
        older = None if below is None else self._open(below)  # stays open, whatever goes for room
        files = older.files if older is not None else ()
        places = in_file(new.pages, len(files))  # not of a file: of `new.data`
        if below is not None:
            places = places.over(below.layout().all())
        numbers, is_gap = with_gaps(places.pages, gaps_of(places.pages))
        layout = Layout(in_file(numbers, 0))
        if (below is not None and len(numbers) > REWRITE_MAX) or not is_good(layout, [len(numbers)]):
            return False
        if not self._make_room(len(numbers) * PAGE_BYTES):
            return False

        def read(low: int, high: int) -> Pages:
            wanted, gap = numbers[low:high], is_gap[low:high]
            out = np.empty((len(wanted), PAGE_BYTES), np.uint8)
            if gap.any():
                out[gap] = new.base(wanted[gap])
            rows = np.searchsorted(places.pages, wanted[~gap])
            out[~gap] = _gather(places.take(rows), files, new.data)
            return out

        return self._publish(new, [self._write(len(numbers), read)], layout)

    def _write(self, count: int, read: Callable[[int, int], Pages]) -> Sealed:
        """Write a data file, a slice at a time; it is sealed by what the kernel says of it afterwards. Raises OSError."""
        self._fresh = secrets.token_hex(8) + _DATA
        path = self._folder / self._fresh
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        try:
            for low in range(0, count, _SLICE):
                if self._closed:
                    raise InterruptedError("the server stops")
                part = np.ascontiguousarray(read(low, min(low + _SLICE, count))).reshape(-1).data
                done = 0
                while done < len(part):
                    done += os.pwrite(fd, part[done:], low * PAGE_BYTES + done)
            crash_point("pagefiles.data_written")
            return self._seal(fd, self._fresh)
        except (Exception, KeyboardInterrupt):
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def _publish(self, new: _New, files: Sequence[Sealed], layout: Layout) -> bool:
        known = Map(
            self._boot, new.ground, new.pages_total, tuple(files), layout.mapped.rows(), layout.strays.rows()
        )  # fmt: skip
        aside = self._folder / (new.key + _NEW)
        try:
            aside.write_bytes(encode(known))
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        crash_point("pagefiles.map_written")
        with self._lock:
            # Between our look at the parent and now its files may have gone, with it.
            complete = all((self._folder / file.name).exists() for file in files)
            if complete:
                aside.replace(self._folder / (new.key + _MAP))
                self._maps[new.key] = known
            else:
                aside.unlink()
            self._fresh = ""
            self._sweep()
            return complete

    def close(self) -> None:
        """Give up what is being written; what is there stays, for the next start. May be called twice."""
        self._closed = True

    # --- room --------------------------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """Return the bytes of all data files."""
        with self._lock:
            return sum(self._sizes().values())

    def _sizes(self) -> dict[str, int]:
        return {file.name: file.pages * PAGE_BYTES for known in self._maps.values() for file in known.files}

    def _make_room(self, wanted: int) -> bool:
        """Let go of the oldest until so many bytes more fit; False if they cannot."""
        if wanted > self._max_bytes:
            return False
        with self._lock:
            while self._maps and not self._fits(wanted):
                self._forget([next(iter(self._maps))])
            return self._fits(wanted)

    def _fits(self, wanted: int) -> bool:
        free = self._free_bytes() if self._free_bytes is not None else None
        return self.used_bytes() + wanted <= self._max_bytes and (free is None or free >= self._reserve_bytes + wanted)

    def give_back(self, wanted: int) -> int:
        """Let go of the oldest until so many bytes are given back, or nothing is left. Returns how many were."""
        with self._lock:
            before = self.used_bytes()
            while self._maps and before - self.used_bytes() < wanted:
                self._forget([next(iter(self._maps))])
            return before - self.used_bytes()

    def drop(self, key: str) -> None:
        """Forget a memory."""
        with self._lock:
            if key in self._maps:
                self._forget([key])

    def keep_only(self, keys: Iterable[str]) -> None:
        """Forget all others."""
        wanted = set(keys)
        with self._lock:
            self._forget([key for key in self._maps if key not in wanted])

    def _forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            del self._maps[key]
            with contextlib.suppress(OSError):
                (self._folder / (key + _MAP)).unlink(missing_ok=True)
        self._sweep()

    def _sweep(self) -> None:
        """Remove the data files that no map names."""
        named = set(self._sizes())
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if path.suffix == _DATA and path.name not in named and path.name != self._fresh:
                    path.unlink(missing_ok=True)

    def _load(self) -> None:
        """Read what is there, oldest use first; remove what is of another boot, damaged, or unfinished."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found: list[tuple[int, str]] = []
        for path in self._folder.iterdir():
            if path.suffix == _MAP:
                found.append((path.stat().st_mtime_ns, path.stem))
            elif path.suffix == _NEW:
                path.unlink(missing_ok=True)
        for _, key in sorted(found):
            try:
                known = self._read_map(key)
                if known.boot == self._boot:
                    self._maps[key] = known
                    continue
            except (Corrupt, OSError) as exc:
                log.warning("page files: %s is not used: %s", key[:24], exc)
            (self._folder / (key + _MAP)).unlink(missing_ok=True)
        self._sweep()

    @contextlib.contextmanager
    def _quietly(self, what: str) -> Iterator[None]:
        try:
            yield
        except InterruptedError:
            log.debug("a page file is not %s: the server stops", what)  # as it was told to
        except (Corrupt, OSError) as exc:
            log.warning("a page file could not be %s: %s", what, exc)


@dataclass(frozen=True)
class _New:
    """A memory that is to be kept."""

    key: str
    ground: str
    pages_total: int
    pages: Numbers
    data: Pages
    base: ReadPages


def _no_pages(numbers: Numbers) -> Pages:
    raise AssertionError(f"nothing is to be read, asked for {len(numbers)} pages")


def _gather(places: Places, files: Sequence[int], data: Pages) -> Pages:
    """Return the pages at these places; the file after the last of `files` is `data`. Raises Corrupt, OSError."""
    out = np.empty((len(places), PAGE_BYTES), np.uint8)
    fresh = places.file == len(files)
    out[fresh] = data[places.at[fresh]]
    old, low = places.select(~fresh), 0
    found = np.empty((len(old), PAGE_BYTES), np.uint8)
    for _, count, number, at in old.rows().tolist():
        if os.preadv(files[number], [found[low : low + count].reshape(-1).data], at * PAGE_BYTES) != count * PAGE_BYTES:
            raise Corrupt("a page file is shorter than its map says")
        low += count
    out[~fresh] = found
    return out
