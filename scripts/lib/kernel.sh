# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# Stock Debian kernels: which one, its files, and headers that can build Rust.
#
# No kernel is compiled, but for one that nothing else needs (debug-kernel.sh). Debian's
# headers package lacks the metadata of the kernel's Rust crates; `make prepare` in the
# matching source tree makes it again with the very compiler Debian used, and it is
# copied into the headers.

axv_kernel_pin=7.3.4+deb13-cloud # and the architecture
# Names what kernel_metadata leaves behind. It is minutes of work, so an edit that
# changes nothing of that keeps the name.
axv_metadata_recipe=937b57850fd91b1a764d309512bfda55
axv_kernel_second=7.2 # newest of this series, for `scripts/test kernels`

# kernel_dir RELEASE: vmlinuz and lib/modules of a kernel.
kernel_dir() { printf '%s/kernels/%s\n' "$axv_work" "$1"; }

# kernel_headers RELEASE: its object directory, as seen inside the root.
kernel_headers() { printf '/usr/src/linux-headers-%s\n' "$1"; }

# Releases the archive offers, newest first, optionally of one series.
kernel_releases() {
	in_root_as_root apt-cache pkgnames linux-headers- |
		sed -n "s/^linux-headers-\(${1-[0-9]*}[0-9.]*+deb13-cloud-$axv_debian_arch\)$/\1/p" |
		sort --version-sort --reverse
}

# Takes the pinned kernel, else the newest one with CONFIG_RUST. The choice is
# kept in a file: a kernel once set up stays until the pin changes.
kernel_choose() {
	local pin=$axv_kernel_pin-$axv_debian_arch
	step "$axv_choice" "$(key_of "$pin" "$(code_of kernel_choose_main)" </dev/null)" \
		"Kernel choice" kernel_choose_main "$pin"
	axv_kernel=$(<"$axv_cache/$axv_choice")
	[[ $axv_kernel == "$pin" ]] ||
		say "Kernel $pin is gone from the archive; using $axv_kernel."
}

kernel_choose_main() {
	in_root_as_root apt-get update
	local -a candidates
	mapfile -t candidates < <(kernel_releases)
	printf 'offered: %s\n' "${candidates[*]}"
	local release
	for release in "$1" "${candidates[@]}"; do
		[[ " ${candidates[*]} " == *" $release "* ]] || continue
		kernel_install_headers "$release"
		if grep -qx 'CONFIG_RUST=y' "$axv_root$(kernel_headers "$release")/.config"; then
			kernel_record "$axv_choice" "$release"
			return
		fi
	done
	echo "trixie-backports offers no cloud kernel with CONFIG_RUST=y"
	return 1
}

kernel_choose_second() {
	step kernel-second "$(key_of "$axv_kernel_second" "$(code_of kernel_choose_series)" </dev/null)" \
		"Second kernel choice" kernel_choose_series
	axv_kernel2=$(<"$axv_cache/kernel-second")
}

kernel_choose_series() {
	in_root_as_root apt-get update
	local release
	release=$(kernel_releases "${axv_kernel_second/./\\.}\\." | head -n 1)
	[[ -n $release ]] || {
		echo "trixie-backports offers no $axv_kernel_second cloud kernel"
		return 1
	}
	kernel_install_headers "$release"
	kernel_record kernel-second "$release"
}

kernel_record() {
	printf '%s\n' "$2" >"$axv_cache/$1.tmp"
	mv "$axv_cache/$1.tmp" "$axv_cache/$1"
}

kernel_install_headers() {
	# Heals an installation that was interrupted.
	in_root_as_root dpkg --configure -a
	in_root_as_root apt-get install --yes "linux-headers-$1"
}

# kernel_prepare RELEASE: everything the lab needs of one kernel.
kernel_prepare() {
	step "kernel-$1" "$(key_of "$1" "$(code_of kernel_unpack)" </dev/null)" \
		"Kernel $1" kernel_unpack "$1"
	step "metadata-$1" "$(key_of "$1" "$axv_metadata_recipe" </dev/null)" \
		"Rust metadata for its headers" kernel_metadata "$1"
}

# The stock vmlinuz and modules, unpacked; modules stay compressed.
kernel_unpack() {
	local release=$1 dir tmp package
	dir=$(kernel_dir "$release") tmp=$dir.tmp
	rm -rf "$dir" "$tmp"
	mkdir -p "$tmp/debs"
	cd "$tmp/debs"
	in_root_as_root apt-get download \
		"linux-binary-$release" "linux-modules-$release"
	for package in *.deb; do
		in_root dpkg-deb --extract "$package" "$tmp/tree"
	done
	cd "$tmp"
	mkdir lib
	mv tree/usr/lib/modules lib/modules
	mv "lib/modules/$release/vmlinuz" vmlinuz
	rm -rf debs tree
	in_root depmod --basedir "$tmp" "$release"
	cd /
	mv "$tmp" "$dir"
}

# kernel_source RELEASE DIRECTORY: the source that Debian built that kernel from.
kernel_source() {
	local version tmp=$2.tmp
	# shellcheck disable=SC2016 # a dpkg format
	version=$(in_root dpkg-query -W -f '${Version}' "linux-headers-$1")
	rm -rf "$2" "$tmp"
	mkdir -p "$tmp/deb"
	cd "$tmp"
	in_root_as_root apt-get download "linux-source-$(cut -d. -f1,2 <<<"$1")=$version"
	in_root dpkg-deb --extract linux-source-*.deb deb
	in_root tar --extract --strip-components=1 --file deb/usr/src/linux-source-*.tar.xz
	rm -rf deb linux-source-*.deb
	cd /
	mv "$tmp" "$2"
}

kernel_metadata() {
	local release=$1 headers work=$axv_work/source-$1
	headers=$(kernel_headers "$release")
	kernel_source "$release" "$work"
	cd "$work"
	cp "$axv_root$headers/.config" .config
	local -a make=(make "-j$(nproc)" "${axv_kernel_make[@]}" "CC=$axv_triple-gcc-14")
	in_root "${make[@]}" olddefconfig
	in_root "${make[@]}" prepare
	in_root_as_root mkdir -p "$headers/rust" "$headers/scripts"
	# shellcheck disable=SC2016 # expanded by the inner shell
	in_root_as_root sh -c 'cp rust/*.rmeta rust/*.so "$1/rust/"' sh "$headers"
	# Where the compiler knows the kernel's target by name there is no description of it.
	[[ ! -f scripts/target.json ]] || in_root_as_root cp scripts/target.json "$headers/scripts/"
	cd /
	rm -rf "$work"
}
