#!/usr/bin/env bash
# All tests, real machines included. Arguments go to pytest. Skips are named; with CI set, one that is not listed in
# tests/allowed_skips.txt is a failure (tests/conftest.py sees to it).
#
# They run side by side (RECESS_TEST_PROCESSES at once; 0: one after the other, in this process): a test with a real
# machine waits more than it works, and none may mind another one beside it.
#
# A few tests that fail are run once more, alone: a machine of two cores that stood still for seconds fails a test with a
# real VM in it. They are named, as "FAILED, THEN PASSED" (a test to mend), and one that fails again is a failure.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
readonly tests_failed=1 again_max=4 record=.pytest_cache/v/cache/lastfailed # a JSON object, the ids its keys

cores=$(nproc)
processes=${RECESS_TEST_PROCESSES:-$((cores < 2 ? 2 : cores > 4 ? 4 : cores))}
rm -f "$record"
.venv/bin/pytest -q -n "$processes" --dist worksteal "$@"
code=$?
((code == tests_failed)) || exit "$code"
mapfile -t failed < <(.venv/bin/python -c 'import json, sys; print("\n".join(json.load(open(sys.argv[1]))))' \
	"$record")
if ((${#failed[@]} == 0 || ${#failed[@]} > again_max)); then
	printf '%s tests failed; at most %s are run again\n' "${#failed[@]}" "$again_max" >&2
	exit "$code"
fi
printf '\n==> %s failed; once more, each alone\n' "${#failed[@]}"
for id in "${failed[@]}"; do
	.venv/bin/pytest -q "$id" || exit
done
printf '\n'
printf 'FAILED, THEN PASSED: %s\n' "${failed[@]}"
