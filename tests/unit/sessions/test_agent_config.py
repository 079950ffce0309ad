"""Settings are read from the source without running it, and checked."""

import pytest

from recess.errors import BadInput
from recess.sessions.agent_config import check_config, config_from_source
from recess.sessions.code_tar import build, sdk_files
from recess.testing.session_world import AGENT_PACKAGE

SOURCE = """
raise SystemExit("never run on the host")
import recess_agent
@recess_agent.agent(image="dev", idle="90s", tools=[a, b], memory="1G", allow=["pypi.org"])
async def me(s): ...
"""


def test_literals_of_the_decorator():
    found = config_from_source(SOURCE)
    assert found == {"image": "dev", "idle": "90s", "memory": "1G", "allow": ["pypi.org"]}
    config = check_config(found)
    assert (config.image, config.idle_s, config.memory_bytes, config.allow) == ("dev", 90.0, 1 << 30, ("pypi.org",))
    assert config.machine_spec("ses_1").labels == {"session": "ses_1"}
    assert config_from_source("x = 1") == {}


@pytest.mark.parametrize("source", ["def (", "@agent(image=NAME)\nasync def a(s): ...", "x = '\x00'"])
def test_unreadable_source(source):
    with pytest.raises(BadInput):
        config_from_source(source)


@pytest.mark.parametrize(
    "config",
    [{"colour": 1}, {"policy": "soon"}, {"cpus": 0}, {"cpus": True}, {"idle": "soon"}, {"memory": "big"}, {"allow": "x"}, {"env": {"A": 1}}],
)  # fmt: skip
def test_wrong_settings_are_named(config):
    with pytest.raises(
        BadInput, match=next(iter(config)) if "idle" not in config and "memory" not in config else "not a"
    ):
        check_config(config)


@pytest.mark.parametrize(
    "config", [{"routes": {"llm": ""}}, {"routes": {"LLM": "http://x"}}, {"allow": ["*.*"]}], ids=str
)
def test_a_policy_that_no_machine_could_have_is_told_when_it_is_deployed(config):
    with pytest.raises(BadInput):
        check_config(config)


def test_the_archive_is_the_same_bytes_for_the_same_files():
    files = {"agent.py": b"x", "lib/a/b.py": b"y", **sdk_files(AGENT_PACKAGE)}
    assert build(files) == build(dict(reversed(files.items())))
    assert b"lib/a/" in build(files)
