"""Configuration: precedence, unknown keys, wrong types."""

import pytest

from recess.config import load_config
from recess.errors import BadInput


def test_precedence_argument_environment_file_default(tmp_path):
    (tmp_path / "config.toml").write_text('idle_timeout_s = 5\nlease_s = 7\ndriver = "fake"\n')
    env = {"RECESS_HOME": str(tmp_path), "RECESS_LEASE_S": "9"}
    config = load_config(env, driver="qemu")
    assert (config.idle_timeout_s, config.lease_s, config.driver, config.zstd_level) == (5.0, 9.0, "qemu", 1)
    assert config.database_path == tmp_path / "recess.db"


def test_unknown_key_is_named(tmp_path):
    (tmp_path / "config.toml").write_text("idle = 5\n")
    with pytest.raises(BadInput, match="'idle'"):
        load_config({"RECESS_HOME": str(tmp_path)})


def test_wrong_type_and_broken_file(tmp_path):
    with pytest.raises(BadInput, match="lease_s"):
        load_config({"RECESS_HOME": str(tmp_path), "RECESS_LEASE_S": "soon"})
    (tmp_path / "config.toml").write_text("= 5\n")
    with pytest.raises(BadInput, match=r"config\.toml"):
        load_config({"RECESS_HOME": str(tmp_path)})


def test_two_homes_have_two_run_dirs_and_short_socket_paths(tmp_path):
    a, b = (load_config({}, home=tmp_path / name) for name in ("a", "b" * 200))
    assert a.run_dir != b.run_dir
    assert len(str(b.socket_path)) < 100


def test_xdg_and_home_defaults():
    assert str(load_config({"XDG_DATA_HOME": "/x"}).home) == "/x/recess"
    assert str(load_config({"HOME": "/h"}).home) == "/h/.local/share/recess"


@pytest.mark.parametrize("content", [b"driver = ", b"\xff\xfe", b'home = "/elsewhere"'])
def test_a_file_that_cannot_be_meant_is_refused(tmp_path, content):
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(BadInput, match=r"config\.toml"):
        load_config({}, home=tmp_path)


def test_a_database_address_holds_a_password_and_is_not_shown(tmp_path):
    url = "postgresql://me:secret@host/db"
    config = load_config({"RECESS_HOME": str(tmp_path), "RECESS_DATABASE_URL": url})
    assert config.database_url == url
    assert "secret" not in repr(config)
