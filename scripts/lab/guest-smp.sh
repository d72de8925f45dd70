# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# In the Linux guest: are its CPUs all there, do they work together, and does the
# kernel have nothing to complain about? On the kernel's command line:
# smp.cpus=N, how many there should be, and smp.mib=N, how much data each of the eight
# workers compresses. test-smp.sh on the lab host packs it up and judges.

# shellcheck source=tap.sh
. /lab/tap.sh

argument() { sed -n "s/.*\\<$1=\\([0-9]*\\).*/\\1/p" /proc/cmdline; }
cpus=$(argument smp.cpus)
mib=$(argument smp.mib)

# same NAME FOUND EXPECTED
same() {
	if [ "$2" = "$3" ]; then ok "$1 ($2)"; else not_ok "$1" "$2 instead of $3"; fi
}

# What the host compares with its own clocks: hundredths of a second since boot,
# and the time by the kernel and by the machine's clock. A line each, since what is
# read before it makes the next late, and several times, since a line may be late.
tick() {
	sleep 1 # what was printed before is read by then
	for _ in 1 2 3 4 5; do
		echo "tick date $(date +%s)"
		echo "tick hwclock $(date -D '%a %b %e %H:%M:%S %Y' -d "$(hwclock -u | cut -c1-24)" +%s)"
		echo "tick uptime $(sed 's/ .*//;s/\.//' /proc/uptime)"
		usleep 100000
	done
	echo ticked
}

same "CPUs that are running" "$(nproc)" "$cpus"
same "processors in the list" "$(grep -c ^processor /proc/cpuinfo)" "$cpus"
# How Linux sees them together: on x86 from CPUID. On AArch64 their affinity numbers
# lead to no more than that they are all there.
if [ "$(uname -m)" = x86_64 ]; then
	same "APIC ids" "$(awk '/^apicid/ { print $3 }' /proc/cpuinfo | sort -n | tr '\n' ' ')" \
		"$(seq 0 $((cpus - 1)) | tr '\n' ' ')"
	same "cores of the package" "$(awk '/^cpu cores/ { print $4 }' /proc/cpuinfo | sort -u)" "$cpus"
	# Linux takes counters that go on at the same pace whatever the CPU does, if it has
	# such, and else the paravirtual clock.
	clock=kvm-clock
	grep -q '^flags.* nonstop_tsc' /proc/cpuinfo && clock=tsc
else
	clock=arch_sys_counter
fi
same "threads of a core" "$(cat /sys/devices/system/cpu/cpu0/topology/thread_siblings_list)" 0

tick

# Eight workers, which compress, decompress and hash, and must all come to the
# same result; where the scheduler wants them to, but the first of them is moved
# from CPU to CPU all the time.
mkdir /tmp/work
mount -t tmpfs -o size=90% tmpfs /tmp/work
i=0
while [ $i -lt "$mib" ]; do
	# Not the same in every piece, and neither easy nor impossible to compress.
	{ echo "piece $i"; head -c 1048560 /bin/busybox; } | head -c 1048576
	i=$((i + 1))
done >/tmp/work/data
want=$(sha256sum </tmp/work/data)
worker() {
	gzip -1 </tmp/work/data | gunzip | tee "/tmp/work/copy.$1" | sha256sum >"/tmp/work/sha.$1"
	md5sum <"/tmp/work/copy.$1" >"/tmp/work/md5.$1"
	rm "/tmp/work/copy.$1"
}
worker 0 &
mover=$!
pids=$!
for i in 1 2 3 4 5 6 7; do
	worker $i &
	pids="$pids $!"
done
moves=0
while kill -0 $mover 2>/dev/null; do
	taskset -p $((1 << (moves % cpus))) $mover >/dev/null 2>&1 && moves=$((moves + 1))
	usleep 20000
done
# shellcheck disable=SC2086 # one word each
wait $pids
same "workers that got back what they compressed ($mib MiB each, $moves moves)" \
	"$(cat /tmp/work/sha.* | grep -c "$want")" 8
same "different sums of the eight results" "$(cat /tmp/work/md5.? | sort -u | wc -l)" 1
umount /tmp/work
idle=$(awk -v n="$cpus" '/^cpu[0-9]/ && $2 + $3 + $4 == 0 { print $1 }' /proc/stat)
same "CPUs that did nothing" "$idle" ""

# Threads that wake each other and shoot each other's TLB entries down.
axvcpu_load() {
	/lab/axvcpu-load >/tmp/load.out
	grep -vE '^(ok|not ok|skip) - |^1\.\.' /tmp/load.out
	while read -r line; do
		case $line in
		'ok - '*) ok "${line#ok - }" ;;
		'not ok - '*) not_ok "${line#not ok - }" "see there" ;;
		1..*) loads=${line#1..} ;;
		esac
	done </tmp/load.out
}
loads=none
axvcpu_load
same "cases of axvcpu-load" "$(grep -cE '^(ok|not ok|skip) - ' /tmp/load.out)" "$loads"

# Every CPU but the first leaves and comes back, twice, while two threads hop
# about; then all of them at once.
if [ "$cpus" -gt 1 ]; then
	(while :; do :; done) &
	spinner=$!
	failed=
	for _ in 1 2; do
		for cpu in /sys/devices/system/cpu/cpu[1-9]*; do
			echo 0 >"$cpu/online" || failed="$failed ${cpu##*/} offline"
			echo 1 >"$cpu/online" || failed="$failed ${cpu##*/} online"
		done
	done
	same "CPUs that did not leave and come back" "$failed" ""
	for cpu in /sys/devices/system/cpu/cpu[1-9]*; do echo 0 >"$cpu/online"; done
	same "CPUs that stay when all others leave" "$(nproc)" 1
	for cpu in /sys/devices/system/cpu/cpu[1-9]*; do echo 1 >"$cpu/online"; done
	same "CPUs that came back" "$(nproc)" "$cpus"
	kill $spinner
fi

tick
same "clock source" "$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)" $clock

# Whether it trusts the time-stamp counters depends on whether the host does: the host
# judges.
unstable='Unstable clock detected|If you want to keep using the local clock|"trace_clock=local"|on the kernel command line$'
echo "clock $(dmesg | grep -c 'Unstable clock detected')"

# The kernel's warnings (levels 0 to 4), and what it says in passing of clocks,
# stalls and interrupts. That it makes its own thunks executable, on some of Intel's
# CPUs, is what the same kernel says on the host, too.
dmesg -r | grep -viE "$unstable|CPA detected W\^X violation" >/tmp/log
bad=$(grep -E '^<[0-4]>' /tmp/log
	grep -iE 'unstable|stall|lockup|apic error|no irq handler|spurious|call trace|blocked for more|skew' /tmp/log)
if [ -z "$bad" ]; then
	ok "the kernel has nothing to complain about"
else
	not_ok "the kernel has nothing to complain about" "$(echo "$bad" | wc -l) lines"
	echo "$bad" | head -n 10 | sed 's/^/  | /'
fi
plan
