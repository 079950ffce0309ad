"""Crash points for tests: arm one for a block, list those that exist. The hook itself is `recess.crashpoints`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import recess
from recess.crashpoints import Crashed, arm, crash_point, disarm_all

__all__ = ["Crashed", "arm", "crash_point", "crashing", "disarm_all", "known_crash_points"]


@contextmanager
def crashing(name: str, *, skip: int = 0) -> Iterator[None]:
    """Run the block with `name` armed; it must end in `Crashed` from that very point, else the test fails."""
    assert name in known_crash_points(), f"no such crash point: {name}"
    arm(name, skip=skip)
    passed = False
    try:
        yield
    except Crashed as crash:
        passed = crash.name == name
    finally:
        disarm_all()
    assert passed, f"crash point {name} was never passed"


def known_crash_points(prefix: str = "") -> list[str]:
    """Return every name that the source passes to `crash_point`, sorted. A name that is no literal is an error."""
    found: set[str] = set()
    for path in sorted(Path(recess.__file__).parent.rglob("*.py")):
        source = path.read_text()
        if "crash_point(" not in source or path.name in ("crash.py", "crashpoints.py"):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "crash_point":
                name = node.args[0]
                assert isinstance(name, ast.Constant), f"{path}:{node.lineno}: write the name as a literal"
                found.add(str(name.value))
    return sorted(name for name in found if name.startswith(prefix))
