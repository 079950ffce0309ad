#!/usr/bin/env bash
# The adapters against the packages they adapt to (pyproject.toml, extra `adapters`), in an environment of their own beside
# .venv: theirs are many and change often, and nothing else needs them. Installed once; arguments go to pytest.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
readonly venv=.venv-adapters
mapfile -t wanted < <(.venv/bin/python -c '
import tomllib
print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["adapters"]))')
done_for="$venv/$(printf '%s\n' "${wanted[@]}" "$(realpath .venv)" | sha256sum | cut -c1-16)"
if [[ ! -e $done_for ]]; then
	printf '==> packages for the adapters\n' >&2
	rm -rf "$venv"
	.venv/bin/python -m venv "$venv"
	"$venv/bin/pip" install -q --disable-pip-version-check --retries 5 "${wanted[@]}"
	# The rest, pytest too, comes from .venv; what is in both, from here.
	.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		>"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_beside.pth"
	touch "$done_for"
fi
exec "$venv/bin/python" -m pytest -q tests/adapters "$@"
