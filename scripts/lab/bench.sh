# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# On the lab host: measures axvcpu and KVM in one boot, in turns, as often as BENCH_TURNS
# says. BENCH_PART is "exits", with BENCH_OPTIONS for axvcpu-bench, or "boot", which is whole
# guests. What comes out is told in bench/src/report.rs; lines of "step" say how far it is.
# All of it is said between measurements, with time for the host to calm down.

# After boot the kernel has things to do for some seconds.
sleep 5

vendor=amd
grep -q GenuineIntel /proc/cpuinfo && vendor=intel
[ "$(uname -m)" != aarch64 ] || vendor=arm

fail() {
	echo "bench.sh: $*" >&2
	exit 1
}

step() {
	printf 'step\t%s\n' "$*"
	sleep 1
}

load_kvm() {
	[ $vendor = arm ] || modprobe "kvm-$vendor" || fail "kvm-$vendor does not load"
}

parameter() { cat "/sys/module/$1/parameters/$2"; }

facts() {
	axvcpu-bench facts || fail "no facts"
	dmesg | sed -n 's/.*axvcpu: \(at a change of vCPU:.*\|after exit:.*\)/fact\taxvcpu, beyond what the kernel does for all\t\1/p'
	[ $vendor != intel ] || printf 'fact\twhat the CPU does of the local APIC\taxvcpu apic_steps=%s, kvm_intel enable_apicv=%s\n' \
		"$(parameter axvcpu apic_steps)" "$(parameter kvm_intel enable_apicv)"
}

# measure HYPERVISOR: a row that fails says so, and is not the end.
measure() {
	step "turn $turn of $BENCH_TURNS, $1"
	# shellcheck disable=SC2086 # words
	case $BENCH_PART in
	exits) axvcpu-bench exits "$1" $BENCH_OPTIONS ;;
	boot) axvcpu-bench boot "$1" ;;
	esac || fail "$BENCH_PART under $1"
}

# Some of what the kernel does against weaknesses it tells only when KVM is there.
load_kvm
facts
for turn in $(seq "$BENCH_TURNS"); do
	# On VMX and on AArch64 both share the CPU, and that is what is measured. On SVM one has
	# to go.
	[ $vendor != amd ] || rmmod kvm_amd || fail "kvm_amd does not go"
	measure axvcpu
	load_kvm
	measure kvm
done
