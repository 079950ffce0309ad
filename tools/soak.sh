#!/usr/bin/env bash
# The long run: twenty rounds of the crash matrix (agents as processes; memory log, SQLite, Postgres, plain machines), a whole round of it on a real machine over each database, a hundred sessions
# through a deploy (tools/deploy_wave.py), two hundred naps of one real machine
# (tools/naps.py), then the tests in tests/machines, tests/faults, tests/e2e and tests/hard (a much written disk among them) on real machines, again and again.
#
#   tools/soak.sh [MINUTES]       default 60; stops at the first failure
#
# Ends with one line of JSON (rounds, minutes, host) for SPECIFICATION.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly minutes=${1:-60}
[[ $minutes =~ ^[1-9][0-9]*$ ]] || {
	printf 'usage: tools/soak.sh [MINUTES]\n' >&2
	exit 2
}
folders=()
export RECESS_HARD=1
for folder in machines faults e2e hard; do
	compgen -G "tests/$folder/test_*.py" >/dev/null && folders+=("tests/$folder")
done
.venv/bin/python tools/crash_matrix.py 20
.venv/bin/python tools/crash_matrix.py 1 1 machines machines-postgres
.venv/bin/python tools/deploy_wave.py 100
.venv/bin/python tools/naps.py 200
rounds=0
while ((SECONDS < minutes * 60)); do
	.venv/bin/pytest -q -x "${folders[@]}"
	rounds=$((rounds + 1))
	printf '==> round %d done after %d min\n' "$rounds" $((SECONDS / 60)) >&2
done
printf '{"rounds": %d, "minutes": %d, "cores": %d, "kernel": "%s", "date": "%s"}\n' \
	"$rounds" $((SECONDS / 60)) "$(nproc)" "$(uname -r)" "$(date -u +%F)"
