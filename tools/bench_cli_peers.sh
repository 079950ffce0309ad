#!/usr/bin/env bash
# The peers of `make bench-cli`, made at the first call: podman with crun from apt where this is root, gVisor's runtime as the
# set-up takes it. What cannot be had is said and no failure: the table names it and measures the others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly packages=(busybox-static crun podman)

say() { printf '%s\n' "$*" >&2; }

main() {
	local missing=() package
	for package in "${packages[@]}"; do
		[[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
	done
	if ((${#missing[@]})) && [[ $EUID -ne 0 ]]; then
		say "measured without podman: as root, apt-get install --no-install-recommends ${missing[*]}"
	elif ((${#missing[@]})); then
		say "==> packages: ${missing[*]}"
		local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3)
		"${apt[@]}" update >/dev/null 2>&1 || true # only the install decides: see tools/setup.sh
		"${apt[@]}" install --no-install-recommends "${missing[@]}" >/dev/null ||
			say "measured without podman: apt could not get ${missing[*]}"
	fi
	tools/runsc.sh || say "measured without runsc: it could not be installed"
}

main
