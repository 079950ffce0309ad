"""What this host's Firecracker is: versions, processors, the tiny guest's file, and what its end means."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from recess.config import load_config
from recess.drivers.firecracker import FirecrackerDriver, host
from recess.drivers.firecracker.start import check_spec
from recess.drivers.firecracker.tiny import tiny_kernel
from recess.drivers.kept.keeper import Obituary
from recess.errors import DriverFailed, InvalidSpec, MissingTool, Unsupported
from recess.node.drivers import choose_drivers
from tests.unit.drivers.firecracker.test_calls import make_spec


def program(folder: Path, says: str) -> Path:
    path = folder / "firecracker"
    path.write_text(f"#!/bin/sh\nprintf '%s' '{says}'\n")
    path.chmod(0o755)
    return path


def test_the_version_is_what_the_binary_says(tmp_path: Path) -> None:
    assert host.ask_version(program(tmp_path, "Firecracker v1.16.1\n\n2026-01-01 exiting")) == (1, 16, 1)


def test_something_else_is_not_taken_for_it(tmp_path: Path) -> None:
    with pytest.raises(DriverFailed, match="is not Firecracker"):
        host.ask_version(program(tmp_path, "QEMU emulator version 7.2"))
    with pytest.raises(DriverFailed, match="does not run"):
        host.ask_version(tmp_path)


def test_an_old_one_is_refused(tmp_path: Path) -> None:
    config = load_config(home=str(tmp_path), firecracker_bin=str(program(tmp_path, "Firecracker v1.15.9\n")))
    with pytest.raises(MissingTool, match=r"1\.15\.9 is too old"):
        host.read_host(config)


def test_one_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingTool, match="is not there") as caught:
        host.find_tools(load_config(home=str(tmp_path), firecracker_bin=str(tmp_path / "none")))
    assert "RECESS_FIRECRACKER_BIN" in caught.value.hint


def test_without_kvm_it_is_a_missing_tool(tmp_path: Path) -> None:
    with pytest.raises(MissingTool, match="needs hardware virtualisation"):
        host.check_kvm(tmp_path / "kvm")
    (tmp_path / "kvm").mkdir()  # may not be opened for writing, by root neither
    with pytest.raises(MissingTool, match="may not be opened"):
        host.check_kvm(tmp_path / "kvm")


def test_the_processor() -> None:
    text = (
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 23\nmodel\t\t: 1\nstepping\t: 2\n"
        "model name\t: AMD EPYC Processor\nflags\t\t: svm fpu\n\nprocessor\t: 1\nflags\t\t: other\n"
    )
    assert host.parse_cpu(text) == ("AMD EPYC Processor (AuthenticAMD/23/1/2)", ("fpu", "svm"))
    assert host.parse_cpu("") == ("unknown (?/?/?/?)", ())


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (Obituary("exit:0", "it ended by itself", ""), ""),
        (Obituary("signal:9", "deadline", ""), "did not end"),
        (Obituary("exit:1", "it ended by itself", "one\nno KVM\n"), "no KVM"),
        (Obituary("signal:11", "it ended by itself", ""), "signal 11"),
    ],
)
def test_the_end_of_the_tiny_guest(end: Obituary, said: str) -> None:
    found = host.verdict(end)
    assert (found == "") if not said else (said in found)


def test_the_tiny_kernel_is_a_64_bit_elf_with_one_segment_over_the_first_mebibyte() -> None:
    elf = tiny_kernel()
    assert elf[:6] == b"\x7fELF\x02\x01"
    machine, entry, table = struct.unpack_from("<2xHIQQ", elf, 16)[0], *struct.unpack_from("<QQ", elf, 24)
    kind, _flags, offset, _va, address, size, _memory, _align = struct.unpack_from("<IIQQQQQQ", elf, table)
    assert (machine, kind, entry) == (62, 1, address)
    assert address >= 1 << 20
    assert elf[offset : offset + size].endswith(bytes.fromhex("f4ebfd"))


def test_the_command_line_names_nothing_absolute_but_the_programs() -> None:
    words = host.command(Path("/opt/firecracker"))
    assert [word for word in words if word.startswith("/")] == ["/bin/sh", "/opt/firecracker", "/proc/self/fd/2"]


def test_what_it_lacks_is_refused() -> None:
    check_spec(make_spec())
    for changes in ({"memory_bytes": 1000}, {"cpus": 0}, {"cpus": 33}, {"disk_bytes": 5}):
        with pytest.raises(InvalidSpec):
            check_spec(make_spec(**changes))
    with pytest.raises(Unsupported):
        check_spec(make_spec(network="full"))


async def test_the_node_takes_it_by_name(tmp_path: Path) -> None:
    chosen = await choose_drivers(load_config(home=str(tmp_path), driver="firecracker"))
    assert isinstance(chosen.driver, FirecrackerDriver)
