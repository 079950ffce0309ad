#!/usr/bin/env bash
# The peers of `make bench-sessions` in environments of their own, made at the first call: DBOS, LangGraph with its SQLite saver,
# Temporal's and Restate's SDKs in build/peers, Restate's server (a binary in an npm package) in build/restate. Prints the peers'
# Python; prints nothing and says why on stderr where they cannot be installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=build/peers restate=build/restate
if ! "$venv/bin/python" -c 'import dbos, hypercorn, langgraph.checkpoint.sqlite, restate, temporalio' 2>/dev/null; then
	mkdir -p build
	[[ -x $venv/bin/python ]] || .venv/bin/python -m venv "$venv" >&2
	"$venv/bin/pip" install -q 'dbos==3.4.0' 'hypercorn==0.18.0' 'langgraph==1.2.22' 'langgraph-checkpoint-sqlite==3.1.2' \
		'restate-sdk==1.3.0' 'temporalio==1.35.0' >&2 || {
		printf 'the peers cannot be installed: Recess is measured alone\n' >&2
		exit 0
	}
fi
if [[ ! -d $restate/node_modules/@restatedev ]]; then
	npm install --silent --ignore-scripts --no-audit --no-fund --prefix "$restate" '@restatedev/restate-server@1.7.12' >&2 ||
		printf 'the Restate server cannot be installed (npm): measured without it\n' >&2
fi
printf '%s\n' "$PWD/$venv/bin/python"
