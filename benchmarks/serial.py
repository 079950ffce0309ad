"""What a bare virtio-serial port carries: `dd` at its device in the guest, `recv` and `send` at its socket on the host.

No protocol, no credit, nobody's process between: the most that files and ports through such a port could ever reach.
"""

from __future__ import annotations

import asyncio
import socket
import time

from benchmarks.bare import BareVm
from recess.guestlink.link import ExecRequest

# The port's device: controllers are numbered as the kernel found them.
_DEVICE = "port=/dev/$(basename $(dirname $(grep -lx raw /sys/class/virtio-ports/*/name)))"
PIECE = 1 << 20
_BOUND_S = 60.0


def _port_of(vm: BareVm) -> socket.socket:
    port = socket.socket(socket.AF_UNIX)
    port.settimeout(_BOUND_S)
    port.connect(str(vm.raw_port))
    return port


async def _guest(vm: BareVm, script: str) -> None:
    code = await (await vm.link.exec(ExecRequest(argv=["sh", "-c", script]))).wait()
    if code:
        raise RuntimeError(f"{script}: {code}")


def _receive(port: socket.socket, count: int) -> float:
    """Return MB/s from the first byte on: the start of the sender is not the port's."""
    first = len(port.recv(PIECE))
    began, got = time.perf_counter(), 0
    while first + got < count:
        got += len(port.recv(PIECE))
    return got / (time.perf_counter() - began) / 1e6


def _send(port: socket.socket, count: int) -> None:
    piece = bytes(PIECE)
    for _ in range(count // PIECE):
        port.sendall(piece)


async def out(vm: BareVm, count: int) -> float:
    """Return MB/s out of the guest, over `count` bytes."""
    with _port_of(vm) as port:
        sending = asyncio.create_task(
            _guest(vm, f"{_DEVICE}; dd if=/dev/zero of=$port bs=1M count={count // PIECE} 2>/dev/null")
        )
        rate = await asyncio.to_thread(_receive, port, count)
        await sending
    return rate


async def into(vm: BareVm, count: int) -> float:
    """Return MB/s into the guest, over `count` bytes, until its reader has ended."""
    with _port_of(vm) as port:
        reading = asyncio.create_task(_guest(vm, f"{_DEVICE}; head -c {count} $port > /dev/null"))
        began = time.perf_counter()
        await asyncio.to_thread(_send, port, count)
        await reading
    return count / (time.perf_counter() - began) / 1e6
