"""What takes space on a node: the parts that need no node."""

from dataclasses import replace
from pathlib import Path

from recess.config import Config
from recess.node.usage import Kind, allotted_bytes, caches, waiting

NAME = "waiting VMs (memory)"


def test_what_waits_is_one_line() -> None:
    assert waiting({}) == Kind(NAME, 0, 0, 0, 0)
    one = {"waiting": 2, "memory_bytes": 44, "limit": 4, "taken": 1, "missed": 1}
    assert waiting({"qemu": one, "other": {**one, "waiting": 1}}) == Kind(NAME, 3, 0, 88, 88)


def test_what_is_made_again_counts_and_could_all_go(tmp_path: Path) -> None:
    config = Config(home=tmp_path, run_dir=tmp_path / "run")
    assert [(kind.kind, kind.count, kind.bytes) for kind in caches(config)] == [
        ("page files", 0, 0), ("packed exports", 0, 0),
    ]  # fmt: skip
    config.pages_dir.mkdir()
    (config.pages_dir / "a.pages").write_bytes(b"x" * 10_000)
    (config.pages_dir / "snp_1.map").write_bytes(b"x")
    pages = caches(config)[0]
    assert (pages.count, pages.active) == (1, 0)
    assert pages.bytes == pages.reclaimable_bytes == allotted_bytes(config.pages_dir) >= 10_000
    assert caches(replace(config, store="s3://bucket/x"))[-1].kind == "copies of the store"
