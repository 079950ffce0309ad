"""The disk on which an image is made fills up: typed, says which disk, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from recess.errors import OutOfSpace
from recess.images import ImageStore
from recess.testing.small_disk import small_disk


@pytest.mark.mounts
@pytest.mark.machines
def test_the_temporary_folder_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "small", 16 << 20) as small:
        monkeypatch.setattr("tempfile.tempdir", str(small))
        images = tmp_path / "images"
        with pytest.raises(OutOfSpace, match="free in .*small") as caught:
            ImageStore(images).ensure_base()
        assert "TMPDIR" in caught.value.hint
        assert list(small.iterdir()) == []
        assert [p for p in images.rglob("*") if p.is_file()] == []
