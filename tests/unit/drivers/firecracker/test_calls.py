"""Every request that the driver makes is one that Firecracker's own API description takes (description.py). Those of whole
procedures are checked by the program that plays Firecracker, which refuses others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recess.drivers.firecracker import calls
from recess.drivers.firecracker.calls import Call
from recess.machines.contract import BootFiles, VmSpec
from recess.units import GIB, MIB
from tests.unit.drivers.firecracker.description import check


def make_spec(**changes: Any) -> VmSpec:
    boot = BootFiles(Path("/k"), "kk", Path("/i"), "ii", Path("/r"), "rr", cmdline_extra="extra=1")
    return VmSpec(**{"memory_bytes": 512 * MIB, "cpus": 2, "disk_bytes": GIB, "boot": boot, **changes})


CALLS = [
    *calls.boot_calls(make_spec()),
    *calls.boot_calls(make_spec(cpus=1, memory_bytes=8 * GIB)),
    *calls.tiny_calls(),
    calls.pause(),
    calls.resume(),
    calls.create_snapshot(calls.FULL, "s", "m"),
    calls.create_snapshot(calls.DIFF, "s", "m"),
    calls.load_snapshot("s", calls.FILE, "m"),
    calls.load_snapshot("s", calls.UFFD, "m"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.method} {call.path}")
def test_it_is_in_the_description(call: Call) -> None:
    assert check(call.method, call.path, call.body) == []


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (Call("PUT", "/nothing", {}), "no such call"),
        (Call("PATCH", "/vm", {"state": "Asleep"}), "may not be"),
        (Call("PATCH", "/vm", {}), "is missing"),
        (Call("PATCH", "/vm", {"state": "Paused", "more": 1}), "unknown field"),
        (Call("PUT", "/machine-config", {"vcpu_count": 64, "mem_size_mib": 1}), "out of bounds"),
        (Call("PUT", "/machine-config", {"vcpu_count": True, "mem_size_mib": 1}), "is no integer"),
        (calls.load_snapshot("s", "Other", "m"), "may not be"),
        (Call("PUT", "/drives/a", {"drive_id": "b", "is_root_device": False}), "differs"),
    ],
)
def test_the_check_would_notice(call: Call, said: str) -> None:
    assert said in "; ".join(check(call.method, call.path, call.body))


def test_changes_are_tracked_from_the_first_instruction_and_after_each_load() -> None:
    assert calls.machine_config(make_spec())["track_dirty_pages"] is True
    assert calls.load_snapshot("s", calls.FILE, "m").body["track_dirty_pages"] is True


def test_a_boot_ends_with_the_start_and_names_no_path_of_the_host() -> None:
    made = calls.boot_calls(make_spec())
    assert made[-1].body == {"action_type": "InstanceStart"}
    names = [
        value for call in made for key, value in call.body.items() if key.endswith("path") or key == "path_on_host"
    ]
    assert names == ["kernel", "initrd", "root", "disk", "v.sock"]


def test_a_machine_without_a_card_names_no_network() -> None:
    """Neither at a boot nor at a load (`network_overrides`, which an empty list is by default): there is nothing to override."""
    assert all("network" not in json.dumps([call.path, call.body]) for call in CALLS)


def test_the_kernel_is_told_of_disks_and_channel() -> None:
    words = calls.kernel_command_line(make_spec()).split()
    assert {"recess.root=/dev/vda", "recess.disk=/dev/vdb", "recess.vsock=1024", "extra=1"} <= set(words)
