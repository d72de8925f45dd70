# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# Paths and messages that every script shares. Sourced first; needs nothing.

axv_top=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
axv_cache=${XDG_CACHE_HOME:-$HOME/.cache}/axvcpu
axv_root=$axv_cache/root
axv_work=$axv_cache/work
axv_logs=$axv_cache/logs

# Messages go to stderr: stdout belongs to what runs in the lab.
say() { printf '%s\n' "$*" >&2; }

die() {
	printf '%s: %s\n' "${0##*/}" "$*" >&2
	exit 1
}

# A wrong command line: one sentence, a pointer to --help, status 2.
usage_error() {
	printf '%s: %s\nTry %s --help.\n' "${0##*/}" "$*" "$0" >&2
	exit 2
}

# Runs a command with the rights to install packages and to make mounts.
as_root() {
	if ((EUID == 0)); then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo -- "$@"
	else
		die "root is needed for: $1 ... (run as root, or install sudo)"
	fi
}

# need_value OPTION COUNT: the option at hand has a value behind it.
need_value() {
	(($2 >= 2)) || usage_error "$1 needs a value"
}

# need_number OPTION VALUE LOW HIGH
need_number() {
	[[ $2 =~ ^[0-9]{1,9}$ ]] || usage_error "$1 wants a whole number, not '$2'"
	((10#$2 >= $3 && 10#$2 <= $4)) || usage_error "$1 must be between $3 and $4, not $2"
}

# logged LOG COMMAND...: runs it with all that it says in a file, and sets logged_status. Never
# call it from a condition: bash would then ignore errexit inside.
logged() {
	local log=$1
	shift
	set +e
	(
		set -e
		"$@"
	) >"$log" 2>&1 </dev/null
	logged_status=$?
	set -e
}
