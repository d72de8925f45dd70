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

# wait_all PID... waits for each; status of the last.
wait_limited() { # PID SECONDS: waits, kills it when the time is over
	waited=0
	while kill -0 "$1" 2>/dev/null; do
		if [ "$waited" -ge $(($2 * 10)) ]; then
			kill -9 "$1"
			wait "$1" 2>/dev/null
			return 124
		fi
		usleep 100000
		waited=$((waited + 1))
	done
	wait "$1"
}
