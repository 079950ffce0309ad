"""What of a machine's start is decided before anything runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from recess.drivers.gvisor import runsc, start
from recess.errors import InvalidSpec
from recess.machines.contract import BootFiles, Fingerprint, VmSpec

NOWHERE = Path("/nowhere")
SPEC = VmSpec(64 << 20, 1, 64 << 20, BootFiles(NOWHERE, "k", NOWHERE, "i", NOWHERE, "r"))


def test_a_machine_gets_as_many_processors_as_it_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1, 2, 5, 7})
    seen = {tuple(start.cores_for(f"mch_{n}", 3)) for n in range(64)}
    assert all(len(cores) == 3 and set(cores) < {1, 2, 5, 7} for cores in seen)
    assert len(seen) > 1  # not all machines on the same ones
    assert start.cores_for("mch_1", 3) == start.cores_for("mch_1", 3)
    assert start.cores_for("mch_1", 4) == start.cores_for("mch_1", 9) == []


def test_its_limits_have_room_for_a_snapshot_of_all_its_memory() -> None:
    limits = start.limits_of(SPEC)
    assert limits.memory_bytes > 2 * SPEC.memory_bytes + (128 << 20)
    assert limits.cpus > SPEC.cpus


async def test_more_than_the_host_has_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    mark = Fingerprint("gvisor", "1", "systrap", "host", (), "", "")
    place = start.Place(start.Layout(NOWHERE, NOWHERE), runsc.Runsc(NOWHERE, "1", ""), NOWHERE, mark)
    with pytest.raises(InvalidSpec, match="3 CPUs: this host has 2"):
        await start.boot(place, replace(SPEC, cpus=3), for_template=False)


def test_the_command_line_names_them() -> None:
    assert runsc.quoted(["runsc", "run"], [2, 5])[-5:] == ["taskset", "-c", "2,5", "runsc", "run"]
    assert runsc.quoted(["runsc", "run"])[-2:] == ["runsc", "run"]
