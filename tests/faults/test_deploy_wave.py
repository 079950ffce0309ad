"""A hundred sessions in the middle of a turn while newer code is deployed: all of them end right. `make soak` does it with
processes (tools/deploy_wave.py)."""

from pathlib import Path

import pytest

from recess.testing.deploy_wave import deploy_wave
from recess.testing.session_world import AGENT_PACKAGE, world
from recess.testing.task_link import Borrowed, TaskLink, sdk


@pytest.mark.timeout(400)
@pytest.mark.parametrize("policy", ["turn", "now"])
async def test_a_hundred_sessions_through_a_deploy(tmp_path, policy):
    borrowed = Borrowed(tmp_path)
    load = sdk(AGENT_PACKAGE)
    try:
        # Agents that are told to end have all the time they need: a hundred of them share one interpreter.
        async with world(
            link=lambda folder: TaskLink(folder, borrowed, load), idle_timeout_s=3600.0, term_s=120.0, cancel_s=120.0
        ) as w:
            ended = await deploy_wave(w, 100, policy, tmp_path)
    finally:
        borrowed.give_back()
    assert ended == {"one" if policy == "turn" else "two": 100}


async def test_the_same_with_a_few_processes(tmp_path: Path):
    async with world(idle_timeout_s=3600.0, term_s=30.0) as w:
        assert await deploy_wave(w, 4, "now", tmp_path) == {"two": 4}
