"""Where groups of VMMs are made and what is written into them, on folders that look like groups; and, where this user may make
some, that the kernel keeps a program within them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recess.config import load_config
from recess.drivers.kept import disk
from recess.drivers.kept.cgroup import FOLDER, Groups, Limits, clear, own_group, remove
from recess.drivers.kept.keeper import Keeper, Process, launch, read_obituary, read_pids
from recess.drivers.kept.layout import Layout
from recess.errors import DriverFailed
from recess.machines.contract import BootFiles, VmSpec
from recess.units import GIB, MIB

LIMITS = Limits(memory_bytes=64 * MIB, processes=32, cpus=2)
BOOT = BootFiles(Path("/k"), "k", Path("/i"), "i", Path("/r"), "r")


def make_group(path: Path, controllers: str = "cpu io memory pids", switched_on: str = "") -> Path:
    """Make a folder that looks like a group."""
    path.mkdir(parents=True)
    (path / "cgroup.procs").touch()
    (path / "cgroup.controllers").write_text(controllers)
    (path / "cgroup.subtree_control").write_text(switched_on)
    return path


def own_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own"
    path.write_text(text)
    return path


def test_limits_are_a_little_more_than_the_machine() -> None:
    spec = VmSpec(memory_bytes=GIB, cpus=2, disk_bytes=GIB, boot=BOOT)
    limits = Limits.of(spec, 32 * MIB)
    assert limits == Limits(GIB + 16 * MIB + 32 * MIB + 256 * MIB, 128, 3)
    assert LIMITS.files(("cpu", "memory", "pids")) == {
        "cpu.max": "200000 100000", "memory.max": str(64 * MIB), "memory.oom.group": "1", "pids.max": "32",
    }  # fmt: skip
    assert LIMITS.files(("pids",)) == {"pids.max": "32"}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("0::/a/b\n", "/a/b"),
        ("9:memory:/x\n0::/\n", "/"),
        ("9:memory:/x\n", None),
        ("0::/../outside\n", None),
        ("", None),
    ],
)
def test_its_own_group(text: str, path: str | None) -> None:
    found = own_group(text)
    assert (None if found is None else str(found)) == path


def test_the_topmost_group_that_may_be_written_is_taken(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    make_group(mount, switched_on="cpu memory pids")
    make_group(mount / "user")
    make_group(mount / FOLDER, controllers="memory pids", switched_on="memory pids")
    found = Groups.find(mount, own_file(tmp_path, "0::/user\n"))
    assert (found.top, found.controllers, found.why) == (mount / FOLDER, ("memory", "pids"), "")


def test_an_ordinary_users_is_the_one_handed_over(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "cgroup.controllers").touch()  # no group's files to write: as for a user without rights
    handed = make_group(mount / "slice" / "user", controllers="memory", switched_on="memory")
    make_group(handed / FOLDER, controllers="memory", switched_on="memory")
    make_group(handed / "app")
    found = Groups.find(mount, own_file(tmp_path, "0::/slice/user/app\n"))
    assert (found.top, found.controllers) == (handed / FOLDER, ("memory",))


def test_why_there_are_none(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    assert "no cgroup 2" in Groups.find(mount, own_file(tmp_path, "0::/\n")).why
    mount.mkdir()
    (mount / "cgroup.controllers").touch()
    assert "may make no" in Groups.find(mount, own_file(tmp_path, "0::/\n")).why
    assert "in no control group" in Groups.find(mount, own_file(tmp_path, "1:memory:/\n")).why
    group = make_group(mount / "group", controllers="io")
    make_group(group / FOLDER, controllers="")
    none = Groups.find(mount, own_file(tmp_path, "0::/group\n"))
    assert "hands no controller on" in none.why
    assert none.make(LIMITS) is None
    none.sweep()


@pytest.mark.parametrize(
    ("kind", "processes"), [("domain", "17\n18\n"), ("domain threaded", ""), ("domain invalid", "")]
)
def test_a_group_that_can_limit_none_below_it_is_left_alone(tmp_path: Path, kind: str, processes: str) -> None:
    """As in a container, whose processes are in the topmost group that can be seen: controllers could be switched on there
    that would make a group below it one which nothing may join."""
    mount = make_group(tmp_path / "mount")
    (mount / "cgroup.type").write_text(kind)
    (mount / "cgroup.procs").write_text(processes)
    found = Groups.find(mount, own_file(tmp_path, "0::/\n"))
    assert found.top is None
    assert "processes of its own" in found.why
    assert not (mount / FOLDER).exists()
    assert (mount / "cgroup.subtree_control").read_text() == ""


def test_controllers_are_switched_on_for_what_is_below(tmp_path: Path) -> None:
    mount = make_group(tmp_path / "mount", controllers="cpu io memory")
    make_group(mount / FOLDER, controllers="memory")
    Groups.find(mount, own_file(tmp_path, "0::/\n"))
    assert (mount / "cgroup.subtree_control").read_text() == "+memory"  # the last of two: each is written by itself
    assert (mount / FOLDER / "cgroup.subtree_control").read_text() == "+memory"


def test_what_servers_that_are_gone_have_left_is_removed(tmp_path: Path) -> None:
    groups = Groups(tmp_path, ("memory",), "")
    me = os.getpid()
    mine = tmp_path / f"{me}-{Process.of(me).start}-1"
    of_the_dead = tmp_path / f"{me}-{Process.of(me).start + 1}-1"  # of an earlier process with this pid
    strange = tmp_path / "somebody-elses"
    for path in (mine, of_the_dead, strange):
        path.mkdir()
    groups.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((mine.name, strange.name))


def test_a_group_that_cannot_be_limited_is_not_left(tmp_path: Path) -> None:
    groups = Groups(tmp_path, ("memory",), "")
    with pytest.raises(ValueError, match="null byte"):
        groups.make(_Odd(64, 1, 1))
    assert not list(tmp_path.iterdir())


class _Odd(Limits):
    """Limits whose file has a name that no file can have."""

    def files(self, controllers: object) -> dict[str, str]:
        return {"memory\0max": "1"}


def test_what_cannot_be_cleared_stays(tmp_path: Path) -> None:
    group = tmp_path / "group"
    clear(group, 1)  # one that is gone already
    group.mkdir()
    (group / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    clear(group, 0.01)
    assert (group / "cgroup.kill").read_text() == "1"
    assert group.exists()


# --- the kernel's ------------------------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[Path]:
    """A group with little memory, as a server makes it."""
    groups = Groups.find()
    made = groups.make(LIMITS)
    if made is None:
        pytest.skip(groups.why)
    yield made
    remove(made)
    assert not made.exists()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "run", tmp_path / "machine")
    layout.run.mkdir()
    layout.directory.mkdir()
    os.close(disk.create_sparse(layout.ram, 16 * 4096))
    return layout


def test_a_group_is_cleared_of_what_is_in_it(group: Path) -> None:
    shell = subprocess.Popen(["/bin/sh", "-c", "read _; sleep 60 & wait"], stdin=subprocess.PIPE)
    try:
        (group / "cgroup.procs").write_text(str(shell.pid))
        assert shell.stdin is not None
        shell.stdin.write(b"\n")
        shell.stdin.close()
        clear(group, 120)
        assert not group.exists()
        assert shell.wait(120) == -signal.SIGKILL
    finally:
        shell.kill()
        shell.wait()


async def test_it_runs_within_its_group_which_goes_with_it(group: Path, layout: Layout) -> None:
    launch(load_config().bin_dir / "keeper", layout, layout.ram, ["/bin/sleep", "60"], group=group)
    keeper = Keeper.connect(layout)
    try:
        assert (group / "cgroup.procs").read_text().split() == [str(read_pids(layout)["vmm"].pid)]
        assert (group / "memory.max").read_text().strip() == str(LIMITS.memory_bytes)
        await keeper.kill()
        await asyncio.wait_for(keeper.gone, 120)
        assert not group.exists()
    finally:
        keeper.close()


async def test_one_that_wants_more_memory_is_ended_and_its_keeper_says_why(group: Path, layout: Layout) -> None:
    hungry = [sys.executable, "-c", "import time\nx = bytearray(200 << 20)\ntime.sleep(60)"]
    launch(load_config().bin_dir / "keeper", layout, layout.ram, hungry, group=group)
    try:
        keeper = Keeper.connect(layout)
        end = await asyncio.wait_for(keeper.death, 120)
        keeper.close()
    except DriverFailed:  # it was ended before we came
        found = read_obituary(layout)
        assert found is not None
        end = found
    assert (end.end, end.reason) == ("signal:9", "it wanted more memory than its limit")
    assert not group.exists()


def test_a_group_that_is_gone_is_an_error_and_nothing_runs(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(DriverFailed, match="could not be started"):
        launch(load_config().bin_dir / "keeper", layout, layout.ram, ["/bin/sleep", "60"], group=tmp_path / "none")
    assert read_pids(layout) == {}
