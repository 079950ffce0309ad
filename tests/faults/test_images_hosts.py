"""Hosts on which an image or a kernel cannot be made: typed, says what to do, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from recess.errors import OutOfSpace, Unavailable
from recess.images import ImageStore
from recess.images.kernel_debian import fetch_kernel
from recess.testing.small_disk import small_disk


@pytest.mark.mounts
@pytest.mark.machines
def test_the_temporary_folder_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "small", 16 << 20) as small:
        monkeypatch.setattr("tempfile.tempdir", str(small))
        images = tmp_path / "images"
        with pytest.raises(OutOfSpace, match=r"free in .*small") as caught:
            ImageStore(images).ensure_base()
        assert "TMPDIR" in caught.value.hint
        assert list(small.iterdir()) == []
        assert [p for p in images.rglob("*") if p.is_file()] == []


def test_the_mirror_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lists" / "partial").mkdir(parents=True)
    (tmp_path / "sources.list").write_text("deb http://127.0.0.1:9/debian bookworm main\n")
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{tmp_path}/sources.list";\nDir::Etc::SourceParts "/dev/null";\n'
        f'Dir::State::Lists "{tmp_path}/lists";\nDir::State::Status "/dev/null";\nDir::Cache "{tmp_path}";\n'
        'Acquire::http::Proxy "false";\nAcquire::Retries "0";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    with pytest.raises(Unavailable, match="the package mirror cannot be reached") as caught:
        fetch_kernel(tmp_path / "images", lambda _line: None)
    assert "apt's sources" in caught.value.hint
