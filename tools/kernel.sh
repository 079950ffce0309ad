#!/usr/bin/env bash
# Builds the trimmed guest kernel from Debian's own kernel source, and makes it one that machines can start from.
#
#   tools/kernel.sh              what is missing of: source package, build, entry in the home (make kernel)
#   tools/kernel.sh --no-install build only: build/kernel/vmlinux
#   tools/kernel.sh --compare    build once more from nothing, in a folder of another name, and compare the bytes
#
# Leaves in build/kernel: vmlinux (stripped ELF), vmlinux.zst (what a release publishes), config (the whole
# configuration), BUILT (source package, compiler, hash: what GPL-2 asks to be named beside the binary). Some 15 minutes
# of one core, 2.2 GB of disk while it runs. Nothing of the builder (name, host, time) goes into the bytes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly source_package=linux-source-6.12
readonly fragment=$PWD/tools/kernel.config
out=$PWD/build/kernel
readonly recipe=1 # raise it when a change of build() changes the bytes
readonly needs=(gcc:gcc make:make bc:bc flex:flex bison:bison m4:m4 xz:xz-utils zstd:zstd apt-get:apt dpkg-deb:dpkg)
readonly min_free_mb=2600

step() { printf '==> %s\n' "$*" >&2; }
die() {
	printf 'error: %s\n' "$1" >&2
	[[ $# -lt 2 ]] || printf 'hint: %s\n' "$2" >&2
	exit 1
}

check_tools() {
	local need missing=()
	for need in "${needs[@]}"; do
		command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
	done
	[[ -e /usr/include/libelf.h ]] || missing+=(libelf-dev) # the kernel's objtool
	if [[ ${#missing[@]} -gt 0 ]]; then
		local install=(env DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends "${missing[@]}")
		[[ $EUID -eq 0 ]] || install=(sudo -n "${install[@]}")
		step "packages: ${missing[*]}"
		"${install[@]}" >/dev/null 2>&1 ||
			die "building a kernel needs ${missing[*]}" "as root: apt-get install --no-install-recommends ${missing[*]}"
	fi
	local free
	mkdir -p "$out"
	free=$(df --output=avail -BM "$out" | tail -n 1 | tr -dc 0-9)
	((free >= min_free_mb)) || die "$out has $free MB free; a build needs $min_free_mb MB"
}

# The newest version the mirror has: superseded ones are gone from it.
source_version() {
	apt-cache show "$source_package" 2>/dev/null | sed -n 's/^Version: //p' | sort -rV | head -n 1
}

# What the result depends on. Another source, fragment, recipe or compiler is another kernel.
build_key() {
	printf '%s %s %s %s\n' "$1" "$(sha256sum "$fragment" | cut -c1-64)" "$recipe" "$(gcc -dumpfullversion)"
}

fetch_source() {
	[[ -f $out/tree/.version && $(<"$out/tree/.version") == "$1" ]] && return # an earlier build got that far
	step "downloading $source_package $1"
	(cd "$out" && apt-get -q -o APT::Sandbox::User=root -o Acquire::Retries=3 download "$source_package=$1") \
		>"$out/log" 2>&1 || {
		tail -n 5 "$out/log" >&2
		die "the source package cannot be downloaded" "run apt-get update first"
	}
	local package
	package=$(find "$out" -maxdepth 1 -name 'linux-source-*.deb' | head -n 1)
	step "unpacking"
	rm -rf "$out/tree"
	mkdir "$out/tree"
	# What no build for x86 reads is left out: a third of the whole.
	dpkg-deb --fsys-tarfile "$package" | tar -xO "./usr/src/$source_package.tar.xz" |
		tar -xJ -C "$out/tree" --strip-components=1 --exclude='*/drivers/gpu/drm/amd/include' \
			--exclude='*/arch/arm*/boot/dts' --exclude='*/Documentation/translations' --exclude='*/tools/testing'
	# The day of the source, never the day of the build, so that the bytes depend on neither clock nor builder.
	dpkg-deb --fsys-tarfile "$package" | tar -tv --full-time --utc | grep -F "$source_package.tar.xz" |
		awk '{print $4, $5}' >"$out/tree/.source-date"
	rm -f "$package"
	printf '%s\n' "$1" >"$out/tree/.version" # last: its absence means not whole
}

# Every line of the fragment must have been taken: an option the source dropped or renamed is told, not lost.
check_config() {
	local line lost=()
	while read -r line; do
		[[ $line == CONFIG_* ]] || continue
		grep -qxF "$line" "$1" || lost+=("$line")
	done <"$fragment"
	[[ ${#lost[@]} -eq 0 ]] || die "the source has not taken: ${lost[*]}" "mend tools/kernel.config"
}

build() {
	local tree=$out/tree stamp
	stamp=$(<"$tree/.source-date")
	local make=(nice -n 15 make -C "$tree" -s -j2 KBUILD_BUILD_USER=recess KBUILD_BUILD_HOST=recess
		KBUILD_BUILD_VERSION=1 "KBUILD_BUILD_TIMESTAMP=$stamp UTC")
	"${make[@]}" "KCONFIG_ALLCONFIG=$fragment" allnoconfig >"$out/log" 2>&1 || {
		tail -n 20 "$out/log" >&2
		die "the kernel could not be configured"
	}
	check_config "$tree/.config"
	step "building (some 15 minutes of one core)"
	"${make[@]}" vmlinux >"$out/log" 2>&1 || {
		tail -n 30 "$out/log" >&2
		die "the kernel could not be built" "see $out/log"
	}
	strip --strip-all -o "$out/vmlinux.new" "$tree/vmlinux"
	zstd -q -19 -f "$out/vmlinux.new" -o "$out/vmlinux.zst"
	cp "$tree/.config" "$out/config"
	mv "$out/vmlinux.new" "$out/vmlinux"
}

# Two builds of one source, fragment and compiler must give the same bytes, wherever and whenever they were made.
compare() {
	local first=$out/vmlinux
	[[ -f $first && -f $out/BUILT && $(head -n 1 "$out/BUILT") == "$2" ]] ||
		die "there is no finished build of this source and compiler to compare with" "make kernel"
	out=$PWD/build/kernel-again
	rm -rf "$out"
	mkdir -p "$out"
	fetch_source "$1"
	build
	cmp "$first" "$out/vmlinux" >&2 || die "two builds differ: $first, $out/vmlinux"
	step "the same bytes twice: $(sha256sum "$first" | cut -c1-64)"
	rm -rf "$out"
}

main() {
	local version key
	[[ $# -eq 0 || $* == --no-install || $* == --compare ]] || die "usage: tools/kernel.sh [--no-install | --compare]"
	[[ $(uname -m) == x86_64 ]] || die "guest kernels are for x86-64"
	check_tools
	version=$(source_version)
	[[ -n $version ]] || die "apt knows no $source_package" "apt-get update, with Debian's own package sources"
	key=$(build_key "$version")
	if [[ $* == --compare ]]; then
		compare "$version" "$key"
		return
	fi
	if [[ ! -f $out/vmlinux || ! -f $out/BUILT || $(head -n 1 "$out/BUILT") != "$key" ]]; then
		rm -f "$out/BUILT"
		fetch_source "$version"
		build
		# Last: its absence means not finished.
		printf '%s\nsource: %s %s\ncompiler: %s\nsha256: %s\n' "$key" "$source_package" "$version" \
			"$(gcc --version | head -n 1)" "$(sha256sum "$out/vmlinux" | cut -c1-64)" >"$out/BUILT"
		rm -rf "$out/tree" "$out/log"
	fi
	[[ $* == --no-install ]] || .venv/bin/python tools/kernel_install.py "$out/vmlinux" "$source_package $version"
}

main "$@"
