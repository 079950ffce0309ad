import stat

from recess.config import load_config
from recess.demo.world import example_folder, make_home, server_command, server_tail, story_config


def test_the_storys_home_is_private_shares_images_and_holds_the_keys(tmp_path) -> None:
    user = load_config({}, home=str(tmp_path / "user"))
    home = make_home(user, {"llm": "sk-1"})
    assert home.parent == user.home
    assert (home / "images").resolve() == user.images_dir
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "secrets" / "llm").stat().st_mode) == 0o600


def test_the_story_keeps_the_users_driver_but_not_the_users_state(tmp_path) -> None:
    user = load_config({"RECESS_DRIVER": "fake", "RECESS_RUN_DIR": "/x/run"}, home=str(tmp_path / "user"))
    config = story_config(user, tmp_path / "story")
    assert (config.driver, config.home) == ("fake", tmp_path / "story")
    assert config.run_dir != user.run_dir
    command = server_command(config)
    assert command[0] == "env"
    assert f"RECESS_HOME={config.home}" in command
    assert f"RECESS_RUN_DIR={config.run_dir}" in command
    assert "RECESS_URL=" in command
    assert "sk-" not in " ".join(command)
    assert server_tail(config) == ""


def test_the_example_is_found_and_both_versions_parse() -> None:
    folder = example_folder()
    for name in ("agent.py", "agent_v2.py"):
        compile((folder / name).read_text(), name, "exec")
