# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# On the lab host, with kvm_amd loaded: who holds the CPU is told plainly, and
# once KVM is gone everything works without loading the module anew.

# shellcheck source=tap.sh
. /lab/tests/tap.sh

guest_config /tmp/vm.toml 256M

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

refused "KVM loaded: axvmm says so"

# Somebody using KVM keeps it from going away.
exec 3</dev/kvm
if rmmod kvm_amd 2>/dev/null; then
	not_ok "KVM busy: it cannot be removed" "rmmod worked"
else
	ok "KVM busy: it cannot be removed"
fi
refused "KVM busy: axvmm says so"
exec 3<&-

if rmmod kvm_amd; then
	ok "KVM unloads beside the module"
else
	not_ok "KVM unloads beside the module" "rmmod failed"
fi
guest_run "works after KVM is gone" /tmp/vm.toml 120

# And the other way round: while a guest of ours runs, KVM can come and go.
axvmm --config /tmp/vm.toml >/tmp/beside.out 2>&1 </dev/null &
vmm=$!
usleep 300000
if modprobe kvm-amd; then
	ok "KVM loads while a guest of ours runs"
	rmmod kvm_amd
else
	not_ok "KVM loads while a guest of ours runs" "modprobe failed"
fi
# The guest either came through between the two, or was told who took the CPU.
wait_limited $vmm 120
status=$?
case $status in
0 | 64) ok "that guest ends in an orderly way (status $status)" ;;
*)
	not_ok "that guest ends in an orderly way" "status $status"
	show /tmp/beside.out
	;;
esac
guest_run "works once more" /tmp/vm.toml 120

plan
