"""`recess bench snapshots|large|drivers|codec|lazy|cli|all`: hands over to the benchmarks, which are programs of their own.

They measure from beneath the API (drivers, stores, bare QEMU), so the command line, which knows only HTTP, starts them
and nothing more.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

import recess
from recess.errors import MissingTool

_MODULES = {
    "snapshots": "benchmarks.snapshots",
    "drivers": "benchmarks.drivers",
    "codec": "benchmarks.codec",
    "lazy": "benchmarks.lazy",
    "cli": "benchmarks.cli",
    "large": "benchmarks.large",
    "all": "benchmarks.run",
}
_START = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
_PACKAGE = Path(recess.__file__).resolve().parent


def benchmarks_root(package: Path = _PACKAGE) -> Path:
    """Return the folder that holds `benchmarks/`: in the wheel, or the source tree's. Raises MissingTool."""
    for root in (package / "_benchmarks", package.parents[1]):
        if (root / "benchmarks" / "snapshots.py").is_file():
            return root
    raise MissingTool("the benchmarks are not part of this installation", hint="run it from a source tree")


@click.command("bench", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("what", type=click.Choice(sorted(_MODULES)))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(what: str, arguments: tuple[str, ...]) -> int:
    """Measure: `snapshots` beside other ways to put a guest away, `large` for what changes in a large machine cost, `lazy` for
    how soon it is back, `codec` for levels over real guests, `drivers` for what a machine costs under each, `cli` for what a user waits for, `all` budgets.

    The rest of the line goes to the benchmark; `recess bench snapshots --help` shows it. They use the images of the home
    and a home of their own for everything else.
    """
    root = benchmarks_root()
    return subprocess.run([sys.executable, "-c", _START, str(root), _MODULES[what], *arguments], check=False).returncode
