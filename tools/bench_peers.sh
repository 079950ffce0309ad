#!/usr/bin/env bash
# The peers of `make bench-sessions` (DBOS, LangGraph with its SQLite saver) in an environment of their own, build/peers, made at
# the first call. Prints its Python; prints nothing and says why on stderr where they cannot be installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=build/peers
if [[ ! -x $venv/bin/python ]] || ! "$venv/bin/python" -c 'import dbos, langgraph.checkpoint.sqlite' 2>/dev/null; then
	mkdir -p build
	.venv/bin/python -m venv "$venv" >&2
	"$venv/bin/pip" install -q 'dbos==3.4.0' 'langgraph==1.2.22' 'langgraph-checkpoint-sqlite==3.1.2' >&2 || {
		printf 'the peers cannot be installed: Recess is measured alone\n' >&2
		exit 0
	}
fi
printf '%s\n' "$PWD/$venv/bin/python"
