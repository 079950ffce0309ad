"""The session benchmark's own loop on Recess: it really survives what is measured, with a server that is killed for good."""

import sys

import pytest

from benchmarks import sessions


@pytest.mark.timeout(400)
def test_recess_recovers_charges_once_and_takes_newer_code(monkeypatch):
    monkeypatch.setattr(sessions, "DEPLOY_S", 120.0)
    monkeypatch.setattr(sessions, "PATIENCE_S", 120.0)
    assert 0 < sessions.length("recess", sys.executable, 2) < 120
    assert sessions.card("recess", sys.executable, 1) == 0
    assert sessions.deploy("recess", sys.executable) is True
