"""The crash matrix on real machines: the strikes that are another thing there than on processes, on one session whose machine is
struck again and again. The whole of it, on both databases, is `python tools/crash_matrix.py 1 1 machines machines-postgres` (`make soak`)."""

from __future__ import annotations

import pytest

from recess.config import Config
from recess.testing.session_account import CountingPayments
from recess.testing.session_matrix import Round
from recess.testing.session_real import real_world

STEP_S = 120.0

HERE = (
    "session.after_tool_result", "session.after_snapshot", "session.after_thaw", "session.after_upgrade_stop", "session.after_live_snapshot",
    "tool.before/agent", "model.middle/guestd", "model.after/server", "tool.after/server+machine",
)  # fmt: skip


@pytest.mark.timeout(900)
async def test_a_life_under_fire_in_a_real_machine(real_config: Config) -> None:
    async with CountingPayments() as pay, real_world(real_config) as w:
        account = await Round(w, pay, 1, step_s=STEP_S).strike_all(HERE)
    assert sorted(account.strikes) == sorted(HERE)
    assert len(account.said) >= len(HERE)
