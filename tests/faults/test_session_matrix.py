"""The crash matrix, one round on each database and one of plain machines. `make soak` runs twenty, on the memory log too
(tools/crash_matrix.py)."""

import pytest

from recess.testing.crash import known_crash_points
from recess.testing.session_matrix import GUEST_POINTS, HOST_POINTS, REBOOT, STORES, crash_round


def test_every_point_is_struck():
    assert sorted(HOST_POINTS) == known_crash_points("session.")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("store", STORES[1:])
async def test_a_life_under_fire(tmp_path, store, request):
    database = request.getfixturevalue("postgres").database() if store == "postgres" else ""
    account = await crash_round(store, 1, tmp_path, database=database)
    reboots = len(REBOOT) if store == "plain" else 0  # a plain machine has no image to boot
    assert len(account.strikes) == len(HOST_POINTS) - reboots + 2 * len(GUEST_POINTS)
    assert len(account.said) >= len(account.strikes)
