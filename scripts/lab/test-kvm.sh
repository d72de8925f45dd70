# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# On the lab host, with KVM loaded: both hypervisors work, at the same time where the
# CPU can be shared (VMX), by turns where it cannot (SVM: who holds it is told plainly),
# and KVM comes and goes without loading our module anew. KVM's own guest is
# axvcpu-peer, which checks all that it computes.
#
# test-kvm.sh [ROUNDS [TURNS]]: how much work a guest does while it is accompanied (see
# work.sh), and how often at most KVM is loaded and unloaded meanwhile.

# shellcheck source=tap.sh
. /lab/tests/tap.sh

rounds=${1:-20} turns=${2:-5}
limit=300
vendor=amd
grep -q GenuineIntel /proc/cpuinfo && vendor=intel
guest_config /tmp/vm.toml 256M
guest_config /tmp/work.toml 256M "$rounds"

# While KVM is there, on a CPU that cannot be shared.
refused() { # NAME
	axvmm --config /tmp/vm.toml >/tmp/kvm.out 2>&1 </dev/null
	status=$?
	if [ $status -ne 64 ]; then
		not_ok "$1" "status $status instead of 64"
		show /tmp/kvm.out
	elif ! grep -q KVM /tmp/kvm.out; then
		not_ok "$1" "the message does not name KVM"
		show /tmp/kvm.out
	else
		ok "$1"
	fi
}

# A guest of KVM for itself.
peer_works() { # NAME
	if axvcpu-peer 200 >/tmp/peer.out 2>&1; then
		ok "$1 ($(cat /tmp/peer.out))"
	else
		not_ok "$1" "$(cat /tmp/peer.out)"
	fi
}

# peer_start CPU ROUNDS [PID]: one on that CPU, for that many rounds, and for as long as
# that process lives.
peer_start() {
	taskset $((1 << $1)) axvcpu-peer "$2" ${3:+"$3"} >"/tmp/peer$1.out" 2>&1 &
	echo $! >"/tmp/peer$1.pid"
}
peer_judge() { # NAME CPU
	if wait "$(cat "/tmp/peer$2.pid")"; then
		ok "$1 ($(cat "/tmp/peer$2.out"))"
	else
		not_ok "$1" "$(cat "/tmp/peer$2.out")"
	fi
}

# work_start: a guest of ours that works, in the background, as $vmm.
work_start() {
	axvmm --config /tmp/work.toml >/tmp/work.out 2>&1 </dev/null &
	vmm=$!
}
work_judge() { # NAME
	guest_judge "$1" $vmm $((limit * 4)) /tmp/work.out || return
	if worked /tmp/work.out "$rounds"; then
		ok "$1: all it computed is right"
	else
		not_ok "$1: all it computed is right" "its work differs from the host's"
		show /tmp/work.out
	fi
}
# While the guest of ours boots, until it works.
work_await() {
	while kill -0 $vmm 2>/dev/null && ! grep -q '^work ' /tmp/work.out; do
		usleep 50000
	done
}

# The CPUs that programs get: FIRST-LAST, or one.
cpus=$(sed -n 's/^Cpus_allowed_list:[^0-9]*//p' /proc/self/status)
first=${cpus%%-*} last=${cpus##*-}

peer_works "KVM works beside the module"
if [ $vendor = intel ]; then
	guest_run "KVM loaded: a guest of ours runs" /tmp/vm.toml $limit
	# On all CPUs, each with a guest of KVM besides.
	work_start
	for cpu in $(seq "$first" "$last"); do peer_start "$cpu" 50 $vmm; done
	work_judge "guests of both at once, ours"
	for cpu in $(seq "$first" "$last"); do peer_judge "guests of both at once, KVM's on CPU $cpu" "$cpu"; done
else
	refused "KVM loaded: axvmm says so"
	peer_start "$first" 2000
	refused "KVM runs a guest: axvmm says so"
	peer_judge "KVM's guest does not notice" "$first"
fi

# Somebody using KVM keeps it from going away.
exec 3</dev/kvm
if rmmod kvm_$vendor 2>/dev/null; then
	not_ok "KVM busy: it cannot be removed" "rmmod worked"
else
	ok "KVM busy: it cannot be removed"
fi
[ $vendor = intel ] || refused "KVM busy: axvmm says so"
exec 3<&-

if rmmod kvm_$vendor; then
	ok "KVM unloads beside the module"
else
	not_ok "KVM unloads beside the module" "rmmod failed"
fi
guest_run "works after KVM is gone" /tmp/vm.toml $limit

# And the other way round: while a guest of ours works, KVM comes and goes. Where the
# CPU can be shared, it works as well while it is there.
work_start
work_await
came=0 refusals=0
for _ in $(seq "$turns"); do
	kill -0 $vmm 2>/dev/null || break
	if modprobe kvm-$vendor 2>/tmp/modprobe.out; then
		came=$((came + 1))
		if [ $vendor = intel ]; then
			axvcpu-peer 20 >/tmp/peer.out 2>&1 || {
				not_ok "KVM works while a guest of ours does" "$(cat /tmp/peer.out)"
				break
			}
		fi
		rmmod kvm_$vendor
	else
		refusals=$((refusals + 1))
	fi
	usleep 100000
done
if [ $vendor = intel ]; then
	if [ $came -ge 2 ] && [ $refusals -eq 0 ]; then
		ok "KVM loads, works and unloads $came times while a guest of ours works"
	else
		not_ok "KVM loads, works and unloads while a guest of ours works" \
			"$came times, refused $refusals times: $(cat /tmp/modprobe.out)"
	fi
	work_judge "that guest"
else
	# Either held the CPU when the other wanted it, and nobody was hurt.
	ok "KVM loads ($came times) or is told that the CPU is in use ($refusals times)"
	wait_limited $vmm $limit
	status=$?
	case $status in
	0 | 64) ok "that guest ends in an orderly way (status $status)" ;;
	*)
		not_ok "that guest ends in an orderly way" "status $status"
		show /tmp/work.out
		;;
	esac
fi

guest_run "works once more" /tmp/vm.toml $limit
if modprobe kvm-$vendor; then
	peer_works "and so does KVM"
	rmmod kvm_$vendor
else
	not_ok "and so does KVM" "it does not load"
fi

plan
