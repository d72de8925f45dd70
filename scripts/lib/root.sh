# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# The Debian 13 build root: how it is made, and how commands run in it.
#
# With permission to mount, a command runs by chroot in a mount namespace of its
# own, so no mount outlives it whatever happens. Without (root in an
# unprivileged container) it runs by plain chroot, with a copy of the checkout;
# the work directory then really lies inside the root and outside is a link to
# it. The tools get by almost without /proc.

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
	root_can_mount || true
	step root "$(key_of "${axv_root_packages[@]}" "mounts: $axv_can_mount" </dev/null)" \
		"Debian 13 build root" root_bootstrap
	root_work
}

root_bootstrap() {
	local tmp=$axv_root.tmp
	local -a skip=()
	# Kernels and headers lie in the root and go with it.
	rm -f "$axv_stamps"/*
	root_can_mount || skip=("--skip=check/canmount,chroot/mount")
	as_root rm -rf --one-file-system "$tmp" "$axv_root"
	as_root mmdebstrap --mode=root "${skip[@]}" --variant=buildd \
		--keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
		--aptopt='APT::Sandbox::User "root"' \
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

# The work directory: the part of the cache that commands in the root see. And the
# certificate authorities that this machine trusts, for downloads by way of a proxy.
root_work() {
	local authorities=/etc/ssl/certs/ca-certificates.crt
	cmp -s "$authorities" "$axv_root$authorities" || [[ ! -r $authorities ]] ||
		as_root cp "$authorities" "$axv_root$authorities"
	if root_can_mount; then
		mkdir -p "$axv_work"
		return
	fi
	as_root mkdir -p "$axv_root$axv_work" "$axv_root$axv_top"
	as_root chown "$(id -u):$(id -g)" "$axv_root$axv_work" "$axv_root$axv_top"
	# The one thing of /proc that a build insists on: objtool asks where its stack
	# and its limit are, to tell a stack overflow from other crashes of its own.
	as_root mkdir -p "$axv_root/proc/self"
	as_root cp --no-preserve=all /proc/self/limits "$axv_root/proc/self/limits"
	grep -F '[stack]' /proc/self/maps | as_root tee "$axv_root/proc/self/maps" >/dev/null
	[[ -L $axv_work ]] || rm -rf "$axv_work"
	ln -sfn "$axv_root$axv_work" "$axv_work"
}

# in_root COMMAND... runs COMMAND in the build root as the calling user, in the
# current directory, with the checkout and the cache at their usual paths.
in_root() { root_enter "$(id -u):$(id -g)" "$@"; }

# The same as the root's superuser, to install packages there.
in_root_as_root() { root_enter 0:0 "$@"; }

root_enter() {
	local user=$1 directory=/
	shift
	case $PWD/ in
	"$axv_top"/* | "$axv_cache"/*) directory=$PWD ;;
	esac
	local -a env=(
		env -i
		PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
		HOME="$axv_work" CARGO_HOME="$axv_work/cargo" LC_ALL=C.UTF-8
		TERM="${TERM:-dumb}" DEBIAN_FRONTEND=noninteractive
	)
	local name
	for name in http_proxy https_proxy no_proxy RUSTFLAGS CARGO_TARGET_DIR; do
		[[ -z ${!name-} ]] || env+=("$name=${!name}")
	done
	if root_can_mount; then
		as_root unshare --mount --propagation private \
			bash "$axv_top/scripts/lib/root-enter.sh" \
			"$axv_root" "$user" "$directory" "$axv_top" "$axv_cache" "${env[@]}" "$@"
	else
		root_program usr/bin/rsync --archive --delete --exclude=/.git --exclude=/target \
			"$axv_top/" "$axv_root$axv_top/"
		as_root cp /etc/resolv.conf "$axv_root/etc/resolv.conf"
		root_chroot "$user" "$directory" "${env[@]}" "$@"
	fi
}

# root_chroot UID:GID DIRECTORY COMMAND...
root_chroot() {
	local user=$1
	shift
	# shellcheck disable=SC2016 # expanded by the inner shell
	as_root chroot --userspec="$user" "$axv_root" \
		/bin/sh -c 'cd "$1" && shift && exec "$@"' sh "$@"
}

# root_program PROGRAM ARGUMENT... runs a program of the build root from outside
# with that root's own dynamic loader: no chroot, no mount, no privilege.
root_program() {
	root_program_words "$1"
	shift
	"${root_words[@]}" "$@"
}

# The words of such a command, up to the arguments, in root_words.
root_program_words() {
	root_words=(
		env "QEMU_MODULE_DIR=$axv_root/usr/lib/x86_64-linux-gnu/qemu"
		"$axv_root/lib64/ld-linux-x86-64.so.2"
		--library-path "$axv_root/usr/lib/x86_64-linux-gnu"
		"$axv_root/$1"
	)
}
