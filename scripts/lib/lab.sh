# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# The lab as a whole: loads the other parts in their order and sets everything up.

axv_lib=$(dirname -- "${BASH_SOURCE[0]}")
# shellcheck source=lib/common.sh
. "$axv_lib/common.sh"
# shellcheck source=lib/cache.sh
. "$axv_lib/cache.sh"
# shellcheck source=lib/packages.sh
. "$axv_lib/packages.sh"
# shellcheck source=lib/root.sh
. "$axv_lib/root.sh"
# shellcheck source=lib/arch.sh
. "$axv_lib/arch.sh"
# shellcheck source=lib/kernel.sh
. "$axv_lib/kernel.sh"
# shellcheck source=lib/debug-kernel.sh
. "$axv_lib/debug-kernel.sh"
# shellcheck source=lib/build.sh
. "$axv_lib/build.sh"
# shellcheck source=lib/image.sh
. "$axv_lib/image.sh"
# shellcheck source=lib/host.sh
. "$axv_lib/host.sh"
# shellcheck source=lib/bochs.sh
. "$axv_lib/bochs.sh"

# Machine, build root and the main kernel (axv_kernel), for the architecture chosen.
lab_prepare() {
	packages_check_machine
	cache_lock
	packages_install
	root_make
	arch_prepare
	kernel_choose
	kernel_prepare "$axv_kernel"
}

# Our own part for the main kernel, and the images.
lab_build() {
	build_module "$axv_kernel"
	build_programs
	image_base "$axv_kernel"
	[[ $host_lab != bochs ]] || bochs_prepare "$axv_kernel"
	cache_unlock
}
