#!/usr/bin/env bash
# Installs what is missing, and only that: Debian packages, virtual environment, guestd and keeper, kernel, base image.
#
#   tools/setup.sh          everything (make setup, demo, test)
#   tools/setup.sh gate     without the kernel and the base image (make check)
#
# Root (or sudo) is used for apt only, and only when a package is missing. Every step checks first whether it is done;
# every step leaves nothing half-made, so that a run that was interrupted is simply run again.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

readonly want="${1:-all}"
readonly venv=.venv
readonly bin=src/recess/_bin
readonly min_free_mb=2500 # packages, virtual environment, guest build, base image, and room to build it
readonly min_rust=70      # Rust 1.70
packages=(ca-certificates e2fsprogs gcc git libc6-dev make postgresql python3 python3-venv zstd)
[[ $want == all ]] && packages+=(buildah busybox-static docker-registry skopeo mmdebstrap qemu-system-x86 tmux uidmap)

say() { printf '%s\n' "$*" >&2; }
step() { say "==> $*"; }
die() {
	say "error: $1"
	[[ $# -lt 2 ]] || say "hint: $2"
	exit 1
}

# --- the host -------------------------------------------------------------------------------------------------------

check_host() {
	[[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] ||
		die "this is $(uname -s) on $(uname -m); Recess runs on Linux on x86_64"
	local free
	free=$(df --output=avail -BM . | tail -n 1 | tr -dc 0-9)
	[[ -x $venv/bin/recess || $free -ge $min_free_mb ]] ||
		die "$PWD has $free MB free; the set-up needs $min_free_mb MB there" \
			"free some space, or clone to a larger disk, and run it again"
}

# --- Debian packages ------------------------------------------------------------------------------------------------

# Prints the path of a cargo that is new enough, or nothing.
cargo_path() {
	local candidate
	for candidate in "$(command -v cargo || true)" /usr/bin/cargo "$HOME/.cargo/bin/cargo"; do
		if [[ -x $candidate ]] && [[ $("$candidate" --version 2>/dev/null) =~ ^cargo\ 1\.([0-9]+)\. ]] &&
			((BASH_REMATCH[1] >= min_rust)); then
			printf '%s\n' "$candidate"
			return
		fi
	done
}

# Debian 12's own Rust is too old, but it has a recent one beside it; newer releases need no such thing.
rust_packages() {
	if grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release; then
		printf '%s\n' cargo-web rustc-web rustfmt-web
	else
		printf '%s\n' cargo rustc rustfmt
	fi
}

missing_packages() {
	local package
	for package in "${packages[@]}"; do
		[[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || printf '%s\n' "$package"
	done
	[[ -n $(cargo_path) ]] || rust_packages
}

# Without the lock's descriptor: a daemon that a package starts would hold it for ever.
as_root() {
	if [[ $EUID -eq 0 ]]; then
		"$@" 9<&-
	elif [[ -t 0 ]]; then
		sudo "$@" 9<&-
	else
		sudo -n "$@" 9<&-
	fi
}

die_without_root() {
	die "these packages are missing and installing them needs root: $*" \
		"as root: apt-get update && apt-get install --no-install-recommends $*; then run this again as $(id -un)"
}

install_packages() {
	local missing
	command -v apt-get >/dev/null ||
		die "there is no apt-get: the set-up knows Debian and its kin only" \
			"use Debian 12 or newer, or a container of it"
	mapfile -t missing < <(missing_packages)
	[[ ${#missing[@]} -gt 0 ]] || return 0
	step "packages: ${missing[*]}"
	local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3)
	as_root true 2>/dev/null || die_without_root "${missing[@]}"
	# An update that failed for one source of many is no reason to stop: the packages may all be in the others. apt
	# itself takes an unreachable mirror for a warning. So only the install decides, and then both are shown.
	as_root "${apt[@]}" update >"$log" 2>&1 || true
	if ! as_root "${apt[@]}" install --no-install-recommends "${missing[@]}" >>"$log" 2>&1; then
		grep -E '^[EW]: ' "$log" | head -n 8 >&2 || tail -n 8 "$log" >&2
		if grep -qE '^(W|E): Failed to fetch|^Err:|Unable to locate package|no installation candidate' "$log"; then
			die "apt could not get these packages: ${missing[*]}" \
				"is the mirror reachable? see /etc/apt/sources.list*, and Acquire::http::Proxy in apt's configuration"
		fi
		die "apt-get install failed" "as root: apt-get install --no-install-recommends ${missing[*]}"
	fi
	mapfile -t missing < <(missing_packages)
	[[ ${#missing[@]} -eq 0 ]] || die "still missing after apt-get install: ${missing[*]}"
}

# --- virtual environment --------------------------------------------------------------------------------------------

find_python() {
	local candidate
	for candidate in /usr/bin/python3 python3.14 python3.13 python3.12 python3.11 python3; do
		if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
			command -v "$candidate"
			return
		fi
	done
	local found=''
	! command -v python3 >/dev/null || found=$(python3 --version 2>&1 || true)
	die "there is no Python 3.11 or newer with its venv module (python3 here: ${found:-none})" \
		"as root: apt-get install python3 python3-venv; Debian 12 and Ubuntu 24.04 have one that is new enough"
}

make_venv() {
	local stamp key
	stamp=$venv/setup.stamp
	key="$(sha256sum pyproject.toml | cut -c1-64) $PWD" # a folder that was copied or moved must not use the old one
	[[ -x $venv/bin/recess && -f $stamp && $(<"$stamp") == "$key" ]] && return 0
	step "virtual environment: $venv"
	# A venv whose interpreter has gone (an upgraded host), or that was made for another folder, is made anew; any other
	# is only brought up to date.
	if ! "$venv/bin/python" -c '' 2>/dev/null || [[ -f $stamp && $(<"$stamp") == *" "* && $(<"$stamp") != *" $PWD" ]]; then
		rm -rf "$venv"
	fi
	if [[ ! -d $venv ]]; then
		local python
		python=$(find_python)
		"$python" -m venv "$venv" || die "$python could not make a virtual environment" "see the lines above"
	fi
	"$venv/bin/python" -m pip --disable-pip-version-check install --quiet --retries "${PIP_RETRIES:-5}" -e '.[dev]' ||
		die "pip could not install the Python packages: see the lines above" \
			"is the package index reachable? behind a proxy or mirror, set it for pip (pip config, or PIP_INDEX_URL)"
	printf '%s\n' "$key" >"$stamp" # last: its absence means not finished
}

# --- guestd and keeper ----------------------------------------------------------------------------------------------

build_guest() {
	local cargo name
	cargo=$(cargo_path)
	[[ -n $cargo ]] ||
		die "there is no cargo 1.$min_rust or newer" "as root: apt-get install $(rust_packages | tr '\n' ' '); or use rustup"
	[[ -x $bin/guestd && -x $bin/keeper ]] || step "guestd and keeper"
	if ! (cd guest && "$cargo" build --release --locked --quiet) >"$log" 2>&1; then
		tail -n 30 "$log" >&2
		die "guestd or keeper could not be built: see the lines above" \
			"is crates.io reachable? behind a proxy or mirror, set it in cargo's configuration"
	fi
	mkdir -p "$bin"
	for name in guestd keeper; do
		cmp -s "guest/target/release/$name" "$bin/$name" && continue
		# By rename: a keeper that runs keeps its old file, and nobody sees a half-copied one.
		install -m 755 "guest/target/release/$name" "$bin/.$name.new"
		mv -f "$bin/.$name.new" "$bin/$name"
	done
}

# --- kernel and base image ------------------------------------------------------------------------------------------

provision() {
	[[ $want == all ]] || return 0
	"$venv/bin/python" tools/provision.py || exit 1
	tools/runsc.sh || say "   runsc could not be installed; the gVisor driver is not available"
}

# Two at once would install over each other: the second waits. The lock is on this very file and goes with the process.
one_at_a_time() {
	exec 9<tools/setup.sh
	flock --nonblock 9 && return
	say "waiting: another set-up is at work in this folder"
	flock 9
}

main() {
	[[ $want == all || $want == gate ]] || die "usage: tools/setup.sh [all|gate]"
	one_at_a_time
	log=$(mktemp) # what a step says that is shown only if it fails
	trap 'rm -f "$log"' EXIT
	local started=$SECONDS
	check_host
	install_packages
	make_venv
	build_guest
	provision
	((SECONDS - started < 3)) || say "==> ready after $((SECONDS - started)) s"
}

main
