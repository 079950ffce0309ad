"""A userfaultfd of another process's memory: read faults, put pages. Linux, x86-64.

Numbers and structures: linux/userfaultfd.h. The descriptor was created, registered and protected by whoever owns the
process (the keeper of a machine, or a VMM that hands it over); all calls here act on that process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from recess.paging.book import Pages
from recess.units import PAGE_BYTES

_UFFDIO_COPY = 0xC028AA03
_UFFDIO_WAKE = 0x8010AA02
_UFFDIO_ZEROPAGE = 0xC020AA04
_COPY = struct.Struct("<QQQQq")  # to, from, length, mode, copied
_RANGE = struct.Struct("<QQ")
_ZERO = struct.Struct("<QQQq")  # start, length, mode, zeroed
_MESSAGE = struct.Struct("<B7xQQ8x")  # event, flags, address
_FAULT_EVENT = 0x12
_MODE_PROTECT = 2
_MESSAGES = 16


@dataclass(frozen=True)
class Segment:
    """A stretch of the guest's memory in the process: pages `first` to `first + pages` lie at `address`."""

    address: int
    first: int
    pages: int


@dataclass(frozen=True)
class Fault:
    """Somebody waits for this page."""

    page: int


class ProcessGone(Exception):
    """The process whose memory it is has ended: there is nothing left to do."""


class Uffd:
    """The descriptor and where the memory is. Safe to use from several threads. `protect`: pages that are put there
    count as not written."""

    def __init__(self, fd: int, segments: Sequence[Segment], *, protect: bool = True) -> None:
        self.fd = fd
        self._segments = tuple(segments)
        self._mode = _MODE_PROTECT if protect else 0

    def address_of(self, page: int) -> int:
        """Return where a page lies. Raises ValueError for one that is not there."""
        for segment in self._segments:
            if segment.first <= page < segment.first + segment.pages:
                return segment.address + (page - segment.first) * PAGE_BYTES
        raise ValueError(f"page {page} is not in the memory")

    def _page_at(self, address: int) -> int:
        for segment in self._segments:
            if segment.address <= address < segment.address + segment.pages * PAGE_BYTES:
                return segment.first + (address - segment.address) // PAGE_BYTES
        raise ValueError(f"address {address:#x} is not in the memory")

    def faults(self) -> list[Fault]:
        """Return the faults that wait; none if nobody does. Raises ProcessGone."""
        try:
            data = os.read(self.fd, _MESSAGE.size * _MESSAGES)
        except BlockingIOError:
            return []
        except OSError as exc:
            raise ProcessGone from exc
        if not data:
            raise ProcessGone
        messages = _MESSAGE.iter_unpack(data)
        return [Fault(self._page_at(address)) for event, _flags, address in messages if event == _FAULT_EVENT]

    def put(self, first: int, data: Pages) -> None:
        """Put neighbouring pages there and wake who waits for them. Pages that are there already stay as they are.

        All must lie in one segment. Zeros cost no memory where nothing is protected. Raises ProcessGone, OSError.
        """
        target, source, length = self.address_of(first), data.ctypes.data, data.nbytes
        zero = not self._mode and not data.any()
        done = 0
        while done < length:
            if zero:
                request = bytearray(_ZERO.pack(target + done, length - done, 0, 0))
            else:
                request = bytearray(_COPY.pack(target + done, source + done, length - done, self._mode, 0))
            try:
                fcntl.ioctl(self.fd, _UFFDIO_ZEROPAGE if zero else _UFFDIO_COPY, request)
                return
            except OSError as exc:
                copied = (_ZERO if zero else _COPY).unpack(request)[-1]
                if copied > 0:
                    done += copied
                elif exc.errno == errno.EEXIST:
                    done += PAGE_BYTES
                elif exc.errno in (errno.ESRCH, errno.ENOENT):
                    raise ProcessGone from exc
                elif exc.errno != errno.EAGAIN:  # the mappings are changing: again
                    raise

    def wake(self, page: int) -> None:
        """Let whoever waits for this page look again."""
        request = bytearray(_RANGE.pack(self.address_of(page), PAGE_BYTES))
        try:
            fcntl.ioctl(self.fd, _UFFDIO_WAKE, request)
        except OSError as exc:
            raise ProcessGone from exc
