# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# On the lab host: an unmodified Linux guest boots to userspace and powers off,
# whatever happens around it, and leaves nothing behind. With HYPERVISOR=kvm it is
# KVM that carries the guests, since axvmm is tested as well.
#
# test-linux.sh [SIZES [KILLS]]: the guest's memory in MiB, each size that is tried; and
# how many guests are killed.

# shellcheck source=tap.sh
. /lab/tests/tap.sh

limit=120 # seconds for one boot; some ten times what it takes

built_in=
sizes=${1:-128 512 1024 1536} kills=${2:-20}

if [ "$hypervisor" = kvm ] && [ "$(uname -m)" = aarch64 ]; then
	# Every exit takes it some thousand instructions that are emulated.
	limit=300
	built_in=yes
	module_out() { :; }
	module_in() { :; }
elif [ "$hypervisor" = kvm ]; then
	vendor=$(sed -n 's/^kvm_\(amd\|intel\) .*/\1/p' /proc/modules)
	module_out() { rmmod "kvm_$vendor" && rmmod kvm; }
	module_in() { modprobe "kvm-$vendor"; }
else
	module_out() { rmmod axvcpu; }
	module_in() { insmod /lab/axvcpu.ko; }
fi

guest_config /tmp/vm.toml 256M

# The first boot also says how long one takes.
begin=$(now)
guest_run "boots to userspace and powers off" /tmp/vm.toml $limit
boot_ms=$(($(now) - begin))
echo "one guest, start to power-off: $boot_ms ms"

# confined FILTER OPTION...: whether every thread of axvmm is under FILTER (proc(5),
# Seccomp) while a guest runs, which is not hindered.
confined() {
	want=$1 name="every thread has the system calls that it needs only"
	shift
	[ "$want" = 2 ] || name="and with $* every system call"
	axvmm --config /tmp/vm.toml "$@" >/tmp/confined.out 2>&1 </dev/null &
	vmm=$!
	vcpu_runs $vmm
	found=$(sed -n 's/^Seccomp:[^0-9]*//p' /proc/$vmm/task/*/status 2>/dev/null | tr -d '\n')
	guest_judge "boots $([ "$want" = 2 ] && echo in || echo without) the sandbox" $vmm $limit /tmp/confined.out
	# KVM adds a thread of its own.
	case $found in
	*[!$want]* | '' | ?) not_ok "$name" "filters of its threads: '$found' instead of $want for each of at least two" ;;
	*) ok "$name" ;;
	esac
}
confined 2
confined 0 --no-sandbox

# A vCPU keeps to the host CPUs that the configuration gives it.
if [ "$(nproc)" -gt 1 ]; then
	sed 's/^cpu_num = .*/&\nphys_cpu_sets = [0x2]/' /tmp/vm.toml >/tmp/placed.toml
	axvmm --config /tmp/placed.toml >/tmp/placed.out 2>&1 </dev/null &
	vmm=$!
	vcpu_runs $vmm
	for thread in "/proc/$vmm/task"/*; do
		grep -q vcpu0 "$thread/comm" && placed=$(sed -n 's/^Cpus_allowed_list:[^0-9]*//p' "$thread/status")
	done
	guest_judge "boots on the host's second CPU" $vmm $limit /tmp/placed.out
	if [ "$placed" = 1 ]; then
		ok "and stays there"
	else
		not_ok "and stays there" "its thread may run on CPU '$placed'"
	fi
else
	skip "boots on the host's second CPU" "there is one CPU only"
fi

# Every thread of axvmm hops between the host's CPUs as fast as taskset can.
if [ "$(nproc)" -gt 1 ]; then
	axvmm --config /tmp/vm.toml >/tmp/hop.out 2>&1 </dev/null &
	vmm=$!
	# Two masks of all that it may run on.
	mask=$((0x$(taskset -p $$ | sed 's/.* //')))
	(
		hops=0 cpu=$((mask & -mask))
		while kill -0 $vmm 2>/dev/null; do
			for thread in "/proc/$vmm/task"/*; do
				taskset -p "$(printf %x $cpu)" "${thread##*/}" >/dev/null 2>&1 && hops=$((hops + 1))
			done
			cpu=$((mask - cpu))
			usleep 10000
			echo $hops >/tmp/hops
		done
	) &
	hopper=$!
	guest_judge "boots while its threads move between CPUs" $vmm $((limit * 2)) /tmp/hop.out
	wait $hopper
	hops=$(cat /tmp/hops)
	if [ "$hops" -ge 100 ]; then
		ok "its threads moved often enough ($hops times)"
	else
		not_ok "its threads moved often enough" "only $hops times"
	fi
else
	skip "boots while its threads move between CPUs" "there is one CPU only"
fi

# Two at once.
axvmm --config /tmp/vm.toml >/tmp/one.out 2>&1 </dev/null &
one=$!
axvmm --config /tmp/vm.toml >/tmp/two.out 2>&1 </dev/null &
two=$!
guest_judge "two guests at once: the first" $one $((limit * 2)) /tmp/one.out
guest_judge "two guests at once: the second" $two $((limit * 2)) /tmp/two.out

# Sizes: the guest must see what it was given, less what its kernel takes (some
# 45 MiB, and a sixty-fourth for page structures).
for mib in $sizes; do
	guest_config /tmp/size.toml "${mib}M"
	guest_run "boots with $mib MiB" /tmp/size.toml $limit || continue
	kib=$(awk '/^Mem:/ { print $2 }' /tmp/guest.out)
	if [ "$kib" -ge $(((mib * 31 / 32 - 56) * 1024)) ] && [ "$kib" -le $((mib * 1024)) ]; then
		ok "sees its $mib MiB ($kib KiB in all)"
	else
		not_ok "sees its $mib MiB" "it reports $kib KiB"
	fi
done

# Free memory and kernel objects, in KiB, with the module out and caches empty. (A debug
# kernel keeps what was freed in KASAN's quarantine, some 12 MiB after a guest, until the
# cache that it comes from is shrunk.)
settle() {
	module_out || return 1
	sync
	for _ in 1 2; do
		echo 3 >/proc/sys/vm/drop_caches
		sleep 1
		if [ -e /sys/kernel/debug/kmemleak ]; then
			for cache in /sys/kernel/slab/*/shrink; do echo 1 >"$cache"; done
		fi
	done
	echo 3 >/proc/sys/vm/drop_caches
	# Pages on the allocator's per-CPU lists are free as well.
	free_kib=$(awk '/^MemFree:/ { n += $2 } $1 == "count:" { n += 4 * $2 } END { print n }' \
		/proc/meminfo /proc/zoneinfo)
	slab_kib=$(awk '/^SUnreclaim:/ { print $2 }' /proc/meminfo)
}

# kill -9 anywhere in a boot, again and again.
settle
free_before=$free_kib slab_before=$slab_kib
module_in
# A busy machine gives a guest more time at one moment than at another: what has ended before its turn
# tells how long a boot takes now.
killed=0 tries=0
while [ $killed -lt "$kills" ] && [ $tries -lt $((kills * 4)) ]; do
	tries=$((tries + 1))
	axvmm --config /tmp/vm.toml >/tmp/kill.out 2>&1 </dev/null &
	vmm=$!
	pause_ms=$(($(od -An -N4 -tu4 /dev/urandom) % boot_ms))
	usleep $((pause_ms * 1000))
	kill -9 $vmm 2>/dev/null
	wait $vmm 2>/dev/null
	if [ $? -eq 137 ]; then
		killed=$((killed + 1))
	elif [ $pause_ms -gt 1000 ]; then
		boot_ms=$pause_ms
	fi
done
if [ $killed -ge $((kills * 3 / 4)) ]; then
	ok "killed $killed of $tries guests while they ran"
else
	not_ok "killed $kills guests while they ran" "of $tries only $killed still ran"
fi
if settle; then
	if [ -n "$built_in" ]; then
		skip "the module unloads after that" "KVM is built in"
	else
		ok "the module unloads after that"
	fi
	# A late RCU callback or another slab may hold a little; a leaked guest or its page
	# tables would be far more.
	if [ $((free_before - free_kib)) -le 512 ]; then
		ok "free memory returns ($free_before KiB before, $free_kib KiB after)"
	else
		not_ok "free memory returns" "$free_before KiB before, $free_kib KiB after"
	fi
	if [ $((slab_kib - slab_before)) -le 256 ]; then
		ok "kernel objects return ($slab_before KiB before, $slab_kib KiB after)"
	else
		not_ok "kernel objects return" "$slab_before KiB before, $slab_kib KiB after"
	fi
	module_in
	guest_run "boots after all that" /tmp/vm.toml $limit
else
	not_ok "the module unloads after that" "rmmod failed"
fi

plan
