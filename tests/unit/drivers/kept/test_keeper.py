"""The real keeper with ordinary programs in the place of QEMU."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from recess.config import load_config
from recess.drivers.kept import disk
from recess.drivers.kept.keeper import Keeper, Obituary, Process, end_vm, launch, read_obituary, read_pids, wait_gone
from recess.drivers.kept.layout import KEEPER_SOCKET, Layout, socket_address
from recess.errors import DriverFailed

_clients: list[Keeper] = []
BINARY = load_config().bin_dir / "keeper"


@pytest.fixture
async def layout(tmp_path: Path) -> AsyncIterator[Layout]:
    layout = Layout(tmp_path / "run", tmp_path / "machine")
    layout.run.mkdir()
    layout.directory.mkdir()
    os.close(disk.create_sparse(layout.ram, 16 * 4096))
    yield layout
    await end_vm(layout, None)
    while _clients:
        _clients.pop().close()


def start(layout: Layout, *argv: str) -> Keeper:
    launch(BINARY, layout, layout.ram, argv)
    return connect(layout)


def tethered(layout: Layout) -> tuple[Keeper, int]:
    """Start a program that hangs on the pipe whose end comes back."""
    watched, ours = os.pipe()
    launch(BINARY, layout, layout.ram, ["/bin/sleep", "60"], tether=watched)
    os.close(watched)
    return connect(layout), ours


def connect(layout: Layout) -> Keeper:
    _clients.append(Keeper.connect(layout))
    return _clients[-1]


async def ended(layout: Layout, *argv: str) -> Obituary:
    """Start a program that ends by itself, perhaps before we have connected, and return how it ended."""
    try:
        return await asyncio.wait_for(start(layout, *argv).death, 20)
    except DriverFailed:
        obituary = read_obituary(layout)
        assert obituary is not None
        return obituary


async def test_it_outlives_whoever_started_it_and_cleans_up(layout: Layout) -> None:
    keeper = start(layout, "/bin/sleep", "60")
    pids = read_pids(layout)
    assert pids["vmm"].alive()
    assert os.getsid(pids["keeper"].pid) not in (os.getsid(0), os.getsid(pids["vmm"].pid))
    second = connect(layout)  # another server
    await second.kill()
    for client in (keeper, second):
        obituary = await asyncio.wait_for(client.death, 5)
        assert (obituary.end, obituary.reason) == ("signal:9", "killed")
        await asyncio.wait_for(client.gone, 5)
    assert not layout.run.exists()
    assert layout.end_record.read_text().startswith("dead signal:9 killed")


async def test_last_words_and_exit_code_are_told(layout: Layout) -> None:
    obituary = await ended(layout, "/bin/sh", "-c", "echo alas >&2; echo con >&4; exit 3")
    assert obituary.end == "exit:3"
    assert "alas" in obituary.log
    assert obituary.line() == "it ended by itself (exit code 3)"
    assert layout.console.read_text() == "con\n"


async def test_a_tethered_one_ends_with_its_server(layout: Layout) -> None:
    """Whoever dies without a word takes it along; a word sets it free for good."""
    keeper, ours = tethered(layout)
    assert await keeper.tracking() == ("none", "", False)  # no pager: nothing keeps a capture waiting
    os.close(ours)
    assert (await asyncio.wait_for(keeper.death, 20)).line() == "nobody is left to use it (signal 9)"


async def test_a_word_unties_it(layout: Layout) -> None:
    keeper, ours = tethered(layout)
    os.write(ours, b"taken")
    os.close(ours)
    await keeper.tracking()  # served after the pipe was looked at
    assert read_pids(layout)["vmm"].alive()


@pytest.fixture
def pager() -> Iterator[subprocess.Popen[bytes]]:
    """A process that plays a pager."""
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        yield process
        process.kill()


async def test_a_pagers_end_is_the_machines_whoever_holds_its_pipe(
    layout: Layout, pager: subprocess.Popen[bytes]
) -> None:
    keeper = start(layout, "/bin/sleep", "60")
    watched, held = os.pipe()
    process = os.pidfd_open(pager.pid)
    with pytest.raises(DriverFailed, match="no pager is watched"):
        await keeper._ask("guard-process", process)
    await keeper.guard(watched, process)
    assert (await keeper.tracking())[2]  # pages are being brought
    pager.kill()
    assert (await asyncio.wait_for(keeper.death, 20)).line() == "its pager died (signal 9)"
    for fd in (watched, held, process):
        os.close(fd)


async def test_a_pager_that_is_done_may_end(layout: Layout, pager: subprocess.Popen[bytes]) -> None:
    keeper = start(layout, "/bin/sleep", "60")
    watched, held = os.pipe()
    process = os.pidfd_open(pager.pid)
    await keeper.guard(watched, process)
    os.write(held, b"filled")
    pager.kill()
    for fd in (watched, held, process):
        os.close(fd)
    await asyncio.wait_for(keeper.filled.wait(), 20)
    await keeper.tracking()
    assert read_pids(layout)["vmm"].alive()


async def test_it_moves_to_another_machine(layout: Layout, tmp_path: Path) -> None:
    """Run folder, console and record are those of the machine that takes it: later on, nothing is left elsewhere."""
    waits = Layout(tmp_path / "waits", tmp_path / "waits")
    waits.run.mkdir()
    os.mkfifo(waits.run / "go")
    launch(BINARY, waits, layout.ram, ["/bin/sh", "-c", "echo one >&4; read line < go; echo two >&4; exit 7"])
    keeper = connect(waits)
    layout.end_record.write_text("dead exit:0 of an earlier life\n")
    layout.run.rename(tmp_path / "aside")  # what the fixture made there
    waits.run.rename(layout.run)
    await keeper.move(layout)
    assert read_obituary(layout) is None
    second = connect(layout)  # its socket is where the folder is
    await asyncio.to_thread((layout.run / "go").write_text, "on\n")
    assert (await asyncio.wait_for(second.death, 20)).end == "exit:7"
    await asyncio.wait_for(keeper.gone, 20)
    assert read_obituary(layout) == second.death.result()
    assert layout.console.read_text() == "one\ntwo\n"
    assert not layout.run.exists()


async def test_a_deadline_can_be_moved_and_then_kills(layout: Layout) -> None:
    keeper = start(layout, "/bin/sleep", "60")
    await keeper.deadline(0.2)
    await keeper.deadline(60)
    await asyncio.sleep(0.3)
    assert not keeper.death.done()
    await keeper.deadline(0)
    assert (await asyncio.wait_for(keeper.death, 5)).reason == "deadline passed"


async def test_a_dead_keeper_takes_the_vmm_along(layout: Layout) -> None:
    keeper = start(layout, "/bin/sleep", "60")
    pids = read_pids(layout)
    os.kill(pids["keeper"].pid, signal.SIGKILL)
    assert await wait_gone(pids["vmm"].pid, 5)
    assert (await asyncio.wait_for(keeper.death, 5)).reason == "its keeper is gone"
    with pytest.raises(DriverFailed):
        await keeper.kill()
    await end_vm(layout, keeper)
    assert not layout.run.exists()


async def test_sigterm_ends_both(layout: Layout) -> None:
    keeper = start(layout, "/bin/sleep", "60")
    os.kill(read_pids(layout)["keeper"].pid, signal.SIGTERM)
    assert "told to stop" in (await asyncio.wait_for(keeper.death, 5)).reason


async def test_a_flooded_console_stays_small(layout: Layout) -> None:
    script = "head -c 5000000 /dev/zero | tr '\\0' 'x' >&4; echo end >&4"
    await ended(layout, "/bin/sh", "-c", script)
    data = layout.console.read_bytes()
    assert len(data) <= 1 << 20
    assert data.endswith(b"xend\n")


async def test_secrets_of_the_environment_stay_out(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_API_KEY", "hush")
    log = (await ended(layout, "/usr/bin/env")).log
    assert "PATH=" in log
    assert "hush" not in log


async def test_a_program_that_is_not_there(layout: Layout) -> None:
    with pytest.raises(DriverFailed, match="No such file"):
        launch(BINARY, layout, layout.ram, ["/nonexistent/qemu"])
    assert not layout.run.exists()


async def test_no_keeper(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(DriverFailed, match="no keeper"):
        launch(tmp_path / "absent", layout, layout.ram, ["/bin/true"])


async def test_nonsense_is_answered_and_harms_nobody(layout: Layout) -> None:
    keeper = start(layout, "/bin/sleep", "60")
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with socket_address(layout.run, KEEPER_SOCKET) as address:
        stranger.connect(address)
    stranger.settimeout(5)
    for request in (b"\xff\xfe", b"inject 5", b"inject 99999999999999999999", b"deadline -1", b"x" * 5000):
        stranger.send(request)
        assert stranger.recv(200).startswith(b"err bad-request")
    stranger.close()
    with pytest.raises(DriverFailed, match="not mapped"):
        await keeper.capture("private")  # sleep has no RAM file
    await keeper.kill()
    await asyncio.wait_for(keeper.gone, 5)


async def test_shared_memory_is_captured_from_its_file(layout: Layout) -> None:
    fd = os.open(layout.ram, os.O_RDWR)
    os.pwrite(fd, b"\7" * 4096, 3 * 4096)
    os.pwrite(fd, bytes(4096), 9 * 4096)
    os.close(fd)
    keeper = start(layout, "/bin/sleep", "60")
    packed = disk.map_packed(*await keeper.capture("file"))
    assert bytes(packed.pages.indices) == (3).to_bytes(4, "little")
    assert bytes(packed.pages.data) == b"\7" * 4096
    everything = disk.map_packed(*await keeper.capture("file-all"))
    assert everything.pages.count == 2
    await keeper.kill()
    await asyncio.wait_for(keeper.gone, 5)


def test_a_process_is_known_by_its_start_time() -> None:
    me = Process(os.getpid(), int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]))
    assert me.alive()
    assert not Process(me.pid, me.start + 1).alive()
    Process(me.pid, me.start + 1).kill()  # another process: nothing happens
