"""A second image for tests of a change of image: the root of `base` but for a word in one file. It must know no machine."""

from __future__ import annotations

import shutil
from pathlib import Path

from recess.config import Config
from recess.images import ImageStore


def with_second_image(config: Config) -> None:
    """Give the home a store of its own that has `base`, and `second`: the same root but for a word in one file."""
    shared, own = config.images_dir.resolve(), config.images_dir
    own.unlink()
    own.mkdir()
    for entry in shared.iterdir():
        if entry.name not in ("names", "roots", "tmp"):
            (own / entry.name).symlink_to(entry)
    (own / "names").mkdir()
    shutil.copy(shared / "names" / "base.json", own / "names")
    (own / "roots").mkdir()
    base = ImageStore(shared).get("base")
    (own / "roots" / base.root_hash).symlink_to(shared / "roots" / base.root_hash)

    def make(work: Path) -> Path:
        root = work / "root.erofs"
        data = base.root_path.read_bytes()  # stored as it is, so that a word can be changed in place
        assert data.count(b" 12 (bookworm)") >= 1
        root.write_bytes(data.replace(b" 12 (bookworm)", b" 12 (bookwurm)"))
        return root

    second = ImageStore(own).put("second", make, {})
    assert second.root_hash != base.root_hash
