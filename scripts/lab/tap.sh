# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# For the shell tests that run on the lab host: results as scripts/test reads
# them (lib/report.sh), and the guest's configuration in variations.

tap_count=0
ok() {
	tap_count=$((tap_count + 1))
	echo "ok - $1"
}
not_ok() {
	tap_count=$((tap_count + 1))
	echo "not ok - $1: $2"
}
skip() {
	tap_count=$((tap_count + 1))
	echo "skip - $1: $2"
}
plan() { echo "1..$tap_count"; }

# Shows a file's end, indented, behind a failure.
show() { tail -n "${2:-15}" "$1" | sed 's/^/  | /'; }

# Milliseconds since boot.
now() { awk '{ printf "%d\n", $1 * 1000 }' /proc/uptime; }

# What the host leaves out of its boot for the emulator's sake (scripts/lib/bochs.sh).
left_out=$(tr ' ' '\n' </proc/cmdline | grep -E '^(cryptomgr.notests|initcall_blacklist)=' | tr '\n' ' ')
# What carries the guests: axvcpu or kvm.
hypervisor=${HYPERVISOR:-axvcpu}

# guest_config FILE MEMORY [ROUNDS]: the lab's guest with that much memory, which works
# for that many rounds, reports and powers off.
guest_config() {
	sed -e "s/^cmdline = \"/&lab=${3:+work:}${3:-report} $left_out/" \
		-e "s/^memory = .*/memory = \"$2\"/" \
		-e "s/^\[base\]/&\nhypervisor = \"$hypervisor\"/" /lab/vm.toml >"$1"
}

# worked OUTPUT ROUNDS: whether the guest with that output got all its work right.
worked() {
	sh /lab/tests/work.sh "$2" >/tmp/work.expected
	tr -d '\r' <"$1" | grep '^work ' | cmp -s - /tmp/work.expected
}

# Whether the guest's output in a file is that of a whole run.
reported() {
	grep -q '^Linux guest ' "$1" && grep -qE 'model name|CPU part' "$1" && grep -q '^Mem:' "$1"
}

# wait_limited PID SECONDS: its status, or 124 after killing it. (On a slow host the
# seconds are longer.)
wait_limited() {
	waited=0
	while kill -0 "$1" 2>/dev/null; do
		if [ "$waited" -ge $(($2 * 10 * AXVCPU_PATIENCE)) ]; then
			kill -9 "$1"
			wait "$1" 2>/dev/null
			return 124
		fi
		usleep 100000
		waited=$((waited + 1))
	done
	wait "$1"
}

# vcpu_runs PID: waits, for ten seconds at most, until an axvmm has loaded everything and
# its first vCPU has begun to run on a thread of its own.
vcpu_runs() {
	waited=0
	until grep -qs vcpu0 /proc/"$1"/task/*/comm || [ $waited -ge 100 ]; do
		usleep 100000
		waited=$((waited + 1))
	done
	usleep 300000
}

# guest_run NAME CONFIG SECONDS: one guest from start to power-off, a result.
guest_run() {
	axvmm --config "$2" >/tmp/guest.out 2>&1 </dev/null &
	guest_judge "$1" $! "$3" /tmp/guest.out
}

# guest_judge NAME PID SECONDS OUTPUT: waits for a guest already running.
guest_judge() {
	wait_limited "$2" "$3"
	guest_status=$?
	if [ $guest_status -ne 0 ]; then
		not_ok "$1" "axvmm ended with status $guest_status"
		show "$4"
		return 1
	elif ! reported "$4"; then
		not_ok "$1" "the guest did not print what it should"
		show "$4"
		return 1
	fi
	ok "$1"
}
