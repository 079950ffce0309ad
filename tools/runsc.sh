#!/usr/bin/env bash
# Puts gVisor's runtime where the gVisor driver looks for it: $RECESS_HOME/bin/runsc, out of Debian's backports (the
# release in Debian 12's main archive is too old). Needs no root and changes nothing of the host: apt works on lists of
# its own here. Does nothing where a runsc of the home is there; says so and succeeds where backports are out of reach,
# for every other driver works without it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly keyring=/usr/share/keyrings/debian-archive-keyring.gpg
readonly source="http://deb.debian.org/debian bookworm-backports main"

say() { printf '%s\n' "$*" >&2; }

main() {
	local home target work
	home=$(.venv/bin/python -c 'from recess.config import load_config; print(load_config().home)')
	target=$home/bin/runsc
	[[ -x $target ]] && return
	command -v apt-get >/dev/null && [[ -e $keyring && $(uname -m) == x86_64 ]] || return 0
	say "==> runsc (gVisor), from Debian's backports"
	work=$(mktemp -d)
	# shellcheck disable=SC2064
	trap "rm -rf '$work'" EXIT
	mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$home/bin"
	printf 'deb [signed-by=%s] %s\n' "$keyring" "$source" >"$work/sources.list"
	local apt=(apt-get -q -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o Acquire::Retries=2
		-o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
		-o "APT::Sandbox::User=$(id -un)")
	if ! (cd "$work" && "${apt[@]}" update && "${apt[@]}" download runsc) >"$work/log" 2>&1; then
		say "   not installed: Debian's backports cannot be reached; the gVisor driver is not available"
		return 0
	fi
	dpkg-deb --fsys-tarfile "$work"/runsc_*.deb | tar -xO ./usr/bin/runsc >"$home/bin/.runsc.new"
	chmod 755 "$home/bin/.runsc.new"
	mv -f "$home/bin/.runsc.new" "$target" # by rename: a runsc that runs keeps its file
}

main
