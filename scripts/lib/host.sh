# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# The lab host: a stock Debian kernel in QEMU with our module and programs. One
# boot runs one session (a shell script) and comes back with its status. With
# host_lab=bochs it boots in Bochs instead (see bochs.sh, and host_use).
#
# QEMU is the build root's (see root_program): one version on every machine.
#
# Three channels lead out of the host: hvc0 is the session's terminal or output,
# the serial port the kernel's messages (a log file), and a virtio port tells what
# became of it all (see scripts/lab/host-init).

# What a boot is made of; callers set these before host_boot.
host_lab=qemu   # or bochs
host_kernel=    # release; the main kernel if empty
host_cpu=       # CPU model of an aarch64 host; if empty, neoverse-n1
host_board=     # what an aarch64 host is, if not EL2 and a GICv3: properties of "virt"
host_options=   # more for the kernel's command line
host_cpus=      # if empty, what suits the lab
host_memory=    # MiB, the same
host_share=     # directory to show at /share
host_kvm=       # not empty: load KVM as well
host_terminal=  # not empty: the session gets this terminal
host_check=     # not empty: remove the module at the end
host_icount=    # not empty: the counter of QEMU's CPU (time-stamp counter, CNTPCT_EL0) counts instructions
host_limit=0    # seconds until the watchdog ends the host, 0 for none
host_patience=1 # by so much longer everything may take, the tests' own limits too
declare -A host_files=() # path in the host -> file here

# What host_boot found out.
host_status=    # the session's exit status, empty if it never ended
host_trouble=   # why there is no status, or why the run is not clean
host_log=       # the kernel's messages

# Lines in the kernel's messages that no run may leave.
host_bad_lines='BUG:|WARNING:|Oops:|\<Call Trace|general protection|kernel panic - |lockdep is turned off|possible .*deadlock|rcu.*(stall|self-detected)|blocked for more than|soft lockup|hard lockup|Bad FPU state|scheduling while atomic|sleeping function called|corruption|UBSAN:|refcount_t:|unable to handle|Bad page|unchecked MSR access|suspected memory leak'

# host_use LAB: takes a lab by the name that users know it by.
host_labs=(qemu bochs bochs-vmx bochs-svm)
host_use() {
	case $1 in
	qemu) host_lab=qemu ;;
	bochs | bochs-vmx) host_lab=bochs && bochs_cpu vmx ;;
	bochs-svm) host_lab=bochs && bochs_cpu svm ;;
	esac
}

# KVM is of use only where it passes the virtualization extension on.
host_can_nest() {
	local vendor
	[[ -r /dev/kvm && -w /dev/kvm ]] || return 1
	for vendor in amd intel; do
		[[ $(cat "/sys/module/kvm_$vendor/parameters/nested" 2>/dev/null) == [Y1]* ]] && return
	done
	return 1
}

# The per-boot part of the host's initramfs: module, programs, session.
host_overlay() {
	local tree=$1/tree session=$2 name
	mkdir -p "$tree/lab/bin"
	if [[ -f $(module_path "$host_kernel") ]]; then
		cp "$(module_path "$host_kernel")" "$tree/lab/"
	fi
	for name in "${axv_programs[@]}"; do
		[[ ! -x $(program_path "$name") ]] || cp "$(program_path "$name")" "$tree/lab/bin/"
	done
	for name in "${!host_files[@]}"; do
		mkdir -p "$tree$(dirname "$name")"
		cp "${host_files[$name]}" "$tree$name"
	done
	printf '%s\n' "$session" >"$tree/lab/session"
	{
		printf 'LAB=%q PATIENCE=%q ARCH=%q SHARE=%q KVM=%q CHECK=%q TERMINAL=%q\n' \
			"$host_lab" "$host_patience" "$axv_arch" "${host_share:+yes}" "${host_kvm:+yes}" "${host_check:+yes}" "${host_terminal:+yes}"
		if [[ -n $host_terminal ]]; then
			printf 'TERM=%q ROWS=%q COLUMNS=%q\n' "${TERM:-vt100}" \
				"$(stty size | cut -d' ' -f1)" "$(stty size | cut -d' ' -f2)"
		fi
	} >"$tree/lab/session.env"
	image_pack "$tree" "$1/overlay.img"
	cat "$(kernel_dir "$host_kernel")/host.img" "$1/overlay.img" >"$1/initrd.img"
	rm -rf "$tree" "$1/overlay.img"
}

# host_boot SESSION: boots, runs the script text SESSION, sets the results above.
# Returns 0 whatever the session did: callers look at host_status and
# host_trouble.
host_boot() {
	local session=$1 run status=0 host_limit=$((host_limit * host_patience))
	: "${host_kernel:=$axv_kernel}"
	mkdir -p "$axv_cache/runs"
	run=$(mktemp -d "$axv_cache/runs/XXXXXX")
	# shellcheck disable=SC2064 # this run's name, now
	trap "host_cleanup '$run'" EXIT
	host_overlay "$run" "$session"
	host_log=$axv_logs/host-$(date +%m%d-%H%M%S)-${run##*/}.log
	touch "$host_log" "$run/control"

	"host_run_$host_lab" "$run"
	host_conclude "$run" "$status"
	host_cleanup "$run"
	trap - EXIT
}

# What QEMU must be told of the machine, in host_machine and host_spare_cpus, and the kernel, in
# host_cmdline: its console, and on a PC not to count the timer's ticks at first, since
# a busy machine may keep QEMU from giving them in time. Nor to compare its time-stamp
# counters with another clock: they are one counter of this machine's, but a CPU that
# waits for its turn between the two readings would find them unstable.
host_machine_words() {
	host_spare_cpus=0
	case $axv_arch in
	x86_64)
		host_cmdline='console=ttyS0 no_timer_check tsc=nowatchdog'
		if [[ -n $host_icount ]]; then
			host_machine=(-accel tcg -cpu EPYC -icount "shift=0,sleep=off")
		elif host_can_nest; then
			host_machine=(-accel kvm -cpu host)
		else
			host_machine=(-accel tcg -cpu EPYC)
			# QEMU's other CPUs clear a flag of the first one's with every FXRSTOR and XRSTOR, and
			# write the word back that also tells whether its guest has nested paging and whether
			# it takes interrupts (cpu_clear_ignne in QEMU 10): a guest there may lose its state,
			# and so may the host. With several CPUs the first one is there for nobody.
			if ((host_cpus > 1)); then
				host_spare_cpus=1
				host_cmdline+=' isolcpus=0'
			fi
		fi
		;;
	aarch64)
		# Here EL2 is always emulated.
		host_cmdline='console=ttyAMA0'
		host_machine=(-accel tcg -machine "virt,${host_board:-virtualization=on,gic-version=3}"
			-cpu "${host_cpu:-neoverse-n1}")
		# The counter's frequency, so that it counts instructions, too.
		[[ -z $host_icount ]] || host_machine=("${host_machine[@]},cntfrq=1000000000" -icount "shift=0,sleep=off")
		;;
	esac
}

# host_run_qemu RUN: one boot, in the directory that holds its files. Sets the status
# of host_boot.
host_run_qemu() {
	local run=$1 fs_pid=''
	: "${host_cpus:=2}"
	host_machine_words
	local -a qemu=(
		"${host_machine[@]}"
		-nodefaults -no-user-config -display none -no-reboot
		-L "$axv_root/usr/share/qemu" -L "$axv_root/usr/share/seabios"
		-smp "$((host_cpus + host_spare_cpus))" -m "${host_memory:=2048}"
		-kernel "$(kernel_dir "$host_kernel")/vmlinuz" -initrd "$run/initrd.img"
		-append "$host_cmdline loglevel=7 panic=-1 oops=panic $host_options"
		-chardev "file,id=log,path=$host_log" -serial chardev:log
		-device virtio-serial-pci
		-device "virtconsole,chardev=session"
		-chardev "file,id=control,path=$run/control"
		-device "virtserialport,chardev=control,name=axvcpu.control"
		-device virtio-rng-pci
	)
	if [[ -n $host_terminal ]]; then
		qemu+=(-chardev "stdio,id=session,mux=on,signal=off"
			-mon chardev=session -echr 0x1e)
	else
		qemu+=(-chardev "stdio,id=session,signal=off")
	fi
	if [[ -n $host_share ]]; then
		root_program usr/libexec/virtiofsd --sandbox none --log-level error \
			--socket-path "$run/share" --shared-dir "$host_share" \
			>"$run/share.log" 2>&1 </dev/null &
		fs_pid=$!
		qemu+=(-object "memory-backend-memfd,id=ram,size=${host_memory}M,share=on"
			-machine memory-backend=ram
			-chardev "socket,id=share,path=$run/share"
			-device "vhost-user-fs-pci,chardev=share,tag=share")
		host_wait_for "$run/share" "$fs_pid" || die "virtiofsd did not start: $(<"$run/share.log")"
	fi

	root_program_words "usr/bin/qemu-system-$axv_arch"
	qemu=("${root_words[@]}" "${qemu[@]}")
	((host_limit == 0)) ||
		qemu=(timeout --foreground --kill-after=5 "$host_limit" "${qemu[@]}")
	if [[ -n $host_terminal ]]; then
		"${qemu[@]}" 2>"$run/qemu.log" || status=$?
	else
		"${qemu[@]}" 2>"$run/qemu.log" </dev/null || status=$?
	fi
	[[ -z $fs_pid ]] || wait "$fs_pid" || true
}

# Waits up to five seconds for a socket to appear while its maker lives.
host_wait_for() {
		for _ in {1..100}; do
		[[ ! -S $1 ]] || return 0
		kill -0 "$2" 2>/dev/null || return 1
		sleep 0.05
	done
	return 1
}

host_cleanup() {
	local job
	for job in $(jobs -p); do kill "$job" 2>/dev/null || true; done
	rm -rf "$1"
	# The last fifty logs are enough to look back.
	find "$axv_logs" -name 'host-*.log' -printf '%T@ %p\n' | sort -n |
		head -n -50 | cut -d' ' -f2- | xargs -r rm -f
}

# What became of the run: from QEMU's status, the control port and the log.
host_conclude() {
	local run=$1 status=$2 fact
	host_status='' host_trouble=''
	fact=$(sed -n 's/^status \([0-9]*\)$/\1/p' "$run/control")
	if [[ -n $fact ]]; then
		host_status=$fact
	elif fact=$(sed -n 's/^broken //p' "$run/control") && [[ -n $fact ]]; then
		host_trouble="the lab host could not be set up: $fact"
	elif ((status == 124 || status == 137)); then
		host_trouble="the lab host did not finish in $host_limit s"
	elif ((status == 152)); then # SIGXCPU
		host_trouble="the emulator did not finish in $(ulimit -St) s of a CPU's time"
	elif ((status != 0)); then
		host_trouble="the emulator ended with status $status: $(tail -n 1 "$run/$host_lab.log")"
	elif grep -qi 'kernel panic - ' "$host_log"; then
		host_trouble="the lab host's kernel died: $(grep -m 1 -i 'kernel panic - ' "$host_log")"
	else
		host_trouble="the lab host stopped before the session's end"
	fi
	[[ -z $host_trouble && -n $host_check ]] || return 0
	if ! grep -qx unloaded "$run/control"; then
		host_trouble="the module did not unload: $(sed -n 's/^stuck //p' "$run/control")"
	fi
	if fact=$(grep -m 3 -i -E "$host_bad_lines" "$host_log"); then
		host_trouble="the lab host's kernel complained: $fact"
	fi
}
