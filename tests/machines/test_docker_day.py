"""A script of forty ordinary docker lines, with only the command's name replaced, on real machines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("docker_day.sh")
# `-x` names the line that failed; every line counts.
HEAD = 'set -eux -o pipefail\ndocker() { "$PYTHON" -m recess.cli.main "$@"; }\n'


@pytest.mark.timeout(600)
def test_forty_lines_of_docker(real_config, tmp_path):
    lines = [line for line in SCRIPT.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) >= 40
    env = {
        "PATH": os.environ["PATH"], "HOME": str(real_config.home), "RECESS_HOME": str(real_config.home),
        "RECESS_RUN_DIR": str(real_config.run_dir), "PYTHONPATH": os.pathsep.join(sys.path), "PYTHON": sys.executable,
    }  # fmt: skip
    try:
        done = subprocess.run(
            ["bash", "-c", HEAD + "\n".join(lines)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=550
        )
    finally:
        down = [sys.executable, "-m", "recess.cli.main", "down", "--all"]
        subprocess.run(down, env=env, check=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    for piece in (
        "hello\n",
        "you\n/tmp\n",
        "web base Up",
        "inside\n",
        "/usr\n",
        "nobody\n",
        "content\n",
        "tree/deep/f\n",
        "env 1 two words 1\n",
        "got word\n",
        "try\ntry\n",
        "create of flaky\n",
        "running of base\n",
        "typed into sh\n",
        "1000\ncontent\n",
        "sparse 0 0\n",
        "unpacked 1073741824 in 0 blocks\n",
        "mode 4755\n",
        "web has figures\n",
        "sibling 200\n",
        "socket 200\n",
        "C /root/note\n",
        "rewound to first\n",
        "second afar\n",
        "woken HTTP/1.0 200\n",
        "still here\n",
    ):
        assert piece in said, piece
    assert "started\n" in said
    assert "python3 -m http.server" in said
