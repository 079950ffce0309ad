"""The jail: what it is made of, that its files are mounted for it alone, and that nothing of it outlives its keeper."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from recess.config import load_config
from recess.drivers.firecracker import jail as jails
from recess.drivers.firecracker.handles import end_machine, family
from recess.drivers.firecracker.jail import UIDS, Jail
from recess.drivers.kept import keeper as keepers
from recess.drivers.kept.keeper import Keeper
from recess.drivers.kept.layout import Layout, layout_for

KEEPER = load_config().bin_dir / "keeper"
# In the jailer's place: says what it was given and what it sees, and stays.
JAILER = """#!/bin/sh
while [ "$1" != -- ]; do
  case $1 in --chroot-base-dir) base=$2 ;; --id) id=$2 ;; --uid) uid=$2 ;; esac
  shift 2
done
cd "$base/firecracker/$id/root" || exit 3
echo "uid $uid, kernel $(cat kernel), disk $(cat disk), shm $(cat shm/state), $*"
exec sleep 1000
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = layout_for(tmp_path / "run", "mch_a", tmp_path / "machine")
    layout.directory.mkdir()
    (layout.run / jails.SHM).mkdir(parents=True)
    return layout


def make_jail(layout: Layout) -> Jail:
    folder = layout.directory.parent
    binary = folder / "firecracker"
    binary.touch()
    (folder / "jailer").write_text(JAILER)
    (folder / "jailer").chmod(0o755)
    return jails.jail_of(binary, layout)


def test_its_names_are_the_machines_own(layout: Layout, tmp_path: Path) -> None:
    one = make_jail(layout)
    other = make_jail(layout_for(tmp_path / "run", "mch_b", tmp_path / "other"))
    assert one == make_jail(layout)
    assert one.id != other.id
    assert one.id.isalnum()
    assert len(one.id) <= 64
    assert one.uid in UIDS
    assert one.root == layout.directory / "jail" / "firecracker" / one.id / "root"


def test_who_is_jailed(tmp_path: Path) -> None:
    binary = tmp_path / "firecracker"
    assert "only root" in jails.why_no_jail(binary, root=False)
    assert "no jailer" in jails.why_no_jail(binary, root=True)
    (tmp_path / "jailer").touch()
    assert jails.why_no_jail(binary, root=True) == ""


def test_names_with_odd_characters_stay_one_word(layout: Layout, tmp_path: Path) -> None:
    odd = tmp_path / "a b'; reboot"
    words = jails.command(make_jail(layout), KEEPER, layout.run / jails.SHM, {"root": odd})
    at = words.index("--file")
    assert words[at : at + 3] == ["--file", "root", str(odd)]


def test_a_file_that_the_user_must_read_becomes_readable(layout: Layout, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    secret, disk = tmp_path / "kernel", tmp_path / "disk"
    for path in (secret, disk):
        path.touch(mode=0o600)
    jail = make_jail(layout)
    jails.prepare(jail, layout.run / jails.SHM, {"kernel": secret}, disk)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o644
    assert (disk.stat().st_uid, (layout.run / jails.SHM).stat().st_uid) == (jail.uid, jail.uid)
    assert secret.stat().st_uid == 0


@pytest.mark.mounts
@pytest.mark.parametrize("who", ["keeper", "us"])
async def test_its_files_are_there_and_it_ends_with_its_keeper(layout: Layout, tmp_path: Path, who: str) -> None:
    jail = make_jail(layout)
    jail.root.mkdir(parents=True)
    files = {"kernel": tmp_path / "k", "disk": tmp_path / "d"}
    for name, path in files.items():
        path.write_text(f"the {name}")
    (layout.run / jails.SHM / "state").write_text("the state")
    argv = jails.command(jail, KEEPER, layout.run / jails.SHM, files)
    await asyncio.to_thread(keepers.launch, KEEPER, layout, tmp_path / "k", argv)
    keeper = Keeper.connect(layout)
    try:
        wanted = (
            f"uid {jail.uid}, kernel the kernel, disk the disk, shm the state, -- --api-sock api.sock --level Error\n"
        )
        async with asyncio.timeout(60):
            while not layout.console.is_file() or layout.console.read_text() != wanted:
                assert not keeper.death.done(), keeper.death.result()
                await asyncio.sleep(0.01)  # a file that grows is no event
        assert (jail.root / "kernel").read_text() == "", "the mounts are the jail's alone"
        members = family(layout)
        assert len(members) == 4  # keeper, the jail's outer and first process, "Firecracker"
        if who == "keeper":
            members[0].kill()
            for member in members:
                assert await keepers.wait_gone(member.pid, 60)
        await end_machine(layout, keeper, jail, "")
        assert not any(member.alive() for member in members)
        assert not jail.base.exists()
        assert not layout.run.exists()
    finally:
        await end_machine(layout, keeper, jail, "")
        keeper.close()
