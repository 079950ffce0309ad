"""Runs pieces of Python in one namespace, for `Sandbox.run_code`: this file is sent into the machine and runs there.

Standard library only, Python 3.7 or later, nothing of the house. A request is a line `{"id", "code", "envs"}` on stdin;
answers are lines `{"id", "t": stdout|stderr|result|error|end, ...}` on the descriptor that was stdout. What the code and
its children write to descriptors 1 and 2 goes to stderr, so that it cannot look like an answer.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

FORMS = {
    "html": "_repr_html_",
    "markdown": "_repr_markdown_",
    "svg": "_repr_svg_",
    "png": "_repr_png_",
    "jpeg": "_repr_jpeg_",
    "latex": "_repr_latex_",
    "json": "_repr_json_",
}


class Told(io.TextIOBase):
    """A text stream whose lines are answers."""

    def __init__(self, tell: Callable[[str, dict[str, Any]], None], name: str) -> None:
        self._tell, self._name, self._held = tell, name, ""

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Tell whole lines at once, the rest when it is one or at the end."""
        whole, newline, rest = (self._held + text).rpartition("\n")
        self._held = rest
        if newline:
            self._tell(self._name, {"text": whole + newline})
        return len(text)

    def end(self) -> None:
        """Tell what is left."""
        if self._held:
            self._tell(self._name, {"text": self._held})
        self._held = ""


def forms_of(value: Any) -> dict[str, Any]:
    """Return a value as text and in the other forms it knows of itself."""
    out: dict[str, Any] = {"text": repr(value)}
    for name, method in FORMS.items():
        try:
            found = getattr(value, method)()
        except Exception:  # it has none, or it is broken: then it has none
            continue
        if isinstance(found, bytes):
            found = base64.b64encode(found).decode()
        if found is not None:
            out[name] = found
    return out


def run(code: str, names: dict[str, Any]) -> Any:
    """Run a piece and return its last expression's value, None if it has none."""
    tree = ast.parse(code, "<cell>")
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "<cell>", "exec"), names)
        return None
    del tree.body[-1]
    exec(compile(tree, "<cell>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
    os.dup2(2, 1)
    names: dict[str, Any] = {"__name__": "__main__"}
    asked: dict[str, Any] = {}

    def tell(kind: str, more: dict[str, Any]) -> None:
        answers.write(json.dumps({"id": asked["id"], "t": kind, **more}) + "\n")
        answers.flush()

    streams = Told(tell, "stdout"), Told(tell, "stderr")
    sys.stdout, sys.stderr = streams
    for line in sys.stdin:
        asked = json.loads(line)
        os.environ.update(asked.get("envs") or {})
        try:
            value = run(asked["code"], names)
            if value is not None:
                tell("result", forms_of(value))
        except (Exception, KeyboardInterrupt, SystemExit) as exc:
            tell("error", {"name": type(exc).__name__, "value": str(exc), "traceback": traceback.format_exc()})
        for stream in streams:
            stream.end()
        tell("end", {})


if __name__ == "__main__":
    main()
