"""The command lines, as data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from recess.drivers.kept.layout import Layout
from recess.drivers.qemu.argv import FILTER_OPTION, Qemu, command, kernel_command_line
from recess.machines.contract import BootFiles, VmSpec

BOOT = BootFiles(Path("/i/vmlinux"), "k", Path("/i/initrd"), "n", Path("/i/root,1.erofs"), "r", "debug=1")
SPEC = VmSpec(memory_bytes=512 << 20, cpus=2, disk_bytes=4 << 30, boot=BOOT)
LAYOUT = Layout(Path("/run/m/x"), Path("/home/u/machines/x"))
QEMU = Qemu(Path("/usr/bin/qemu"), (7, 2, 22), "tcg", 64)


def value_of(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def nodes(argv: list[str]) -> dict[str, dict[str, object]]:
    found = [json.loads(argv[i + 1]) for i, word in enumerate(argv) if word == "-blockdev"]
    return {str(node["node-name"]): node for node in found}


def test_kernel_parameters_name_root_disk_and_clock() -> None:
    words = kernel_command_line(SPEC, 2_299_997).split()
    for wanted in (
        "recess.root=/dev/vda", "recess.rootfs=erofs", "recess.disk=/dev/vdb", "console=ttyS0", "quiet", "panic=-1",
        "reboot=t", "init_on_free=1", "init_on_alloc=0", "mitigations=off", "random.trust_cpu=on", "tsc=reliable",
        "no_timer_check", "nokaslr", "cryptomgr.notests", "audit=0", "tsc_early_khz=2299997", "debug=1",
    ):  # fmt: skip
        assert wanted in words


@pytest.mark.parametrize(("memory_mib", "cache"), [(64, 32), (256, 32), (512, 64), (1024, 128), (8192, 512)])
def test_the_cache_of_translated_code_is_an_eighth_of_the_memory(memory_mib: int, cache: int) -> None:
    spec = replace(SPEC, memory_bytes=memory_mib << 20)
    argv = command(replace(QEMU, tb_mib=32), spec, LAYOUT, ram=LAYOUT.ram, share=True, boot="quiet")
    assert value_of(argv, "-accel") == f"tcg,thread=multi,tb-size={cache}"


def test_a_boot_has_a_kernel_and_a_restore_has_none() -> None:
    boot = command(QEMU, SPEC, LAYOUT, ram=LAYOUT.ram, share=True, boot="quiet")
    restore = command(QEMU, SPEC, LAYOUT, ram=Path("/t/ram"), share=False, boot=None)
    assert value_of(boot, "-kernel") == "/i/vmlinux"
    assert value_of(boot, "-append") == "quiet"
    assert "-kernel" not in restore
    assert value_of(restore, "-incoming") == "defer"
    assert value_of(restore, "-global") == "migration.send-configuration=off"
    assert "-S" in boot
    assert "-S" in restore


def test_it_confines_itself_where_it_can() -> None:
    plain = command(QEMU, SPEC, LAYOUT, ram=LAYOUT.ram, share=True, boot=None)
    confined = command(replace(QEMU, confines=True), SPEC, LAYOUT, ram=LAYOUT.ram, share=True, boot=None)
    assert FILTER_OPTION not in plain
    words = value_of(confined, FILTER_OPTION).split(",")
    assert words[0] == "on"
    assert {"spawn=deny", "elevateprivileges=deny"} <= set(words)


def test_both_have_the_same_devices_in_the_same_order() -> None:
    def devices(argv: list[str]) -> list[str]:
        return [argv[i + 1] for i, word in enumerate(argv) if word == "-device"]

    boot = command(QEMU, SPEC, LAYOUT, ram=LAYOUT.ram, share=True, boot="quiet")
    restore = command(QEMU, SPEC, LAYOUT, ram=Path("/t/ram"), share=False, boot=None)
    assert devices(boot) == devices(restore)
    assert value_of(boot, "-M") == value_of(restore, "-M")
    assert "name=recess" in devices(boot)[-1]


def test_ram_is_private_to_a_fork_and_shared_at_boot() -> None:
    fork = json.loads(value_of(command(QEMU, SPEC, LAYOUT, ram=Path("/t/ram"), share=False, boot=None), "-object"))
    assert fork == {
        "qom-type": "memory-backend-file", "id": "ram0", "size": 512 << 20, "mem-path": "/t/ram", "share": False, "merge": False,
    }  # fmt: skip


def test_disks_root_is_read_only_and_paths_may_hold_anything() -> None:
    found = nodes(command(QEMU, SPEC, LAYOUT, ram=LAYOUT.ram, share=True, boot="quiet"))
    assert found["root-file"]["filename"] == "/i/root,1.erofs"
    assert found["root"]["read-only"] is True
    assert found["disk"]["read-only"] is False
    assert found["disk-file"]["filename"] == str(LAYOUT.disk)


def test_reconnecting_is_said_as_the_version_wants_it() -> None:
    old = command(QEMU, SPEC, LAYOUT, ram=LAYOUT.ram, share=True, boot="")
    new = command(replace(QEMU, version=(10, 0, 2)), SPEC, LAYOUT, ram=LAYOUT.ram, share=True, boot="")
    assert any("id=link" in word and word.endswith("reconnect=1") for word in old)
    assert any("id=link" in word and word.endswith("reconnect-ms=50") for word in new)


def test_kvm_takes_no_translation_cache() -> None:
    argv = command(replace(QEMU, accelerator="kvm"), SPEC, LAYOUT, ram=LAYOUT.ram, share=True, boot="")
    assert value_of(argv, "-accel") == "kvm"


def test_software_cpus_lack_what_is_only_fast_or_right_in_hardware() -> None:
    def cpu(accelerator: str) -> str:
        qemu = replace(QEMU, accelerator=accelerator)
        return value_of(command(qemu, SPEC, LAYOUT, ram=LAYOUT.ram, share=True, boot="quiet"), "-cpu")

    assert cpu("tcg") == "max,erms=off,fsrm=off,avx2=off"
    assert cpu("kvm") == "max"
