"""Every `recess` line in the docs is one that the command line takes: verb, options, number of arguments."""

import re
import shlex
from pathlib import Path

import click
import pytest

from recess.cli.main import cli

ROOT = Path(__file__).parents[2]
DOCS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Return the words after `recess` of each such command in the fenced blocks of a document."""
    found = []
    for block in FENCE.findall(text):
        for line in block.splitlines():
            if not line.startswith("recess "):
                continue
            words = shlex.split(line, comments=True)
            while words:
                end = next((i for i, word in enumerate(words) if word.endswith(";")), len(words) - 1)
                one, words = words[: end + 1], words[end + 1 :]
                found.append([*one[1:-1], one[-1].rstrip(";")])
    return found


def parse(words: list[str]) -> None:
    command: click.Command = cli
    ctx = click.Context(cli, info_name="recess")
    while isinstance(command, click.Group):
        name = words[0]
        sub = command.get_command(ctx, name)
        assert sub is not None, f"no such verb: {name}"
        command, words = sub, words[1:]
    command.make_context(command.name, list(words), parent=ctx)


def test_there_are_commands_to_check():
    assert commands("x\n```\nrecess rm a b; recess down --all   # why\n$ recess ps\n```\n") == [
        ["rm", "a", "b"],
        ["down", "--all"],
    ]
    assert len(commands((ROOT / "README.md").read_text())) >= 12


@pytest.mark.parametrize("words", [["frobnicate"], ["run", "--bogus", "base"], ["session", "start"]])
def test_a_command_that_does_not_exist_is_found(words):
    with pytest.raises((AssertionError, click.UsageError)):
        parse(words)


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_commands_in_the_docs_exist(path):
    for words in commands(path.read_text()):
        parse(words)
