"""Device state: everything of a machine that is neither memory nor disk. Saved from and loaded into QEMU.

Two ways, told apart by the first byte of what we keep (opaque to everybody else):

`d`  `xen-save-devices-state`: one command, some 20 kB, 1 ms, needs no Xen. With `live` false the disks stay usable.
`m`  for a QEMU without that command: an ordinary migration stream that leaves out shared RAM (`x-ignore-shared`).
     Only for machines whose RAM is mapped shared; the VM is left in "postmigrate", from which `cont` goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping
from typing import Any

from recess.drivers.kept.steps import all_of
from recess.drivers.qemu.handles import passed_file
from recess.drivers.qemu.qmp import Qmp
from recess.errors import Corrupt, DriverFailed, Timeout, Unsupported

DEVICES, MIGRATION = b"d", b"m"
STATE_LIMIT = 64 << 20
_TIMEOUT_S = 30.0


async def save_state(qmp: Qmp, *, devices_command: bool, shared: bool) -> bytes:
    """Return the device state of a stopped VM. Raises DriverFailed, Unsupported, Timeout."""
    if devices_command:
        return DEVICES + await _save_devices(qmp)
    if not shared:
        raise Unsupported("this QEMU cannot save the state of a machine whose memory is private")
    return MIGRATION + await _save_by_migration(qmp)


async def load_state(qmp: Qmp, state: bytes) -> None:
    """Load a state into a VM that waits for it; it stays stopped. Raises DriverFailed, Corrupt, Timeout."""
    kind, stream = state[:1], state[1:]
    if kind not in (DEVICES, MIGRATION) or len(stream) > STATE_LIMIT:
        raise Corrupt("not a device state of this driver")
    ended = qmp.expect("MIGRATION", lambda data: data.get("status") in ("completed", "failed"))
    ours, theirs = socket.socketpair()
    try:
        ours.setblocking(False)
        # All at once: QEMU takes commands in their order, and the stream waits for it in the socket.
        await all_of(
            _set_capabilities(qmp, ignore_shared=kind == MIGRATION),
            _hand_over(qmp, theirs),
            qmp.execute("migrate-incoming", {"uri": "fd:state"}),
            _feed(ours, stream),
        )
        await _migrated(ended)
    finally:
        ended.cancel()
        ours.close()


async def _hand_over(qmp: Qmp, theirs: socket.socket) -> None:
    """Give QEMU its end. Ours of it is closed then: should QEMU go, whoever writes to the other end is told."""
    with theirs:
        await qmp.execute("getfd", {"fdname": "state"}, fd=theirs.fileno())


async def _feed(sock: socket.socket, stream: bytes) -> None:
    with contextlib.suppress(OSError):  # QEMU gave up reading: the event says so
        await asyncio.get_running_loop().sock_sendall(sock, stream)
        sock.shutdown(socket.SHUT_WR)


async def _save_devices(qmp: Qmp) -> bytes:
    memory = os.memfd_create("recess-state", os.MFD_CLOEXEC)
    try:
        # QEMU opens the name for writing only, and a set's descriptor must have been opened the same way.
        writable = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            async with passed_file(qmp, writable) as name:
                await qmp.execute("xen-save-devices-state", {"filename": name, "live": False}, timeout_s=_TIMEOUT_S)
        finally:
            os.close(writable)
        return os.pread(memory, STATE_LIMIT, 0)
    finally:
        os.close(memory)


async def _save_by_migration(qmp: Qmp) -> bytes:
    await _set_capabilities(qmp, ignore_shared=True)
    ended = qmp.expect("MIGRATION", lambda data: data.get("status") in ("completed", "failed"))
    ours, theirs = socket.socketpair()
    try:
        ours.setblocking(False)
        with theirs:
            await qmp.execute("getfd", {"fdname": "state"}, fd=theirs.fileno())
        reading = asyncio.ensure_future(_read_all(ours))
        try:
            await qmp.execute("migrate", {"uri": "fd:state"})
            await _migrated(ended)
            return await reading
        finally:
            reading.cancel()
    finally:
        ended.cancel()
        ours.close()


async def _read_all(sock: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    out = bytearray()
    while data := await loop.sock_recv(sock, 1 << 20):
        out += data
        if len(out) > STATE_LIMIT:
            raise DriverFailed("QEMU's device state is implausibly large")
    return bytes(out)


async def _set_capabilities(qmp: Qmp, *, ignore_shared: bool) -> None:
    wanted = {"events": True, "x-ignore-shared": ignore_shared}
    capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
    await qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})


async def _migrated(ended: asyncio.Future[Mapping[str, Any]]) -> None:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            data = await ended
    except TimeoutError as exc:
        raise Timeout(f"QEMU did not move the device state within {_TIMEOUT_S:g} s") from exc
    if data.get("status") != "completed":
        raise DriverFailed("QEMU could not move the device state")
