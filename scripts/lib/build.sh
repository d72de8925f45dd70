# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# Our own builds, all inside the build root and outside the checkout: the
# module from a synchronised copy, userspace into a target directory of its own.

# module_path RELEASE: where the module for that kernel is.
module_path() { printf '%s/module/%s/axvcpu.ko\n' "$axv_work" "$1"; }

# program_path NAME
program_path() {
	printf '%s/target/lab/%s/release/%s\n' "$axv_work" "$axv_target" "$1"
}

# make and cargo know best what is out of date: both always run, and are quick
# when nothing changed.
build_module() {
	timed "module-$1" "Module for $1" build_module_make "$1"
}

build_module_make() {
	local dir
	dir=$(dirname "$(module_path "$1")")
	mkdir -p "$dir"
	in_root rsync --archive --delete --filter=':- .gitignore' \
		--exclude=/.git "$axv_top/" "$dir/"
	in_root make "-j$(nproc)" "${axv_kernel_make[@]}" -C "$(kernel_headers "$1")" "M=$dir"
	[[ -f $dir/axvcpu.ko ]] || {
		echo "the build left no axvcpu.ko in $dir"
		return 1
	}
}

# build_lab_module NAME: a module that a test needs in the lab host, for its kernel: that of
# scripts/lab/NAME. It is /lab/tests/axvcpu_NAME.ko there.
build_lab_module() {
	local kernel=${host_kernel:-$axv_kernel} dir module=axvcpu_${1//-/_}.ko
	dir=$axv_work/$1-$kernel
	timed "$1-$kernel" "Module '$1' for $kernel" build_lab_module_make "$1" "$dir" "$kernel"
	host_files[/lab/tests/$module]=$dir/$module
}

build_lab_module_make() {
	mkdir -p "$2"
	cp "$axv_top/scripts/lab/$1"/* "$2/"
	in_root make "${axv_kernel_make[@]}" -C "$(kernel_headers "$3")" "M=$2"
}

build_programs() {
	timed programs "axvmm and the test programs" build_programs_cargo
}

build_programs_cargo() {
	cd "$axv_top"
	CARGO_TARGET_DIR=$axv_work/target/lab \
		RUSTFLAGS=$axv_rustflags \
		in_root cargo build --release --locked --target "$axv_target" "${axv_packages[@]}"
	local name
	for name in "${axv_programs[@]}"; do
		[[ -x $(program_path "$name") ]] || {
			echo "the workspace built no program named $name"
			return 1
		}
	done
}
