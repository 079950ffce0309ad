#!/usr/bin/env bash
# The gate, without a virtual machine: format, lint, types, import contracts, the guest's own checks, fast tests.
#
#   tools/check.sh           all of it (make check)
#   tools/check.sh static    without the tests (.ci/run runs all tests afterwards)
#
# Every check runs even when an earlier one failed; the exit code says whether all held.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

readonly py=.venv/bin what=${1:-all}
failed=()

check() {
	local name=$1
	shift
	printf '==> %s\n' "$name"
	"$@" || failed+=("$name")
}

# Warnings are errors here, in a folder of its own: other flags would make the release build start over each time.
guest() {
	local flags='-C target-feature=+crt-static -D warnings'
	(cd guest && RUSTFLAGS=$flags CARGO_TARGET_DIR=target/gate cargo "$@" --locked --quiet)
}

cargo_fmt() {
	if cargo fmt --version >/dev/null 2>&1; then
		(cd guest && cargo fmt --check)
	else
		printf 'not checked: this Rust has no rustfmt\n'
	fi
}

check 'ruff format' "$py/ruff" format --check --quiet .
check 'ruff check' "$py/ruff" check --quiet .
check 'mypy' "$py/mypy"
check 'import contracts' "$py/lint-imports" --no-cache
check 'cargo fmt' cargo_fmt
check 'cargo check' guest check --all-targets
check 'cargo test' guest test
if [[ $what == all ]]; then
	fast=()
	for folder in unit tidy golden conformance; do
		[[ -d tests/$folder ]] && fast+=("tests/$folder")
	done
	check 'tests' "$py/pytest" -q -m 'not machines and not e2e' "${fast[@]}"
fi

if ((${#failed[@]})); then
	printf '\nthe gate failed: %s\n' "$(IFS=,; echo "${failed[*]}")" >&2
	exit 1
fi
