"""A skip nobody allowed fails a run that counts: tried on a real pytest run, not on the hooks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("environment", "allowed", "code"),
    [
        ({"CI": "true"}, "", 1),
        ({"RECESS_CI": "1"}, "", 1),
        ({"CI": "true"}, "*test_it*  no such device here\n", 0),
        ({}, "", 0),
    ],
)
def test_a_skip_fails_the_run_unless_it_is_allowed(tmp_path, environment, allowed, code):
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "allowed_skips.txt").write_text(allowed)
    (tmp_path / "test_a.py").write_text("import pytest\ndef test_it(): pytest.skip('no device')\ndef test_ok(): pass\n")
    kept = {k: v for k, v in os.environ.items() if k not in ("CI", "RECESS_CI")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "markers=machines", str(tmp_path)],
        env={**kept, **environment, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "test_it: no device" in done.stdout
    assert "1 passed, 1 skipped" in done.stdout.splitlines()[-1]
