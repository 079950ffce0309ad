"""What a shell is offered: names of what is there, by verb, from a server that runs."""

import pytest
from click.shell_completion import ShellComplete

from recess.cli import completing
from recess.cli.completing import kind_of
from recess.cli.main import cli
from recess.errors import ServerUnavailable


class Server:
    def call(self, method, path, *, query, timeout_s):
        assert (method, query, timeout_s) == ("GET", {"all": 1}, completing.WAIT_S)
        return {
            "/v1/machines": {"machines": [{"id": "mch_1", "name": "web"}, {"id": "mch_2", "name": "worker"}]},
            "/v1/images": {"images": [{"name": "base"}]},
            "/v1/snapshots": {"snapshots": [{"id": "snp_1", "name": ""}, {"id": "snp_2", "name": "web:v1"}]},
            "/v1/sessions": {"sessions": [{"id": "ses_1", "name": "chat"}]},
            "/v1/volumes": {"volumes": [{"name": "data"}]},
        }[path]


def offered(words, incomplete=""):
    found = ShellComplete(cli, {}, "recess", "_RECESS_COMPLETE").get_completions(words, incomplete)
    return [item.value for item in found if item.type == "plain"]


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        (["rm", "-f"], "", ["web", "worker"]),
        (["rm", "web"], "wo", ["worker"]),
        (["exec"], "we", ["web"]),
        (["exec", "web"], "", []),
        (["run"], "", ["base"]),
        (["rmi"], "", ["base"]),
        (["images", "inspect"], "", ["base"]),
        (["restore"], "", ["snp_1", "web:v1"]),
        (["diff", "snp_1"], "w", ["web:v1"]),
        (["session", "send"], "", ["chat"]),
        (["session", "diff", "chat"], "", []),
        (["volume", "rm"], "", ["data"]),
        (["volume", "create"], "", []),
        (["cp"], "w", ["web:", "worker:"]),
        (["cp"], "web:/e", []),
        (["--context", "lab", "inspect"], "web", ["web"]),
    ],
)
def test_what_is_offered(monkeypatch, words, incomplete, expected):
    monkeypatch.setattr(completing, "load_config", lambda context: context)
    monkeypatch.setattr(completing, "transport_for", lambda _config: Server())
    assert offered(words, incomplete) == expected


def test_verbs_and_options_as_before():
    assert {"resume", "restore", "restart"} <= set(offered([], "res"))
    assert "--label" in offered(["run"], "--la")


def test_without_a_server_there_is_silence(monkeypatch):
    def nobody(_config):
        raise ServerUnavailable("nobody is there")

    monkeypatch.setattr(completing, "transport_for", nobody)
    assert offered(["rm"]) == []


def test_a_name_that_is_to_be_made_is_nobodys():
    assert kind_of(("volume", "create"), "name") == kind_of(("tag",), "name") == ""
