from pathlib import Path

from recess.demo import seed


def make(home: Path) -> Path:
    (home / "blobs" / "ab").mkdir(parents=True)
    (home / "blobs" / "ab" / "x").write_bytes(b"1")
    (home / "recess.db").write_bytes(b"db")
    (home / "recess.db-wal").write_bytes(b"wal")
    (home / "secrets").mkdir()
    (home / "secrets" / "llm").write_text("sk")
    return home


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_seed_holds_database_and_blobs_and_nothing_else(tmp_path: Path) -> None:
    kept = seed.seed_path(tmp_path)
    assert not seed.sow(kept, tmp_path)
    seed.keep(make(tmp_path / "a"), kept)
    assert names(kept) == {"blobs/ab/x", "recess.db", "recess.db-wal"}
    (tmp_path / "b").mkdir()
    assert seed.sow(kept, tmp_path / "b")
    assert names(tmp_path / "b") == names(kept)
    assert seed.blobs_of(tmp_path / "b") == seed.blobs_of(tmp_path / "a") == frozenset({"blobs/ab/x"})


def test_a_newer_seed_replaces_the_older_and_leaves_no_rest(tmp_path: Path) -> None:
    kept = seed.seed_path(tmp_path)
    home = make(tmp_path / "a")
    seed.keep(home, kept)
    (home / "blobs" / "y").write_bytes(b"2")
    seed.keep(home, kept)
    assert "blobs/y" in names(kept)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", kept.name]
    seed.forget(kept)
    seed.forget(kept)
    assert not kept.exists()
