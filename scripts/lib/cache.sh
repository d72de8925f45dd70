# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# The cache directory: stamped steps, their logs, and the lock around them.
#
# A step is a function that builds something. Its stamp is written last and
# holds a hash of what the step depends on, so an interrupted or outdated step
# simply runs again. A step builds beside its target and renames at the end.

axv_stamps=$axv_cache/stamps

# One set-up at a time per cache. The lock is file descriptor 9, closed for
# whatever outlives the set-up (see cache_unlock).
cache_lock() {
	mkdir -p "$axv_cache" "$axv_stamps" "$axv_logs"
	exec 9>"$axv_cache/lock"
	if ! flock --nonblock 9; then
		say "Another axvcpu set-up is at work in $axv_cache; waiting for it."
		flock 9
	fi
}

cache_unlock() { exec 9>&-; }

# Hash of the arguments, and of what comes on standard input.
key_of() { { printf '%s\n' "$@" && cat; } | sha256sum | cut -c1-32; }

# Hash of the functions named: a step whose code changes is run again.
code_of() { declare -f "$@" | sha256sum | cut -c1-32; }

step_done() {
	[[ -f $axv_stamps/$1 && $(<"$axv_stamps/$1") == "$2" ]]
}

# step NAME KEY TITLE COMMAND... runs COMMAND unless NAME was done with KEY.
step() {
	local name=$1 key=$2 title=$3
	shift 3
	step_done "$name" "$key" && return
	rm -f "$axv_stamps/$name"
	timed "$name" "$title" "$@"
	printf '%s\n' "$key" >"$axv_stamps/$name.tmp"
	mv "$axv_stamps/$name.tmp" "$axv_stamps/$name"
}

# timed NAME TITLE COMMAND... runs COMMAND, prints its time, keeps its output in
# a log. As logged, it is for no condition.
timed() {
	local name=$1 title=$2 log=$axv_logs/$1.log begin=$SECONDS
	shift 2
	printf '%-46s' "$title" >&2
	logged "$log" "$@"
	if ((logged_status != 0)); then
		printf ' FAILED after %d s\n' $((SECONDS - begin)) >&2
		tail -n 25 "$log" | sed 's/^/    /' >&2
		die "'$title' failed (status $logged_status); the whole log is $log"
	fi
	printf ' %3d s   %s\n' $((SECONDS - begin)) "$log" >&2
}
