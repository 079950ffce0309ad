#!/usr/bin/env bash
# All tests, real machines included. Arguments go to pytest. Skips are named; with CI set, one that is not listed in
# tests/allowed_skips.txt is a failure (tests/conftest.py sees to it).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec .venv/bin/pytest -q "$@"
