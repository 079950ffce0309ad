"""`recess run` that is interrupted while its machine is being made."""

from __future__ import annotations

from typing import Any

import pytest

from recess.cli.common import Invocation
from recess.cli.main import run_cli
from recess.errors import RecessError, Unavailable


class Server:
    """A server whose first call that makes a machine is interrupted; it makes the machine all the same, or cannot."""

    def __init__(self, error: RecessError | None = None) -> None:
        self.error = error
        self.keys: list[str] = []
        self.calls: list[tuple[str, str]] = []

    def act(self, _inv: Invocation, _method: str, _path: str, _body: object, *, key: str = "", **_more: object) -> Any:
        self.keys.append(key)
        if len(self.keys) == 1:
            raise KeyboardInterrupt
        if self.error is not None:
            raise self.error
        return {"id": "mch_1"}

    def call(self, method: str, path: str, *_body: object, **_more: object) -> Any:
        self.calls.append((method, path))


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    def run(server: Server, *words: str) -> int:
        monkeypatch.setenv("RECESS_HOME", str(tmp_path))
        monkeypatch.setattr(Invocation, "act", lambda *args, **named: server.act(*args, **named))
        monkeypatch.setattr(Invocation, "server", server)
        return run_cli(["run", *words])

    return run


def test_its_machine_goes_again(interrupted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server()
    assert interrupted(server, "base", "true") == 130
    assert len(server.keys) == 2
    assert server.keys[0] == server.keys[1]
    assert server.calls == [("DELETE", "/v1/machines/mch_1")]
    assert "interrupted" in capsys.readouterr().err


def test_there_may_be_none(interrupted: Any) -> None:
    server = Server(Unavailable("the disk is full"))
    assert interrupted(server, "base", "true") == 130
    assert server.calls == []


def test_what_was_to_run_by_itself_is_left(interrupted: Any) -> None:
    server = Server()
    assert interrupted(server, "-d", "base", "true") == 130
    assert len(server.keys) == 1
    assert server.calls == []
