"""`recess errors`: every error that Recess raises on purpose, with its exit code."""

from __future__ import annotations

import click

from recess.cli.common import Invocation, verb
from recess.errors import all_errors


@click.command("errors")
@verb
def errors(inv: Invocation) -> None:
    """List every error by its code, with exit status and what it means (docs/errors.md says more)."""
    rows = [
        {
            "code": one.code, "exit": one.exit_code, "http": one.http_status,
            "meaning": " ".join((one.__doc__ or "").split()),
        }
        for one in all_errors()
    ]  # fmt: skip
    columns = [("CODE", "code"), ("EXIT", "exit"), ("HTTP", "http"), ("MEANING", "meaning")]
    inv.out.table(rows, columns, ids="code")
