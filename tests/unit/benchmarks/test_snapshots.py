"""The comparison's report and its skips: pure parts of `recess bench snapshots`."""

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.bare import Files
from benchmarks.limits import limits
from benchmarks.peers import Missing, measure_peers
from benchmarks.plots import plot_snapshots
from benchmarks.snapshots import FIRST, OURS, against_limits, ahead, markdown
from benchmarks.workload import DIRTIER

SIDE = {"standstill": [0.02, 0.03, 0.04], "durable": [0.1, 0.2, 0.3], "stored": [2e6], "restore": [0.3]}
OTHER = {"standstill": [0.3], "durable": [0.5], "stored": [96e6], "restore": []}
FACTS = {"date": "2026-11-23", "cpu": "a CPU", "cores": 2, "load": (1.0, 1.0, 1.0)}


def report():
    found = {
        "sides": {OURS: SIDE, FIRST: SIDE, "other": OTHER},
        "skipped": {"third": "skipped: it is not installed: apt install third"},
        "limits": {"raw": [5e6] * 3, "memcpy": [0.001] * 3, "zstd": [0.04] * 3, "fsync": [0.01] * 3},
    }
    return markdown(found, FACTS, 3)


def test_the_table_has_medians_ratios_limits_and_who_was_skipped():
    text = report()
    assert "| Recess | 30 / 40 | 200 / 300 | 2 / 2 | 300 / 300 |" in text
    assert "| other | 300 / 300 (10.0 x) | 500 / 500 (2.5 x) | 96 / 96 (48.0 x) | - |" in text
    assert "- third: skipped: it is not installed: apt install third" in text
    assert "- durable: ahead of other, the best of the others, which is 2.50 x ours." in text
    assert "| zstd alone, to our durable time | 40 / 40 | 5 / 7.5 x |" in text
    assert "| memcpy, to our standstill | 1 / 1 | 30 / 40 x |" in text
    assert "- Goal: durable within 1.5 x of zstd and one fsync: 4.00 x, missed." in text


def test_whoever_is_behind_is_told():
    slow = {**SIDE, "standstill": [0.6], "durable": [0.06]}
    assert (
        ahead({OURS: slow, "other": OTHER})[0]
        == "- standstill: behind other, the best of the others, which is 0.50 x ours."
    )
    limit = {"raw": [5e6], "memcpy": [0.001], "zstd": [0.04], "fsync": [0.01]}
    assert against_limits(slow, limit)[-1] == "- Goal: durable within 1.5 x of zstd and one fsync: 1.20 x, met."
    assert against_limits(slow, {name: [] for name in limit}) == []


def test_the_work_says_ready_when_it_changes_memory():
    """Making what it writes takes seconds in the guest: snapshots before that would find nothing changed."""
    assert DIRTIER.index("print(") > DIRTIER.index("block = bytearray")
    compile(DIRTIER, "work", "exec")


async def each(monkeypatch, tmp_path, found, wanted=()):
    monkeypatch.setattr(peers, "PEERS", found)
    files = Files("qemu", tmp_path, tmp_path, tmp_path, tmp_path, 512, 1)
    return {name: one async for name, one in measure_peers(files, tmp_path, "", 1, list(wanted))}


async def test_a_peer_that_is_missing_or_fails_is_named_and_the_others_run(monkeypatch, tmp_path):
    async def missing(*_):
        raise Missing("no such program: apt install it")

    async def broken(*_):
        raise RuntimeError("it said no")

    async def fine(*_):
        return SIDE

    peers_ = {"A one": missing, "B two": broken, "C three": fine}
    got = await each(monkeypatch, tmp_path, peers_)
    assert got == {
        "A one": "skipped: no such program: apt install it", "B two": "failed: RuntimeError('it said no')", "C three": SIDE,
    }  # fmt: skip
    assert list(await each(monkeypatch, tmp_path, peers_, ["three"])) == ["C three"]
    assert not any(path.is_dir() and any(path.iterdir()) for path in tmp_path.iterdir())


@pytest.mark.parametrize("peer", [peers.qemu_savevm, peers.virsh_managedsave, peers.runsc_save])
async def test_a_host_without_the_programs_says_how_to_get_them(monkeypatch, tmp_path, peer):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("RECESS_HOME", str(tmp_path))
    files = Files("qemu", tmp_path, tmp_path, tmp_path, tmp_path, 512, 1)
    with pytest.raises(Missing, match="apt install"):
        await peer(files, tmp_path, "", 1)


def test_limits_leave_nothing_behind(tmp_path):
    found = limits(np.ones((100, 4096), np.uint8), tmp_path, level=1)
    assert sorted(found) == ["fsync", "memcpy", "zstd"]
    assert all(seconds > 0 for seconds in found.values())
    assert list(tmp_path.iterdir()) == []


def test_plots_or_the_reason_why_there_are_none(tmp_path):
    said = plot_snapshots({OURS: SIDE, "other": OTHER}, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists() == said.startswith("plots:")
    assert said.startswith(("plots:", "no plots: matplotlib is not installed"))
