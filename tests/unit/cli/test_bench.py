"""`recess bench`: finds the benchmarks where they are, hands the line over, passes the exit code on."""

import subprocess
import sys

import pytest

from recess.cli.verbs.bench import benchmarks_root
from recess.errors import MissingTool


def test_they_are_found_in_the_source_tree_and_in_a_wheel(tmp_path):
    assert (benchmarks_root() / "benchmarks" / "snapshots.py").is_file()
    package = tmp_path / "lib" / "python" / "recess"
    (package / "_benchmarks" / "benchmarks").mkdir(parents=True)
    with pytest.raises(MissingTool):
        benchmarks_root(package)
    (package / "_benchmarks" / "benchmarks" / "snapshots.py").touch()
    assert benchmarks_root(package) == package / "_benchmarks"


def recess(*words):
    return subprocess.run(
        [sys.executable, "-m", "recess.cli.main", "bench", *words], capture_output=True, text=True, timeout=60
    )


def test_the_rest_of_the_line_is_the_benchmarks():
    shown = recess("snapshots", "--help")
    assert shown.returncode == 0
    assert "--repeats" in shown.stdout
    assert recess("snapshots", "--no-such").returncode == 2
    assert recess("no-such").returncode == 2
