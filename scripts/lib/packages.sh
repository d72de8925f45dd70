# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# What the machine itself must have: only what builds and enters the Debian 13
# root. Everything else (compilers, QEMU, BusyBox) lives in that root.

# Packages that are missing here, by the file that proves their presence.
packages_missing() {
	local -a want=(
		/usr/bin/mmdebstrap:mmdebstrap
		/usr/share/keyrings/debian-archive-trixie-stable.gpg:debian-archive-keyring
		/usr/bin/flock:util-linux
		/etc/ssl/certs/ca-certificates.crt:ca-certificates
	)
	local pair
	for pair in "${want[@]}"; do
		[[ -e ${pair%%:*} ]] || printf '%s\n' "${pair#*:}"
	done
}

packages_check_machine() {
	[[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] ||
		die "the lab runs on x86-64 Linux only, this is $(uname -s) on $(uname -m)"
	[[ $axv_top$axv_cache != *[[:space:],:]* ]] ||
		die "QEMU and make take no path with blanks, commas or colons: $axv_top, $axv_cache"
	[[ $axv_cache/ != "$axv_top"/* ]] ||
		die "the cache must not lie inside the checkout: $axv_cache"
	command -v apt-get >/dev/null ||
		die "the lab sets itself up with apt: use a Debian 12 or 13 machine"
}

packages_install() {
	local -a missing
	mapfile -t missing < <(packages_missing)
	((${#missing[@]})) || return 0
	timed packages "Packages: ${missing[*]}" packages_apt "${missing[@]}"
	mapfile -t missing < <(packages_missing)
	((${#missing[@]} == 0)) ||
		die "still missing after installation: ${missing[*]} (is this Debian 12 or newer, with its updates?)"
}

packages_apt() {
	as_root apt-get update
	as_root env DEBIAN_FRONTEND=noninteractive \
		apt-get install --yes --no-install-recommends "$@"
}
