#!/usr/bin/env bash
# Installs what is missing, and only that: Debian packages, virtual environment, guestd and keeper, kernel, base image.
#
#   tools/setup.sh          everything (make setup, demo, test)
#   tools/setup.sh gate     without the kernel and the base image (make check)
#
# Root (or sudo) is used for apt only, and only when a package is missing. Every step checks first whether it is done;
# every step leaves nothing half-made, so that a run that was interrupted is simply run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly want="${1:-all}"
readonly venv=.venv
readonly bin=src/recess/_bin
readonly min_free_mb=2500 # packages, virtual environment, guest build, base image, and room to build it
readonly min_rust=70      # Rust 1.70
packages=(ca-certificates e2fsprogs gcc git libc6-dev make python3 python3-venv zstd)
[[ $want == all ]] && packages+=(mmdebstrap qemu-system-x86 uidmap)

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
		die "$PWD has $free MB free; the set-up needs $min_free_mb MB" "free some space and run it again"
}

# --- Debian packages ------------------------------------------------------------------------------------------------

# Prints the minor version of a cargo that is new enough, or nothing.
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

missing_packages() {
	local package
	for package in "${packages[@]}"; do
		[[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || printf '%s\n' "$package"
	done
	# Debian 12's recent Rust; one from elsewhere does as well.
	[[ -n $(cargo_path) ]] || printf '%s\n' cargo-web rustc-web
}

as_root() {
	if [[ $EUID -eq 0 ]]; then
		"$@"
	elif [[ -t 0 ]]; then
		sudo "$@"
	else
		sudo -n "$@"
	fi
}

install_packages() {
	local missing
	command -v apt-get >/dev/null ||
		die "this is not a Debian system: there is no apt-get" \
			"install yourself: ${packages[*]} cargo (1.$min_rust or newer)"
	mapfile -t missing < <(missing_packages)
	[[ ${#missing[@]} -gt 0 ]] || return 0
	step "packages: ${missing[*]}"
	[[ $EUID -eq 0 ]] || command -v sudo >/dev/null ||
		die "these packages are missing and installing them needs root" \
			"as root: apt-get install --no-install-recommends ${missing[*]}"
	local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3)
	local log
	log=$(mktemp)
	# shellcheck disable=SC2064
	trap "rm -f '$log'" RETURN
	if ! as_root "${apt[@]}" update >"$log" 2>&1; then
		tail -n 5 "$log" >&2
		die "apt-get update failed" "is the mirror reachable, and may $(id -un) use sudo?"
	fi
	if ! as_root "${apt[@]}" install --no-install-recommends "${missing[@]}" >"$log" 2>&1; then
		tail -n 8 "$log" >&2
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
	die "there is no Python 3.11 or newer with its venv module" "apt-get install python3 python3-venv"
}

make_venv() {
	local stamp key
	stamp=$venv/setup.stamp
	key=$(sha256sum pyproject.toml | cut -c1-64)
	[[ -x $venv/bin/recess && -f $stamp && $(<"$stamp") == "$key" ]] && return 0
	step "virtual environment: $venv"
	# A venv whose interpreter has gone (an upgraded host) is made anew; any other is only brought up to date.
	"$venv/bin/python" -c '' 2>/dev/null || rm -rf "$venv"
	[[ -d $venv ]] || "$(find_python)" -m venv "$venv"
	"$venv/bin/python" -m pip --disable-pip-version-check install --quiet --retries 5 -e '.[dev]' ||
		die "pip could not install the Python packages" "is the package index reachable? see the lines above"
	printf '%s\n' "$key" >"$stamp" # last: its absence means not finished
}

# --- guestd and keeper ----------------------------------------------------------------------------------------------

build_guest() {
	local cargo log name
	cargo=$(cargo_path)
	[[ -n $cargo ]] || die "there is no cargo 1.$min_rust or newer" "apt-get install cargo-web rustc-web"
	[[ -x $bin/guestd && -x $bin/keeper ]] || step "guestd and keeper"
	log=$(mktemp)
	# shellcheck disable=SC2064
	trap "rm -f '$log'" RETURN
	if ! (cd guest && "$cargo" build --release --locked --quiet) >"$log" 2>&1; then
		tail -n 30 "$log" >&2
		die "guestd or keeper could not be built" "is crates.io reachable? see the lines above"
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
}

main() {
	[[ $want == all || $want == gate ]] || die "usage: tools/setup.sh [all|gate]"
	local started=$SECONDS
	check_host
	install_packages
	make_venv
	build_guest
	provision
	((SECONDS - started < 3)) || say "==> ready after $((SECONDS - started)) s"
}

main
