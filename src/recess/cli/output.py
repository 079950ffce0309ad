"""How the CLI speaks: results on stdout, progress and errors on stderr, `--json` as one envelope.

Envelope: {"ok": true, "command": VERB, "data": ...} or {"ok": false, "command": VERB, "exit_code": N, "error": {...}}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from recess.cli.live import LiveLine, counted
from recess.cli.template import align, heading, render
from recess.errors import RecessError


class Output:
    """One invocation's output. `quiet`: ids only."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False, command: str = "", template: str = "") -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.command = command
        self.template = template
        self._live: LiveLine | None = None

    def step(self, text: str) -> None:
        """Show a step of something that takes long: redrawn in place on a terminal, a line elsewhere (what only counts bytes
        is left out there). `settle` before anything else is printed. Silent with -q and --json."""
        if self.quiet or self.as_json:
            return
        if not sys.stderr.isatty():
            count = counted(text)
            if count is None or not count[2]:
                self.progress(text)
            return
        self._live = self._live or LiveLine(sys.stderr)
        self._live.show(text)

    def waiting(self, text: str) -> None:
        """Show what is waited for, on a terminal only. `settle` afterwards."""
        if sys.stderr.isatty():
            self.step(text)

    def settle(self) -> None:
        """Leave the step that is shown as it is; may be called without one."""
        if self._live is not None:
            self._live.end()

    def data(self, value: Any, text: str | None = None) -> None:
        """Print the result: the envelope with --json, by the template with --format, else `text` (None prints nothing)."""
        if self.template:
            self._by_template(value if isinstance(value, list) else [value])
        elif self.as_json:
            print(json.dumps({"ok": True, "command": self.command, "data": value}))
        elif text is not None:
            print(text)

    def line(self, text: str) -> None:
        """Print one line of result text (never with --json or --format)."""
        if not (self.as_json or self.template):
            print(text, flush=True)

    def stream_item(self, value: Mapping[str, Any], text: str) -> None:
        """Print one item of a stream: a JSON line with --json, else text."""
        if self.template:
            text = render(self.template, value)
        print(json.dumps(value) if self.as_json else text, flush=True)

    def _by_template(self, rows: Sequence[Any]) -> None:
        lines = [render(self.template, row) for row in rows]
        first = heading(self.template)
        for line in lines if first is None else align([first, *lines]):
            print(line)

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str]], ids: str = "id") -> None:
        """Print rows. `columns` are (heading, key); -q prints only the `ids` column."""
        if self.as_json or (self.template and not self.quiet):
            self.data(list(rows))
            return
        if self.quiet:
            for row in rows:
                print(row[ids])
            return
        cells = [[heading for heading, _ in columns]]
        cells += [[str(row.get(key, "")) for _, key in columns] for row in rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        for line in cells:
            print("   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

    def progress(self, text: str) -> None:
        """Tell what is going on, on stderr; silent with -q and --json."""
        if not (self.quiet or self.as_json):
            print(text, file=sys.stderr, flush=True)

    def error(self, error: RecessError, exit_code: int) -> None:
        """Print an error: one line and a hint on stderr; with --json the envelope on stdout."""
        if self.as_json:
            body = {"ok": False, "command": self.command, "exit_code": exit_code, "error": error.to_dict()}
            print(json.dumps(body))
            return
        print(f"recess: {error.message}", file=sys.stderr)
        for reason in error.details.get("reasons", [])[1:]:  # the first is in the message
            print(f"  also: {reason}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)


def ago(ts: float) -> str:
    """Return how long ago a wall time was, for people."""
    if not ts:
        return "never"
    seconds = max(0, int(time.time() - ts))
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'s' if count != 1 else ''} ago"
    return f"{seconds} seconds ago"


def short(ident: str) -> str:
    """Return the part of an id that is enough to type (ids of machines and sessions are short already)."""
    return ident[:16] if ident.startswith(("snp_", "lyr_")) else ident
