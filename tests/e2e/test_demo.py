"""The main job: `recess demo` on real machines, as a user runs it, on each driver. It checks itself; here we check that it
did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recess.config import load_config
from recess.demo.processes import processes_of
from recess.testing.gvisor_rig import has_runsc

ACTS = ["start", "build", "lunch", "message", "fork", "crash", "upgrade", "end"]
MOVED = {
    "lunch": {"durable_s", "freeze_to_gone_s", "stored_bytes", "memory_given_back_bytes"},
    "message": {"rung", "restore_s", "thawed_s", "accepted_s"},
    "fork": {"first_fork_s", "durable_s", "stored_bytes"},
    "crash": {"rung", "restore_s", "recovered_s"},
}


def left_homes(folder: Path) -> set[str]:
    """Return the homes of tellings; the template that is kept for the next one (the seed) is none."""
    return {p.name for p in folder.glob("demo-*") if not p.name.startswith("demo-seed-")}


@pytest.mark.machines
@pytest.mark.e2e
@pytest.mark.timeout(400)
@pytest.mark.parametrize("driver", ["qemu", "gvisor"])
def test_the_story_holds_and_leaves_nothing_behind(tmp_path: Path, driver: str) -> None:
    if driver == "gvisor" and not has_runsc():
        pytest.skip("runsc is not installed")
    report_path = tmp_path / "report.json"
    homes = load_config().home
    before = left_homes(homes)
    done = subprocess.run(
        [sys.executable, "-m", "recess.cli.main", "demo", "--json", str(report_path)],
        env={**os.environ, "RECESS_DRIVER": driver}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=380, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    report = json.loads(report_path.read_text())
    assert report["ok"], report["error"]
    assert [step["name"] for step in report["steps"]] == ACTS
    assert report["checks"] >= 40
    for step in report["steps"]:
        assert set(step["figures"]) >= MOVED.get(step["name"], set()), step
    assert left_homes(homes) == before
    assert not processes_of(homes / "demo-")
    assert "the story holds" in done.stdout
