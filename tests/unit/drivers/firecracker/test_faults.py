"""What Firecracker says of its memory is hostile input: checked before anything is done with it, and from whom."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recess.drivers.firecracker import faults
from recess.drivers.firecracker.calls import FAULT_SOCKET
from recess.drivers.firecracker.faults import FaultSocket, may_catch_faults, parse_regions
from recess.drivers.kept.layout import socket_address
from recess.errors import DriverFailed

SIZE = 1 << 20


def region(address: int = 0x7F00_0000_0000, offset: int = 0, size: int = SIZE, page: int = 4096) -> dict[str, Any]:
    both = {"page_size": page, "page_size_kib": page}
    return {"base_host_virt_addr": address, "size": size, "offset": offset, **both}


def test_one_region_and_two() -> None:
    assert parse_regions(json.dumps([region()]).encode(), SIZE) == [(0x7F00_0000_0000, 0, 256)]
    two = [region(size=SIZE // 2, offset=SIZE // 2), region(address=0x6F00_0000_0000, size=SIZE // 2)]
    assert parse_regions(json.dumps(two).encode(), SIZE) == [(0x7F00_0000_0000, 128, 128), (0x6F00_0000_0000, 0, 128)]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        {},
        None,
        5,
        [5],
        [{}],
        [region(page=2 << 20)],
        [region(size=SIZE - 1)],
        [region(size=SIZE // 2)],
        [region(size=2 * SIZE)],
        [region(), region()],
        [region(address=1)],
        [region(address=-4096)],
        [region(size=0)],
        [region(offset=4096)],
        [region(size=4096, offset=n * 4096) for n in range(256)],
        [{**region(), "offset": "x"}],
        [{**region(), "size": None}],
        [{**region(), "size": float("inf")}],
    ],
)
def test_anything_else_is_refused(rows: Any) -> None:
    with pytest.raises(DriverFailed):
        parse_regions(json.dumps(rows).encode(), SIZE)


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(DriverFailed):
        parse_regions(b"[" * 60_000, SIZE)


@given(st.binary(max_size=200))
def test_garbage_is_refused(message: bytes) -> None:
    with pytest.raises(DriverFailed):
        parse_regions(message, SIZE)


def test_who_may_have_memory_by_page_faults(tmp_path: Path) -> None:
    device, allowed = tmp_path / "device", tmp_path / "allowed"

    def may(*, root: bool, jailed: bool) -> bool:
        return may_catch_faults(root=root, jailed=jailed, device=device, allowed=allowed)

    assert may(root=True, jailed=False)
    assert not may(root=True, jailed=True)  # its user is another, without rights
    assert not may(root=False, jailed=False)
    allowed.write_text("0\n")
    assert not may(root=False, jailed=False)
    device.touch()
    assert may(root=True, jailed=True)
    assert may(root=False, jailed=False)
    device.unlink()
    allowed.write_text("1\n")
    assert may(root=False, jailed=False)
    assert may(root=True, jailed=True)


async def connect(run: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with socket_address(run, FAULT_SOCKET) as address:
        sock.connect(address)
    return sock


def pid_of(pidfd: int) -> int:
    (line,) = [row for row in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines() if row.startswith("Pid:")]
    return int(line.split()[1])


@pytest.mark.parametrize("option", [faults._SO_PEERPIDFD, 9999])
async def test_the_descriptor_comes_with_the_regions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: int
) -> None:
    """And a pidfd of who sent it: from the socket, or, of a kernel that has no such option, by its pid."""
    monkeypatch.setattr(faults, "_SO_PEERPIDFD", option)
    taking = FaultSocket.open(tmp_path)
    receiving = asyncio.ensure_future(taking.receive([os.getpid()], SIZE))
    ours = os.memfd_create("uffd")
    with await connect(tmp_path) as sock:
        socket.send_fds(sock, [json.dumps([region()]).encode()], [ours])
        fd, process, segments = await receiving
    assert os.fstat(fd).st_ino == os.fstat(ours).st_ino
    assert pid_of(process) == os.getpid()
    assert segments == [(0x7F00_0000_0000, 0, 256)]
    for one in (fd, process, ours):
        os.close(one)
    taking.close()
    taking.close()


async def test_another_process_is_not_heard(tmp_path: Path) -> None:
    taking = FaultSocket.open(tmp_path)
    with await connect(tmp_path), pytest.raises(DriverFailed, match="is not the machine's VMM"):
        await taking.receive([os.getpid() + 1], SIZE)
    taking.close()


@pytest.mark.parametrize("count", [0, 2, 4])
async def test_exactly_one_descriptor(tmp_path: Path, count: int) -> None:
    taking = FaultSocket.open(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    ours = os.memfd_create("uffd")
    with await connect(tmp_path) as sock:
        message = json.dumps([region()]).encode()
        if count:
            socket.send_fds(sock, [message], [ours] * count)
        else:
            sock.send(message)
        with pytest.raises(DriverFailed, match="descriptors"):
            await taking.receive([os.getpid()], SIZE)
    os.close(ours)
    assert len(os.listdir("/proc/self/fd")) == before
    taking.close()


async def test_a_refused_message_leaves_no_descriptor(tmp_path: Path) -> None:
    taking = FaultSocket.open(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    ours = os.memfd_create("uffd")
    with await connect(tmp_path) as sock:
        socket.send_fds(sock, [b"[]"], [ours])
        with pytest.raises(DriverFailed):
            await taking.receive([os.getpid()], SIZE)
    os.close(ours)
    assert len(os.listdir("/proc/self/fd")) == before
    taking.close()
