"""`recess completion`: the script that makes a shell complete verbs, options, and names of machines and snapshots."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from recess.cli.common import Invocation, verb

VARIABLE = "_RECESS_COMPLETE"
SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@verb
def completion(inv: Invocation, shell: str) -> None:
    """Print the completion script of SHELL: `source <(recess completion bash)`."""
    from recess.cli.main import cli

    cls = get_completion_class(shell)
    assert cls is not None  # noqa: S101 - click knows the three
    text = cls(cli, {}, "recess", VARIABLE).source()
    inv.out.data({"shell": shell, "script": text}, text)
