# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# The one kernel of the lab that is compiled: the main kernel's source with checks for
# locks, memory and arithmetic (scripts/lab/debug-kernel.config says which), built once
# and kept. In everything else it is a kernel like those of kernel.sh.
#
# Clang builds it: with Rust, KASAN is offered to Clang only.

# Source and objects, which is what the module is built against.
axv_debug_tree=$axv_work/debug-kernel
axv_debug_config=$axv_top/scripts/lab/debug-kernel.config

# Sets axv_debug_kernel to its release.
debug_kernel_prepare() {
	step debug-source "$(key_of "$axv_kernel" "$(code_of debug_kernel_source kernel_source)" </dev/null)" \
		"Source of $axv_kernel" debug_kernel_source
	step debug-kernel "$(key_of "$axv_kernel" "$(code_of debug_kernel_build)" <"$axv_debug_config")" \
		"Debug kernel (some 15 minutes)" debug_kernel_build
	axv_debug_kernel=$(<"$axv_cache/kernel-debug")
}

debug_kernel_source() {
	kernel_source "$axv_kernel" "$axv_debug_tree"
	# Whoever calls make here means Clang.
	printf 'export LLVM := 1\ninclude Makefile\n' >"$axv_debug_tree/GNUmakefile"
}

# make goes on where an interrupted build stopped.
debug_kernel_build() {
	local release dir tmp line lost=
	cd "$axv_debug_tree"
	cp "$axv_debug_config" lab.config
	in_root make KCONFIG_ALLCONFIG=lab.config allnoconfig
	while read -r line; do
		grep -qxF -e "$line" .config || lost+=" $line"
	done < <(grep '^CONFIG_' lab.config)
	[[ -z $lost ]] || {
		echo "the kernel does not take:$lost"
		return 1
	}
	in_root make "-j$(nproc)" bzImage modules

	release=$(in_root make --silent kernelrelease)
	dir=$(kernel_dir "$release") tmp=$dir.tmp
	rm -rf "$tmp"
	in_root make "INSTALL_MOD_PATH=$tmp" modules_install
	rm -f "$tmp/lib/modules/$release/build"
	cp arch/x86/boot/bzImage "$tmp/vmlinuz"
	in_root_as_root ln -sfn "$axv_debug_tree" "$(kernel_headers "$release")"
	rm -rf "$dir"
	mv "$tmp" "$dir"
	kernel_record kernel-debug "$release"
}
