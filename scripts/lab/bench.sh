# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# On the lab host: measures axvcpu and KVM in one boot, in turns, as often as BENCH_TURNS
# says. BENCH_PART is "exits", with BENCH_OPTIONS for axvcpu-bench, or "boot", which is whole
# guests. The results of exits come out at the end, since writing them on the way would be
# measured, too; see bench/src/main.rs for their form.

results=/tmp/results

# After boot the kernel has things to do for some seconds.
sleep 5

vendor=amd
grep -q GenuineIntel /proc/cpuinfo && vendor=intel
[ "$(uname -m)" != aarch64 ] || vendor=arm

fail() {
	[ "$BENCH_PART" != exits ] || cat $results
	echo "bench.sh: $*" >&2
	exit 1
}

# On the Intel CPU that Bochs (3.0) emulates, entries of KVM's vCPUs with a local APIC in
# the kernel fail with APICv (instruction error 7).
load_kvm() {
	case $vendor in
	intel) modprobe kvm-intel enable_apicv=0 || fail "kvm-intel does not load" ;;
	amd) modprobe kvm-amd || fail "kvm-amd does not load" ;;
	arm) ;; # it is built in
	esac
}

# Whole guests may take long: what is known of them is told at once.
[ "$BENCH_PART" = exits ] || results=/dev/stdout

measure() {
	if [ "$BENCH_PART" = exits ]; then
		# shellcheck disable=SC2086 # words
		axvcpu-bench exits "$1" $BENCH_OPTIONS >>$results || fail "exits under $1"
	else
		axvcpu-bench boot "$1" >>$results || fail "a guest under $1"
	fi
}

axvcpu-bench facts >>$results || fail "no facts"
dmesg | sed -n 's/.*axvcpu: \(at a change of vCPU:.*\)/fact\taxvcpu, beyond what the kernel does for all\t\1/p' >>$results

for _ in $(seq "$BENCH_TURNS"); do
	# On VMX and on AArch64 both share the CPU, and that is what is measured. On SVM one has to go.
	[ $vendor = amd ] || load_kvm
	measure axvcpu
	load_kvm
	measure kvm
	[ $vendor != amd ] || rmmod kvm_amd || fail "kvm_amd does not go"
done

[ "$BENCH_PART" != exits ] || cat $results
