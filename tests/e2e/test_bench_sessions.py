"""The session benchmark's own loop on Recess: it really survives what is measured, with a server that is killed for good."""

import asyncio
import sys

import pytest

from benchmarks import session_cells, session_own, session_world

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    for module, name in (
        (session_cells, "DEPLOY_S"),
        (session_cells, "PATIENCE_S"),
        (session_cells, "WALL_S"),
        (session_world, "PATIENCE_S"),
    ):
        monkeypatch.setattr(module, name, 300.0)


def test_recess_recovers_charges_once_and_takes_newer_code():
    with session_cells.life_of("recess", sys.executable, 205, past=198) as life:
        for turns in (200, 202):
            life.grow(turns, session_cells.Cap(300.0, 1e9))
            found = life.recover()
            assert 0 < found.replay < found.whole < 300
    assert session_cells.card("recess", sys.executable, 1) == 0
    assert session_cells.deploy("recess", sys.executable) is True


def test_recess_keeps_its_transcript_and_a_large_result():
    assert session_cells.orphan("recess", sys.executable, 2) == (2, [])
    assert session_cells.takes("recess", sys.executable, 1 << 20) is True


def test_two_nodes_of_recess_charge_once(postgres):
    assert session_cells.race("recess", sys.executable, postgres.database(), turns=2) == (0, 0)


def test_recess_forks_at_its_head():
    found = session_cells.fork("recess", sys.executable, 2, 3)
    assert found["s"] > 0
    assert found["bytes"] < 1 << 20


def test_a_client_without_ids_shows_what_one_with_ids_does_not():
    found = asyncio.run(session_own.reconnect())
    assert (found["drops"], found["wrong"]) == (100, 0)
    assert found["plain_wrong"] > 0
