import stat
from pathlib import Path

import pytest

from recess.broker import SecretStore
from recess.errors import BadInput, Refused


def test_round_trip_is_private_and_does_not_show_itself(tmp_path: Path) -> None:
    store = SecretStore(tmp_path / "s")
    store.put("llm", "sk-1\n")
    secret = store.get("llm")
    assert secret is not None
    assert secret.reveal() == "sk-1"
    assert "sk-1" not in f"{secret} {secret!r}"
    assert stat.S_IMODE((tmp_path / "s" / "llm").stat().st_mode) == 0o600
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["llm"]
    assert store.names() == ["llm"]


def test_extra_wins_and_names_are_merged(tmp_path: Path) -> None:
    store = SecretStore(tmp_path, {"llm": "from-env"})
    store.put("llm", "from-file")
    store.put("pay", "p")
    found = store.get("llm")
    assert found is not None
    assert found.reveal() == "from-env"
    assert store.names() == ["llm", "pay"]


def test_a_file_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "llm").write_text("sk-1")
    (tmp_path / "llm").chmod(0o644)
    with pytest.raises(Refused, match="open to others"):
        SecretStore(tmp_path).get("llm")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("x")
    (tmp_path / "llm").symlink_to(tmp_path / "real")
    with pytest.raises(Refused, match="symbolic"):
        SecretStore(tmp_path).get("llm")


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    store = SecretStore(tmp_path)
    (tmp_path / "llm").mkdir()  # what the finished file cannot replace
    with pytest.raises(Refused, match="cannot be kept"):
        store.put("llm", "sk-1")
    assert [p.name for p in tmp_path.iterdir()] == ["llm"]


@pytest.mark.parametrize("value", ["", " \n", "a\nb", "a\rb", "é", "x" * 20000, "a\0b"])
def test_a_value_that_is_no_header_is_refused_unshown(tmp_path: Path, value: str) -> None:
    with pytest.raises(BadInput) as caught:
        SecretStore(tmp_path).put("llm", value)
    assert "a\nb" not in str(caught.value)


def test_absent_removed_and_badly_named(tmp_path: Path) -> None:
    store = SecretStore(tmp_path)
    assert store.get("llm") is None
    assert store.get("../etc/passwd") is None
    store.put("llm", "v")
    assert store.remove("llm")
    assert not store.remove("llm")
    assert store.get("llm") is None
    with pytest.raises(BadInput):
        store.put("../x", "v")
    with pytest.raises(Refused):
        SecretStore().put("llm", "v")
