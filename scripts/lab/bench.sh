# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# On the lab host: measures axvcpu and KVM in one boot, in turns. BENCH_OPTIONS are
# axvcpu-bench's. Results go to a file first and come out at the end, since writing
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

axvcpu-bench facts >$results || fail "no facts"

for _ in 1 2; do
	# On VMX both share the CPU, and that is what is measured. On SVM one has to go.
	if [ $vendor = intel ]; then
		modprobe kvm-intel || fail "kvm-intel does not load"
	fi
	# shellcheck disable=SC2086 # words
	axvcpu-bench exits axvcpu $BENCH_OPTIONS >>$results || fail "axvcpu"
	modprobe kvm-$vendor || fail "kvm-$vendor does not load"
	# shellcheck disable=SC2086 # words
	axvcpu-bench exits kvm $BENCH_OPTIONS >>$results || fail "KVM"
	[ $vendor = intel ] || rmmod kvm_amd || fail "kvm_amd does not go"
done

cat $results
