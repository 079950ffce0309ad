"""Journal, layout, tiny kernel, sizes from /proc, and what is asked of a host only once."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from recess.config import Config
from recess.drivers.kept.capturing import clear_capturing, interrupted_capture, mark_capturing
from recess.drivers.kept.keeper import parse_obituary
from recess.drivers.kept.layout import Layout, layout_for
from recess.drivers.kept.stats import parse_smaps
from recess.drivers.qemu import host
from recess.drivers.qemu.argv import Qemu
from recess.drivers.qemu.host import HostFacts, choose_accelerator, host_facts
from recess.drivers.qemu.journal import Journal, read_journal, write_journal
from recess.drivers.qemu.pvh import EXIT_CODE, tiny_kernel
from recess.drivers.qemu.start import check_spec
from recess.errors import BadInput, DriverFailed, InvalidSpec, MissingTool
from recess.machines.contract import BootFiles, VmSpec

BOOT = BootFiles(Path("/i/vmlinux"), "k", Path("/i/initrd"), "n", Path("/i/root"), "r", "x=1")
SPEC = VmSpec(memory_bytes=512 << 20, cpus=1, disk_bytes=4 << 30, boot=BOOT)
JOURNAL = Journal("x", "/home/m/x", SPEC, "running", "/t/ram", "template", "/t/disk", "tcg", False)


def test_a_journal_comes_back_whole(tmp_path: Path) -> None:
    layout = Layout(tmp_path, tmp_path)
    write_journal(layout, JOURNAL)
    assert read_journal(layout) == JOURNAL


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"version": 1, "vm_id": 5}'])
def test_a_damaged_journal_is_none(tmp_path: Path, text: str) -> None:
    layout = Layout(tmp_path, tmp_path)
    layout.journal.write_text(text)
    assert read_journal(layout) is None


def test_another_version_of_the_journal_is_none(tmp_path: Path) -> None:
    layout = Layout(tmp_path, tmp_path)
    write_journal(layout, replace(JOURNAL, version=2))
    assert read_journal(layout) is None


def test_the_capture_mark(tmp_path: Path) -> None:
    layout = Layout(tmp_path, tmp_path)
    assert interrupted_capture(layout) == ""
    mark_capturing(layout, "running")
    assert interrupted_capture(layout) == "running"
    clear_capturing(layout)
    clear_capturing(layout)
    assert interrupted_capture(layout) == ""


@pytest.mark.parametrize("vm_id", ["", "..", "../x", "a/b", ".hidden", "a\0b"])
def test_an_id_that_is_no_name_is_refused(vm_id: str) -> None:
    with pytest.raises(BadInput):
        layout_for(Path("/run"), vm_id, Path("/m"))


def test_the_tiny_kernel_is_an_elf_file_with_the_entry_note() -> None:
    image = tiny_kernel()
    assert image[:4] == b"\x7fELF"
    assert EXIT_CODE == 85
    entry, phoff = struct.unpack_from("<II", image, 24)
    kinds = [struct.unpack_from("<II", image, phoff + 32 * i) for i in range(2)]
    (note_offset,) = [offset for kind, offset in kinds if kind == 4]
    assert struct.unpack_from("<III4sI", image, note_offset) == (4, 4, 18, b"Xen\0", entry)


def test_an_obituary_may_be_cut() -> None:
    assert parse_obituary("dead exit:1 it ended by itself\nlog\nmore").log == "log\nmore"
    assert parse_obituary("dead").end == "unknown"


def test_smaps() -> None:
    assert parse_smaps("55-ff ---p 0 0 0 [rollup]\nRss: 100 kB\nPss:   7 kB\n") == {"Rss": 102400, "Pss": 7168}


@pytest.mark.parametrize("change", [{"memory_bytes": 1000}, {"cpus": 0}, {"disk_bytes": 4097}, {"disk_bytes": 0}])
def test_a_spec_that_qemu_would_refuse(change: dict[str, int]) -> None:
    with pytest.raises(InvalidSpec):
        check_spec(replace(SPEC, **change))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "keeper").touch()
    (tmp_path / "qemu").touch()
    return Config(home=tmp_path, run_dir=tmp_path / "run", qemu_bin=str(tmp_path / "qemu"), bin_dir=tmp_path)


async def test_facts_are_found_once_until_something_changes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    async def inspect(config: Config, binary: Path, _keeper: Path, *, tb_mib: int) -> HostFacts:
        found.append(binary)
        return HostFacts(Qemu(binary, (7, 2, 22), "tcg", tb_mib), ("sse2",), 2_300_000, "because")

    config.run_dir.mkdir()
    monkeypatch.setattr(host, "inspect_host", inspect)
    first = await host_facts(config, tb_mib=32)
    assert await host_facts(config, tb_mib=32) == first
    assert len(found) == 1
    await host_facts(config, tb_mib=32, fresh=True)
    assert len(found) == 2
    Path(config.qemu_bin).write_text("another")
    await host_facts(config, tb_mib=32)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("pinned", "verdict", "expected"),
    [("auto", "", "kvm"), ("auto", "slow", "tcg"), ("kvm", "", "kvm"), ("tcg", "", "tcg")],
)
async def test_kvm_is_taken_only_if_it_runs_a_guest(
    config: Config, monkeypatch: pytest.MonkeyPatch, pinned: str, verdict: str, expected: str
) -> None:
    async def run(*_args: object) -> str:
        return verdict

    monkeypatch.setattr(host, "run_tiny_guest", run)
    monkeypatch.setattr(host.os, "access", lambda *_args: True)
    chosen, why = await choose_accelerator(replace(config, accelerator=pinned), Path("/q"), Path("/k"))
    assert chosen == expected
    assert why


async def test_a_pinned_kvm_that_does_not_work_is_an_error(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(*_args: object) -> str:
        return "no"

    monkeypatch.setattr(host, "run_tiny_guest", run)
    monkeypatch.setattr(host.os, "access", lambda *_args: True)
    with pytest.raises(DriverFailed, match="KVM"):
        await choose_accelerator(replace(config, accelerator="kvm"), Path("/q"), Path("/k"))


def test_missing_tools_have_a_hint(config: Config) -> None:
    with pytest.raises(MissingTool, match="QEMU"):
        host.find_tools(replace(config, qemu_bin="/nonexistent"))
    with pytest.raises(MissingTool, match="keeper") as caught:
        host.find_tools(replace(config, bin_dir=Path("/nonexistent")))
    assert caught.value.hint
