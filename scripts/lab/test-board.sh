# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# On an AArch64 lab host: how guests end there, on both hypervisors. Exit statuses are
# axvmm(1)'s.

# shellcheck source=tap.sh
. /lab/tests/tap.sh

# ends NAME HYPERVISOR CONFIG STATUS WORDS: a guest ends axvmm with that status and message
# (any, if there are no words).
ends() {
	axvmm --hypervisor "$2" --config "$3" >/tmp/guest.out 2>&1 </dev/null &
	wait_limited $! 300
	guest_status=$?
	if [ $guest_status -ne "$4" ]; then
		not_ok "$1 ($2)" "axvmm ended with status $guest_status instead of $4"
		show /tmp/guest.out
	elif [ -n "$5" ] && ! grep -q "$5" /tmp/guest.out; then
		not_ok "$1 ($2)" "the message lacks '$5'"
		show /tmp/guest.out
	else
		ok "$1 ($2)"
	fi
}

# raw NAME: a guest of the instructions on standard input, as octal escapes of printf.
raw() {
	# shellcheck disable=SC2059 # that is what it is for
	printf "$(cat)" >"/tmp/$1.bin"
	cat >"/tmp/$1.toml" <<-EOT
		[kernel]
		kernel_path = "$1.bin"
		entry_point = 0x40200000
		memory = "64M"
	EOT
}

for hypervisor in axvcpu kvm; do
	if axvmm --hypervisor $hypervisor doctor >/tmp/doctor.out; then
		ok "doctor finds no problem ($hypervisor)"
	else
		not_ok "doctor finds no problem ($hypervisor)" "status $?"
		show /tmp/doctor.out
	fi
done

# No init, so the kernel panics, and a panic resets.
sed 's|^cmdline = "|&panic=-1 rdinit=/none init=/none |' /lab/vm.toml >/tmp/panic.toml

# movz x0, #0x900, lsl 16; ldp x1, x2, [x0]: two registers at once from the serial port.
raw pair <<'EOT'
\000\040\241\322\001\010\100\251
EOT
# movz w0, #0x8400, lsl 16; movk w0, #2; hvc #0: PSCI's CPU_OFF.
raw off <<'EOT'
\000\200\260\122\100\000\200\162\002\000\000\324
EOT
# movz w0, #0x8400, lsl 16; movk w0, #8; hvc #0: PSCI's SYSTEM_OFF.
raw shutdown <<'EOT'
\000\200\260\122\000\001\200\162\002\000\000\324
EOT

for hypervisor in axvcpu kvm; do
	ends "a guest switches itself off" $hypervisor /tmp/shutdown.toml 0 ''
	ends "a kernel that panics resets" $hypervisor /tmp/panic.toml 4 'reset (by PSCI)'
	ends "an access that is not decoded is named" $hypervisor /tmp/pair.toml 8 'accesses 0x9000000'
done
# KVM tells nobody.
ends "the last CPU leaves" axvcpu /tmp/off.toml 12 'nothing can wake it'
plan
