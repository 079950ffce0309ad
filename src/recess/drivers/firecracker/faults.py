"""Firecracker's page faults: it connects to our socket, tells where the guest's memory lies, and hands over a userfaultfd.

The protocol (docs/snapshotting/handling-page-faults-on-snapshot-resume.md of Firecracker): one message, a JSON list of
regions with exactly one descriptor; then never a word again. The kernel names the sender (SO_PEERCRED): it must be the VMM
of this machine, and its message is bounded and checked before anything is done with it. Faults come while the load call is
still being answered, so whoever answers them must not be whoever waits for that call: here it is the pager, a process of
its own. Pager and VMM are each watched by their pidfd, and neither outlives the other (drivers/kept/paged.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import struct
from collections.abc import Container
from pathlib import Path

from recess.drivers.firecracker.calls import FAULT_SOCKET
from recess.drivers.kept.keeper import Keeper
from recess.drivers.kept.layout import socket_address
from recess.drivers.kept.paged import serve_watched
from recess.errors import DriverFailed, Timeout
from recess.machines.contract import LazyMemory
from recess.units import PAGE_BYTES

_MESSAGE_MAX = 64 * 1024
_REGIONS_MAX = 64
_SO_PEERPIDFD = 77  # asm-generic/socket.h; Linux 6.5
_WAIT_S = 30.0
_DEVICE = Path("/dev/userfaultfd")
_ALLOWED = Path("/proc/sys/vm/unprivileged_userfaultfd")

Segment = tuple[int, int, int]
"""Address in the VMM, first page, pages."""


def parse_regions(message: bytes, memory_bytes: int) -> list[Segment]:
    """Return where the guest's memory lies. Raises DriverFailed unless the regions are whole pages that make up exactly the
    machine's memory, none twice."""
    try:
        rows = json.loads(message)
        found = [(int(r["base_host_virt_addr"]), int(r["offset"]), int(r["size"]), int(r["page_size"])) for r in rows]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as exc:
        raise DriverFailed(f"not a description of memory: {exc}", log="") from exc
    if not 0 < len(found) <= _REGIONS_MAX:
        raise DriverFailed(f"{len(found)} regions of memory", log="")
    expected = 0
    for address, offset, size, page in sorted(found, key=lambda row: row[1]):
        if page != PAGE_BYTES or size <= 0 or size % PAGE_BYTES or address % PAGE_BYTES or address <= 0:
            raise DriverFailed(f"a region of {size} bytes at {address:#x}, pages of {page}", log="")
        if offset != expected:
            raise DriverFailed(f"the regions leave a gap at {expected}", log="")
        expected += size
    if expected != memory_bytes:
        raise DriverFailed(f"the regions have {expected} bytes, the machine {memory_bytes}", log="")
    return [(address, offset // PAGE_BYTES, size // PAGE_BYTES) for address, offset, size, _ in found]


def may_catch_faults(*, root: bool, jailed: bool, device: Path = _DEVICE, allowed: Path = _ALLOWED) -> bool:
    """Tell whether Firecracker will get a userfaultfd that catches the kernel's own faults, too, without which a restore by
    page faults fails: by the device (the jailer makes one in the jail), by root's rights, or because everybody may."""
    try:
        everybody = allowed.read_text().strip() == "1"
    except OSError:
        everybody = False
    if jailed:
        return everybody or device.exists()
    return everybody or root or os.access(device, os.R_OK | os.W_OK)


class FaultSocket:
    """The socket that Firecracker connects to. To be opened before the load is asked for."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    @classmethod
    def open(cls, work: Path, uid: int | None = None) -> FaultSocket:
        """Listen in the VMM's working folder. `uid`: the user that must be able to connect, if it is another."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with socket_address(work, FAULT_SOCKET) as address:
                sock.bind(address)
            if uid is not None:
                os.chown(work / FAULT_SOCKET, uid, uid)
            sock.listen(1)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    async def receive(self, vmm: Container[int], memory_bytes: int) -> tuple[int, int, list[Segment]]:
        """Return the userfaultfd and a pidfd of its sender, both the caller's, and where the memory lies. `vmm`: the processes
        of which one must have sent it. Raises DriverFailed for another sender or a message that makes no sense, Timeout."""
        try:
            async with asyncio.timeout(_WAIT_S):
                peer, _ = await self._loop.sock_accept(self._sock)
                with peer, contextlib.ExitStack() as stack:
                    process = _held_sender(peer, vmm)
                    stack.callback(os.close, process)
                    message, fd = await self._message(peer)
                    stack.callback(os.close, fd)
                    segments = parse_regions(message, memory_bytes)
                    stack.pop_all()
                    return fd, process, segments
        except TimeoutError as exc:
            raise Timeout(f"Firecracker did not ask for its pages within {_WAIT_S:g} s") from exc

    async def _message(self, peer: socket.socket) -> tuple[bytes, int]:
        """Return the message and its one descriptor. It is sent with one call, so it is received with one."""
        ready: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(peer.fileno(), lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            self._loop.remove_reader(peer.fileno())
        data, fds, flags, _ = socket.recv_fds(peer, _MESSAGE_MAX, 4, socket.MSG_CMSG_CLOEXEC)
        if len(fds) != 1 or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            for fd in fds:
                os.close(fd)
            raise DriverFailed(f"a message with {len(fds)} descriptors", log="")
        return data, fds[0]

    def close(self) -> None:
        """Listen no more. May be called twice."""
        with contextlib.suppress(OSError):
            self._sock.close()


def _held_sender(peer: socket.socket, vmm: Container[int]) -> int:
    """Return a pidfd of the process that connected, which must be one of these. Raises DriverFailed.

    The pid of SO_PEERCRED may be another's once that has ended, so the descriptor is taken from the socket itself; from a
    kernel before 6.5 by the pid, which is the VMM's as long as the keeper has not told of its end.
    """
    pid, _uid, _gid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if pid not in vmm:
        raise DriverFailed(f"process {pid} is not the machine's VMM", log="")
    try:
        try:
            return int(peer.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
        except OSError as exc:
            if exc.errno != errno.ENOPROTOOPT:
                raise
            return os.pidfd_open(pid)
    except OSError as exc:
        raise DriverFailed(f"the VMM, process {pid}, has ended: {exc.strerror}", log="") from exc


async def serve_faults(
    sock: FaultSocket, keeper: Keeper, vmm: Container[int], memory_bytes: int, lazy: LazyMemory
) -> None:
    """Take the memory from Firecracker and have the pager answer for all of it. Raises DriverFailed, Timeout."""
    uffd, process, segments = await sock.receive(vmm, memory_bytes)
    try:
        await serve_watched(keeper, lazy, uffd, process, segments, whole=True)
    finally:
        os.close(uffd)
        os.close(process)
