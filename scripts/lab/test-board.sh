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

# raw NAME [CPUS]: a guest of the instructions on standard input, as octal escapes of printf.
raw() {
	# shellcheck disable=SC2059 # that is what it is for
	printf "$(tr -d '\n')" >"/tmp/$1.bin"
	cat >"/tmp/$1.toml" <<-EOT
		[base]
		cpu_num = ${2-1}
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

# movz x0, #0x900, lsl 16; ldxr w1, [x0]: exclusively from the serial port.
raw exclusive <<'EOT'
\000\040\241\322\001\174\137\210
EOT
# movz x0, #0x800, lsl 16; ldp x1, x2, [x0]: two registers at once from the distributor.
raw distributor <<'EOT'
\000\000\241\322\001\010\100\251
EOT
# Two registers at once from the clock, which must be 0x31 and 0x10, and then text to the serial
# port from a lane of a vector register:
#       mov x1, #3 << 20; msr cpacr_el1, x1; isb
#       movz x0, #0x900, lsl 16; movz x4, #0x901, lsl 16; add x4, x4, #0xfe0
#       ldp w1, w2, [x4]; sub w1, w1, #0x31; sub w2, w2, #0x10; orr w1, w1, w2; cbnz w1, 3f
#       adr x3, 2f
#    1: ldrb w1, [x3], #1; cbz w1, 3f; fmov s0, w1; st1 {v0.b}[0], [x0]; b 1b
#    3: movz w0, #0x8400, lsl 16; movk w0, #8; hvc #0
#    2: .asciz "pairs and lanes\n"
raw undecoded <<'EOT'
\001\006\240\322\101\020\030\325\337\077\003\325\000\040\241\322\044\040\241\322\204\200\077\221\201\010\100\051\041\304\000\121\102\100\000\121\041\000\002\052\341\000\000\065\043\001\000\020\141\024\100\070\201\000\000\064\040\000\047\036
\000\000\000\015\374\377\377\027\000\200\260\122\000\001\200\162\002\000\000\324\160\141\151\162\163\040\141\156\144\040\154\141\156\145\163\012\000\000\000\000
EOT
# The same a thousand times, while a second CPU puts an instruction there that reads memory, and this one
# back, again and again:
#       movz x4, #0x901, lsl 16; add x4, x4, #0xfe0; adr x5, 9f
#       movz x0, #0xc400, lsl 16; movk x0, #3; mov x1, #1; adr x2, 5f; hvc #0; cbnz x0, 4f
#       mov w6, #1000
#    1: ldp w1, w2, [x4]; subs w6, w6, #1; b.ne 1b
#       movz x0, #0x900, lsl 16; adr x3, 8f
#    2: ldrb w1, [x3], #1; cbz w1, 4f; strb w1, [x0]; b 2b
#    4: movz w0, #0x8400, lsl 16; movk w0, #8; hvc #0
#    5: adr x1, 1b; ldr w2, [x1]; ldr w3, 7f
#    6: str w3, [x1]; ic ialluis; dsb ish; str w2, [x1]; ic ialluis; dsb ish; b 6b
#    7: ldp w1, w2, [x5]
#    8: .asciz "changed\n"
#    9: .word 0, 0
raw changing 2 <<'EOT'
\044\040\241\322\204\200\077\221\105\004\000\020\000\200\270\322\140\000\200\362\041\000\200\322\002\002\000\020\002\000\000\324
\140\001\000\265\006\175\200\122\201\010\100\051\306\004\000\161\301\377\377\124\000\040\241\322\143\002\000\020\141\024\100\070
\141\000\000\064\001\000\000\071\375\377\377\027\000\200\260\122\000\001\200\162\002\000\000\324\201\376\377\020\042\000\100\271
\003\001\000\030\043\000\000\271\037\161\010\325\237\073\003\325\042\000\000\271\037\161\010\325\237\073\003\325\372\377\377\027
\241\010\100\051\143\150\141\156\147\145\144\012\000\000\000\000\000\000\000\000\000\000\000\000
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
	ends "what the hardware does not decode is emulated" $hypervisor /tmp/undecoded.toml 0 'pairs and lanes'
	ends "also where another CPU changes the instruction meanwhile" $hypervisor /tmp/changing.toml 0 '^changed'
	ends "an access that needs memory is not, but named" $hypervisor /tmp/exclusive.toml 8 'accesses 0x9000000.*0x885f7c01.*exclusive'
	ends "nor is one of the interrupt controller" $hypervisor /tmp/distributor.toml 8 'interrupt controller, at 0x8000000'
done
# KVM tells nobody.
ends "the last CPU leaves" axvcpu /tmp/off.toml 12 'nothing can wake it'
plan
