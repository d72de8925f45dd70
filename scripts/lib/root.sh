# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# The Debian 13 build root: how it is made, and how commands run in it.
#
# With permission to mount, a command runs by chroot in a mount namespace of its
# own, so no mount outlives it whatever happens. Without (root in an
# unprivileged container), proot lends it /proc, /dev and the checkout.

axv_mirror=http://deb.debian.org
axv_root_packages=(
	# Rust for Linux and the userspace half.
	rustc cargo rustfmt rust-clippy rust-src bindgen clang llvm lld
	# What an out-of-tree kernel module needs.
	gcc-14 libc6-dev make bc flex bison libelf-dev libssl-dev dwarves kmod
	rsync xz-utils zstd python3-minimal git pkgconf ca-certificates
	# The lab host and what goes into it.
	busybox-static qemu-system-x86 seabios virtiofsd
)

# Whether this process may mount. Asked once.
root_can_mount() {
	if [[ -z ${axv_can_mount-} ]]; then
		axv_can_mount=no
		if as_root unshare --mount --propagation private \
			mount --bind / / 2>/dev/null; then
			axv_can_mount=yes
		fi
	fi
	[[ $axv_can_mount == yes ]]
}

root_make() {
	step root "$(key_of "${axv_root_packages[@]}" </dev/null)" \
		"Debian 13 build root" root_bootstrap
}

root_bootstrap() {
	local tmp=$axv_root.tmp
	local -a skip=()
	root_can_mount || skip=("--skip=check/canmount,chroot/mount")
	as_root rm -rf --one-file-system "$tmp" "$axv_root"
	as_root mmdebstrap --mode=root "${skip[@]}" --variant=buildd \
		--keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
		--aptopt='Acquire::Languages "none"' \
		--aptopt='APT::Install-Recommends "false"' \
		--dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/doc/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' \
		--include="$(IFS=,; printf '%s' "${axv_root_packages[*]}")" \
		trixie "$tmp" \
		"deb $axv_mirror/debian trixie main" \
		"deb $axv_mirror/debian trixie-updates main" \
		"deb $axv_mirror/debian trixie-backports main" \
		"deb $axv_mirror/debian-security trixie-security main"
	as_root mv "$tmp" "$axv_root"
}

# in_root COMMAND... runs COMMAND in the build root as the calling user, in the
# current directory, with the checkout and the cache at their usual paths.
in_root() { root_enter "$(id -u):$(id -g)" "$@"; }

# The same as the root's superuser, to install packages there.
in_root_as_root() { root_enter 0:0 "$@"; }

root_enter() {
	local user=$1
	shift
	local -a env=(
		env -i
		PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
		HOME="$axv_cache" CARGO_HOME="$axv_cache/cargo" LC_ALL=C.UTF-8
		TERM="${TERM:-dumb}" DEBIAN_FRONTEND=noninteractive
	)
	local name
	for name in http_proxy https_proxy no_proxy RUSTFLAGS CARGO_TARGET_DIR; do
		[[ -z ${!name-} ]] || env+=("$name=${!name}")
	done
	mkdir -p "$axv_cache/cargo"
	if root_can_mount; then
		as_root unshare --mount --propagation private \
			bash "$axv_top/scripts/lib/root-enter.sh" \
			"$axv_root" "$user" "$PWD" "$axv_top" "$axv_cache" "${env[@]}" "$@"
	else
		proot -r "$axv_root" -b /proc -b /dev -b /etc/resolv.conf \
			-b "$axv_top" -b "$axv_cache" -w "$PWD" "${env[@]}" "$@"
	fi
}
