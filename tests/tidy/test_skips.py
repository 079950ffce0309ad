"""A skip nobody allowed fails a run that counts: tried on a real pytest run, not on the hooks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recess.testing.small_disk import small_disk

TESTS = Path(__file__).parents[1]
# The exit code of a run with such skips: another than that of a test that failed, which is tried again.
NOT_ALLOWED = 20


@pytest.mark.parametrize(
    ("environment", "allowed", "code"),
    [
        ({"CI": "true"}, "", NOT_ALLOWED),
        ({"RECESS_CI": "1"}, "", NOT_ALLOWED),
        ({"CI": "true"}, "*test_it*  always  no such device here\n", 0),
        ({"CI": "true"}, "*test_it*  ordinary-user  no such device here\n", 0 if os.geteuid() else NOT_ALLOWED),
        ({}, "", 0),
    ],
)
def test_a_skip_fails_the_run_unless_it_is_allowed(tmp_path, environment, allowed, code):
    done = run(tmp_path, environment, allowed)
    assert done.returncode == code, done.stdout + done.stderr
    assert "test_it: no device" in done.stdout
    assert "1 passed, 1 skipped" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "line", ["*test_it*  sometimes  no such condition", "*test_it*  always", "*test_it* always why"]
)
def test_a_line_that_says_nothing_fails_the_run(tmp_path, line):
    done = run(tmp_path, {"CI": "true"}, line + "\n")
    assert done.returncode not in (0, 5)
    assert "not a pattern, a condition" in done.stdout + done.stderr


def run(tmp_path, environment, allowed):
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "allowed_skips.txt").write_text(allowed)
    (tmp_path / "test_a.py").write_text("import pytest\ndef test_it(): pytest.skip('no device')\ndef test_ok(): pass\n")
    kept = {k: v for k, v in os.environ.items() if k not in ("CI", "RECESS_CI") and not k.startswith("PYTEST_")}
    words = ["-q", "-p", "no:cacheprovider", "-o", "markers=machines", f"--basetemp={tmp_path / 'of-the-run'}"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *words, str(tmp_path)],
        env={**kept, **environment, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


@pytest.mark.mounts
def test_a_test_that_mounts_can_mount_here_whoever_runs_it(tmp_path):
    with small_disk(tmp_path / "small", 64 << 10) as small:
        with pytest.raises(OSError, match="No space left"):
            (small / "file").write_bytes(bytes(100 << 10))
        assert small.is_mount()
    assert not (tmp_path / "small").is_mount()
