# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# On the lab host: measures axvcpu and KVM in one boot, in turns. BENCH_OPTIONS are
# axvcpu-bench's for exits; BENCH_BOOT, if not empty, asks for whole guests. Results go to a file first and come out at the end, since writing
# them on the way would be measured, too; see bench/src/main.rs for their form.

results=/tmp/results

# After boot the kernel has things to do for some seconds.
sleep 5

vendor=amd
grep -q GenuineIntel /proc/cpuinfo && vendor=intel

fail() {
	cat $results
	echo "bench.sh: $*" >&2
	exit 1
}

# On the Intel CPU that Bochs (3.0) emulates, entries of KVM's vCPUs with a local APIC in
# the kernel fail with APICv (instruction error 7).
load_kvm() {
	if [ $vendor = intel ]; then
		modprobe kvm-intel enable_apicv=0 || fail "kvm-intel does not load"
	else
		modprobe kvm-amd || fail "kvm-amd does not load"
	fi
}

axvcpu-bench facts >$results || fail "no facts"
dmesg | sed -n 's/.*axvcpu: \(at a change of vCPU:.*\)/fact\taxvcpu, beyond what the kernel does for all\t\1/p' >>$results

for _ in 1 2; do
	# On VMX both share the CPU, and that is what is measured. On SVM one has to go.
	[ $vendor = amd ] || load_kvm
	# shellcheck disable=SC2086 # words
	axvcpu-bench exits axvcpu $BENCH_OPTIONS >>$results || fail "axvcpu"
	[ -z "$BENCH_BOOT" ] || axvcpu-bench boot axvcpu >>$results || fail "boot under axvcpu"
	load_kvm
	# shellcheck disable=SC2086 # words
	axvcpu-bench exits kvm $BENCH_OPTIONS >>$results || fail "KVM"
	[ -z "$BENCH_BOOT" ] || axvcpu-bench boot kvm >>$results || fail "boot under KVM"
	[ $vendor = intel ] || rmmod kvm_amd || fail "kvm_amd does not go"
done

cat $results
