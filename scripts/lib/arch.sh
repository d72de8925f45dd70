# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# The two architectures of a lab host, and what the lab must know of each. The build
# root is x86-64's; for the other one it gets cross compilers, the second QEMU and
# packages of Debian's other architecture, the first time that they are asked for.

axv_cross_packages=(
	gcc-14-aarch64-linux-gnu gcc-aarch64-linux-gnu libc6-dev-arm64-cross
	libstd-rust-dev:arm64 qemu-system-arm
)

# arch_select ARCH: x86_64 or aarch64, for all that follows.
arch_select() {
	local name
	axv_arch=$1
	case $axv_arch in
	x86_64)
		axv_debian_arch=amd64
		axv_triple=x86_64-linux-gnu
		axv_target=x86_64-unknown-linux-gnu
		axv_busybox=$axv_root/usr/bin/busybox
		axv_choice=kernel-main
		axv_kernel_make=()
		axv_rustflags='-C target-feature=+crt-static'
		axv_packages=(--workspace --bins)
		axv_programs=(axvmm axvcpu-guests axvcpu-abuse axvcpu-peer axvcpu-bench axvcpu-load)
		axv_host_modules=(kvm-amd kvm-intel msr vfat loop zram)
		;;
	aarch64)
		axv_debian_arch=arm64
		axv_triple=aarch64-linux-gnu
		axv_target=aarch64-unknown-linux-gnu
		axv_busybox=$axv_work/cross/busybox
		axv_choice=kernel-main-aarch64
		axv_kernel_make=(ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu- CROSS_COMPILE_COMPAT=)
		axv_rustflags='-C target-feature=+crt-static -C linker=aarch64-linux-gnu-gcc-14'
		# Peer is x86's so far.
		axv_programs=(axvmm axvcpu-guests axvcpu-abuse axvcpu-bench axvcpu-load)
		axv_packages=(--workspace)
		for name in "${axv_programs[@]}"; do axv_packages+=(--bin "$name"); done
		axv_host_modules=(vfat loop zram) # KVM is built in
		;;
	esac
}
arch_select x86_64

# What the chosen architecture wants of the build root beyond what is in it.
arch_prepare() {
	[[ $axv_arch == aarch64 ]] || return 0
	step cross "$(key_of "${axv_cross_packages[@]}" "$(code_of arch_cross)" </dev/null)" \
		"Cross compilers and QEMU for aarch64" arch_cross
}

# Two busyboxes cannot be installed side by side: the second one is only unpacked.
arch_cross() {
	in_root_as_root dpkg --configure -a
	in_root_as_root dpkg --add-architecture arm64
	in_root_as_root apt-get update
	in_root_as_root apt-get install --yes "${axv_cross_packages[@]}"
	local tmp=$axv_work/cross.tmp
	rm -rf "$tmp" "$axv_work/cross"
	mkdir -p "$tmp"
	cd "$tmp"
	in_root_as_root apt-get download busybox-static:arm64
	in_root dpkg-deb --extract busybox-static_*.deb tree
	mv tree/usr/bin/busybox busybox
	rm -rf tree ./*.deb
	cd /
	mv "$tmp" "$axv_work/cross"
}
