"""Run folders whose home is gone give their memory back; all others stay."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import pytest

from recess.config import load_config
from recess.node.orphans import claim_run_dir, remove_orphans


@pytest.fixture
def place(tmp_path):
    """Return a function that makes a home with a claimed run folder."""

    def make(name):
        home, run = tmp_path / name, tmp_path / f"recess-{os.getuid()}-{name}"
        home.mkdir()
        run.mkdir()
        config = replace(load_config(home=home), run_dir=run)
        claim_run_dir(config)
        return config

    return make


def test_only_a_home_that_is_gone_loses_its_run_folder(place, tmp_path):
    mine, other, gone = place("mine"), place("other"), place("gone")
    (gone.run_dir / "templates").mkdir()
    (gone.run_dir / "templates" / "ram").write_bytes(b"x" * 4096)
    gone.home.rmdir()
    unclaimed = tmp_path / f"recess-{os.getuid()}-unclaimed"
    unclaimed.mkdir()
    assert remove_orphans(mine) == [gone.run_dir]
    assert not gone.run_dir.exists()
    assert mine.run_dir.is_dir()
    assert other.run_dir.is_dir()
    assert unclaimed.is_dir()
    assert remove_orphans(mine) == []


def test_one_that_a_process_lives_in_stays_until_it_ends(place):
    mine, gone = place("mine"), place("gone")
    (gone.run_dir / "m").mkdir()
    gone.home.rmdir()
    with subprocess.Popen(["sleep", "60"], cwd=gone.run_dir / "m") as living:
        try:
            assert remove_orphans(mine) == []
        finally:
            living.kill()
    assert remove_orphans(mine) == [gone.run_dir]


def test_neither_links_nor_our_own_are_followed(place, tmp_path):
    mine, gone = place("mine"), place("gone")
    gone.home.rmdir()
    link = tmp_path / f"recess-{os.getuid()}-link"
    link.symlink_to(gone.run_dir)
    mine.home.rmdir()
    assert remove_orphans(mine) == [gone.run_dir]
    assert link.is_symlink()
    assert mine.run_dir.is_dir()
