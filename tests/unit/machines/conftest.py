"""The machine room that the tests of this folder work in."""

from __future__ import annotations

import pytest

from recess.testing.machine_room import machine_room


@pytest.fixture
async def room(tmp_path):
    async with machine_room(tmp_path) as opened:
        yield opened
