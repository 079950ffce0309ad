from dataclasses import replace

import pytest

from recess.config import load_config
from recess.node.doctor import HostFacts, judge_host, read_host, tool_version
from recess.units import GIB, MIB

GOOD = HostFacts(
    system="Linux",
    machine="x86_64",
    kernel=(6, 1),
    python=(3, 11),
    cores=2,
    memory_bytes=8 * GIB,
    shared_path="/dev/shm",
    shared_free_bytes=4 * GIB,
    home="/home/me",
    home_writable=True,
    home_free_bytes=20 * GIB,
    kvm="ready",
    user_is_root=False,
    tools={"qemu-system-x86_64": "QEMU 7.2", "mkfs.ext4": "1.47", "mmdebstrap": "1.3.5", "newuidmap": ""},
    programs={"guestd": True, "keeper": True},
    base_image=True,
    guest_kernel="debian (linux-image 6.1, 0123)",
)


def verdict(facts: HostFacts, name: str):
    return next(c for c in judge_host(facts) if c.name == name)


def test_a_good_host_passes_without_a_hint():
    assert [c for c in judge_host(GOOD) if not c.ok or c.hint] == []


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        ({"system": "Darwin"}, "platform", "Linux on x86_64"),
        ({"machine": "aarch64"}, "platform", "Linux on x86_64"),
        ({"kernel": (4, 19)}, "platform", "5.10"),
        ({"memory_bytes": GIB}, "memory", "at least"),
        ({"shared_free_bytes": 64 * MIB}, "shared memory", "RECESS_RUN_DIR"),
        ({"home_writable": False}, "home", "RECESS_HOME"),
        ({"home_free_bytes": GIB}, "home", "make room"),
        ({"tools": {"qemu-system-x86_64": None}}, "qemu-system-x86_64", "apt-get install qemu-system-x86"),
        ({"tools": {"mkfs.ext4": None}}, "mkfs.ext4", "apt-get install e2fsprogs"),
        ({"programs": {"keeper": False}}, "keeper", "make setup"),
        ({"base_image": False}, "base image", "make setup"),
        ({"guest_kernel": ""}, "guest kernel", "make setup"),
        ({"kernel_problem": "the trimmed kernel is not built"}, "guest kernel", "RECESS_KERNEL"),
    ],
)
def test_what_stops_machines_fails_with_what_to_do(change, name, says):
    check = verdict(replace(GOOD, **change), name)
    assert not check.ok
    assert says in check.hint


@pytest.mark.parametrize(
    ("change", "name"),
    [({"kvm": "absent"}, "kvm"), ({"kvm": "denied"}, "kvm"), ({"tools": {"mmdebstrap": None}}, "mmdebstrap")],
)
def test_what_only_slows_or_limits_is_told_but_passes(change, name):
    check = verdict(replace(GOOD, **change), name)
    assert check.ok
    assert check.detail
    assert check.detail != verdict(GOOD, name).detail


def test_root_needs_no_id_maps():
    names = [c.name for c in judge_host(replace(GOOD, user_is_root=True, tools={"newuidmap": None}))]
    assert "newuidmap" not in names


def test_this_host_is_read(tmp_path):
    facts = read_host(load_config({}, home=str(tmp_path / "not" / "yet")), base_image=False)
    assert facts.system == "Linux"
    assert facts.cores >= 1
    assert facts.memory_bytes > 256 * MIB
    assert facts.home == str(tmp_path)
    assert set(facts.tools) == {"qemu-system-x86_64", "mkfs.ext4", "mmdebstrap", "newuidmap"}
    assert verdict(facts, "base image").ok is False


def test_versions_of_tools():
    assert tool_version("no-such-tool", ("--version",)) is None
    assert "e2fs" in (tool_version("mkfs.ext4", ("-V",)) or "").lower()
    assert tool_version("true", ()) == ""
