# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# The lab host in Bochs: an Intel CPU with VMX, which QEMU does not emulate, and an AMD
# CPU as the second opinion on QEMU's, another reading of the manual that saves the
# next RIP. (Like QEMU's, it flushes the guest's TLB entries at every entry and exit:
# neither shows a flush that is missing on SVM.)
#
# Kernel, images and sessions are those of host.sh. The kernel is unpacked here and
# entered by an option ROM (scripts/lab/bochs/pvh-rom.S), which leaves seven seconds
# of a boot. The channels out of the host, see scripts/lab/host-init: the first
# serial port for the kernel's warnings, the second one for what became of it all,
# the parallel port for the session's output, and Bochs' debug port for the whole
# of the kernel's messages at the end.
#
# Bochs is built from Debian's source, which takes a minute or two, without a debugger and
# a display in it, and with what the patches in scripts/lab/bochs put right: each says
# what, and by which section of the manual. Without them guests of ours and of KVM's
# alike crash on several CPUs, or with virtual-interrupt delivery. What else it does
# otherwise than the manuals say is in tests/src/flaws.rs.

axv_bochs_packages=(bochsbios vgabios patch)
axv_bochs_features=(
	--with-nogui --disable-docbook --disable-show-ips --disable-stats
	--enable-smp --enable-cpu-level=6 --enable-x86-64 --enable-fpu --enable-all-optimizations
	--enable-a20-pin --enable-pci --enable-memtype --enable-monitor-mwait --enable-x86-debugger
	--enable-avx --enable-evex --enable-cet --enable-uintr --enable-protection-keys
	--enable-svm --enable-vmx=2
)
axv_bochs=$axv_work/bochs
axv_bochs_sources=$axv_top/scripts/lab/bochs

# bochs_cpu svm|vmx: takes the emulated CPU with that extension, with the number of
# instructions that its clocks count as a second. Intel's CPUID tells the rate of those
# clocks (leaf 15h), so there it is that; each second then takes a while.
bochs_cpu() {
	case $1 in
	svm) host_bochs_cpu=ryzen host_bochs_ips=200000000 ;;
	vmx) host_bochs_cpu=corei7_icelake_u host_bochs_ips=1497600000 ;;
	esac
}
bochs_cpu vmx

# What costs most of a boot, and tests nothing of ours: self-tests of ciphers, the
# kernel's list of certificates, and tables of tracing.
bochs_cmdline='console=ttyS0 loglevel=5 panic=-1 oops=panic idle=nomwait cryptomgr.notests=1 initcall_blacklist=load_system_certificate_list,trace_eval_init,ftrace_check_for_weak_functions'

# bochs_prepare RELEASE: Bochs, the ROM, the unpacked kernel, and a program that
# every boot wants.
bochs_prepare() {
	step bochs "$(key_of "${axv_bochs_packages[@]}" "$(code_of bochs_install)" </dev/null)" \
		"What Bochs needs" bochs_install
	step bochs-program "$(key_of "${axv_bochs_features[@]}" "$(cat "$axv_bochs_sources"/*.patch)" "$(code_of bochs_build)" </dev/null)" \
		"Bochs" bochs_build
	step bochs-rom "$(cat "$axv_bochs_sources"/*.{S,py,c} | key_of "$(code_of bochs_rom)")" \
		"Option ROM for Bochs" bochs_rom
	step "bochs-kernel-$1" "$(key_of "$(<"$axv_stamps/kernel-$1")" "$(code_of bochs_kernel)" </dev/null)" \
		"Kernel $1, unpacked" bochs_kernel "$1"
	host_files[/lab/bin/port-out]=$axv_bochs/port-out
}

bochs_install() {
	in_root_as_root apt-get update
	in_root_as_root apt-get install --yes "${axv_bochs_packages[@]}"
}

bochs_build() {
	local dir=$axv_bochs/build
	rm -rf "$dir"
	mkdir -p "$dir/lists"
	cd "$dir"
	printf 'deb-src %s/debian trixie main\n' "$axv_mirror" >sources.list
	local -a apt=(
		apt-get -o "Dir::Etc::SourceList=$dir/sources.list"
		-o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$dir/lists"
	)
	in_root_as_root "${apt[@]}" update
	in_root_as_root "${apt[@]}" source --tar-only bochs
	in_root tar --extract --strip-components=1 --file bochs_*.orig.tar.xz
	local patch
	for patch in "$axv_bochs_sources"/*.patch; do
		in_root patch --fuzz=0 --strip=1 --input="$patch"
	done
	in_root ./configure CXXFLAGS=-O2 "${axv_bochs_features[@]}"
	# All of it, for libtool: it runs outside of the root.
	in_root make "-j$(nproc)" LDFLAGS=-all-static bochs
	in_root strip bochs
	mv bochs "$axv_bochs/bochs"
	cd /
	as_root rm -rf "$dir"
}

bochs_rom() {
	mkdir -p "$axv_bochs"
	cp "$axv_bochs_sources"/*.{S,py,c} "$axv_bochs/"
	cd "$axv_bochs"
	in_root gcc-14 -c -o rom.o pvh-rom.S
	in_root objcopy --output-target=binary --only-section=.text rom.o rom.code
	in_root python3 pvh_image.py rom rom.code rom.img
	# Bochs gives memory to what it is told to fill, in this order (see pvh-rom.S).
	head -c 16 /dev/zero >touch.img
	in_root gcc-14 -O2 -Wall -Werror -static -o port-out port-out.c
}

# The vmlinux in a vmlinuz (Documentation/arch/x86/boot.rst: setup_sects,
# payload_offset, payload_length). The payload's last word is its length.
bochs_kernel() {
	local dir
	dir=$(kernel_dir "$1")
	bochs_field() { od -An -v "-tu$2" -j "$1" -N "$2" "$dir/vmlinuz"; }
	dd "if=$dir/vmlinuz" "of=$dir/vmlinux.zst" bs=1M iflag=skip_bytes,count_bytes \
		"skip=$((($(bochs_field 0x1f1 1) + 1) * 512 + $(bochs_field 0x248 4)))" \
		"count=$(($(bochs_field 0x24c 4) - 4))"
	root_program usr/bin/zstd -dcf "$dir/vmlinux.zst" >"$dir/vmlinux.tmp"
	rm "$dir/vmlinux.zst"
	mv "$dir/vmlinux.tmp" "$dir/vmlinux"
}

# host_run_bochs RUN: one boot, in the directory that holds its files. Sets the
# status of host_boot.
host_run_bochs() {
	local run=$1
	: "${host_cpus:=1}" "${host_memory:=1024}"
	root_program usr/bin/python3 "$axv_bochs/pvh_image.py" ram \
		"$(kernel_dir "$host_kernel")/vmlinux" "$run/initrd.img" \
		"$bochs_cmdline" "$host_memory" "$run/ram.img"
	bochs_config "$run" >"$run/bochsrc"

	local -a bochs=("$axv_bochs/bochs" -q -f "$run/bochsrc")
	((host_limit == 0)) ||
		bochs=(timeout --foreground --kill-after=5 "$host_limit" "${bochs[@]}")
	# The session's output is the parallel port's, file descriptor 3.
	"${bochs[@]}" 3>&1 >"$run/debug" 2>"$run/errors" </dev/null | cat ||
		status=${PIPESTATUS[0]}
	# Bochs says 1 even after an orderly end.
	((status != 1)) || status=0
	sed -i 's/\r$//' "$run/control" # it was a terminal
	cat "$run/debug" >>"$host_log"
}

# Bochs' configuration. The first two RAM images give the lowest and the highest block
# their host memory, before the third fills those from its address on (see pvh-rom.S).
bochs_config() {
	local run=$1 share=$axv_root/usr/share
	cat <<EOF
config_interface: textconfig
display_library: nogui
plugin_ctrl: serial=1, parallel=1, unmapped=1, biosdev=1, extfpuirq=1, speaker=0
romimage: file=$share/bochs/BIOS-bochs-latest, options=fastboot
vgaromimage: file=$share/vgabios/vgabios.bin
optromimage1: file=$axv_bochs/rom.img, address=0xd0000
memory: guest=$host_memory, host=$host_memory, block_size=8192
optramimage1: file=$axv_bochs/touch.img, address=0x500
optramimage2: file=$axv_bochs/touch.img, address=$(printf '%#x' $(((host_memory << 20) - 0x10000)))
optramimage3: file=$run/ram.img, address=0x800000
cpu: model=$host_bochs_cpu, count=$host_cpus:1:1, ips=$host_bochs_ips, reset_on_triple_fault=0, ignore_bad_msrs=1
clock: sync=none
vga: extension=vbe, update_freq=1, realtime=0
boot: floppy
com1: enabled=1, mode=file, dev=$host_log
com2: enabled=1, mode=file, dev=$run/control
parport1: enabled=1, file=/dev/fd/3
port_e9_hack: enabled=1
mouse: enabled=0
log: $run/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
EOF
}
