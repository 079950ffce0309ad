"""The command line's reference is what the commands say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_is_current():
    tool = runpy.run_path(str(ROOT / "tools" / "cli_reference.py"))
    assert (ROOT / "docs" / "cli.md").read_text() == tool["reference"](), "run: python tools/cli_reference.py"
