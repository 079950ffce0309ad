"""The command's frame: help, usage errors, envelopes, exit codes."""

import json
import re
import subprocess
import sys

import pytest

from recess.cli import main as cli_main
from recess.cli.main import ELSEWHERE, FLAGS_ELSEWHERE, VERBS, run_cli, shortened


def test_every_verb_can_be_imported_and_has_help(capsys):
    for name in VERBS:
        assert run_cli([name, "--help"]) == 0, name
        assert "Usage: recess " + name in capsys.readouterr().out


def test_unknown_verb_is_a_usage_error(capsys):
    assert run_cli(["frobnicate"]) == 2
    assert "frobnicate" in capsys.readouterr().err


@pytest.mark.parametrize("word", sorted(ELSEWHERE))
def test_a_word_of_dockers_that_is_another_here_is_told(word, capsys):
    assert word not in VERBS
    assert run_cli([word, "frobnicate"]) == 2
    assert ELSEWHERE[word] in capsys.readouterr().err
    named = re.findall(r"recess ([a-z]+)", ELSEWHERE[word])
    assert set(named) <= set(VERBS)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("container ls -a", "ps -a"),
        ("container rm -f web", "rm -f web"),
        ("--json container inspect web", "--json inspect web"),
        ("--context image image ls -q", "--context image images ls -q"),
        ("image rm base", "rmi base"),
        ("system prune -f", "prune -f"),
        ("container frobnicate", "container frobnicate"),
        ("exec container ls", "exec container ls"),
        ("container", "container"),
        ("", ""),
    ],
)
def test_longer_words_of_dockers_are_the_short_ones(typed, meant):
    assert shortened(typed.split()) == meant.split()


@pytest.mark.parametrize("flag", sorted(FLAGS_ELSEWHERE))
def test_a_flag_of_dockers_that_is_another_here_is_told(flag, capsys):
    assert run_cli(["run", flag, "base", "true"]) == 2
    assert FLAGS_ELSEWHERE[flag] in capsys.readouterr().err


def test_errors_share_the_envelope(capsys):
    assert run_cli(["--json", "frobnicate"]) == 2
    body = json.loads(capsys.readouterr().out)
    assert body["ok"] is False
    assert body["exit_code"] == 2


def test_own_failures_of_run_are_125(capsys, monkeypatch, tmp_path):
    # A URL where nobody listens: the failure is ours, not the guest's.
    monkeypatch.setenv("RECESS_URL", "http://127.0.0.1:9")
    assert run_cli(["run", "base", "true"]) == 125
    assert run_cli(["ps"]) == 1
    told = capsys.readouterr().err
    assert "is RECESS_URL right" in told
    assert "run: recess up" not in told


def test_help_imports_no_verb():
    code = "import sys; from recess.cli.main import run_cli; run_cli(['--help']); print([m for m in sys.modules if m.startswith('recess.cli.verbs')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


@pytest.mark.parametrize(("args", "expected"), [(["ps", "--json"], True), (["exec", "m", "--", "x", "--json"], False)])
def test_json_is_ours_only_before_the_double_dash(args, expected):
    assert cli_main._wants_json(args) is expected
