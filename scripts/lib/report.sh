# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# Test results: one line each, counted at the end. They are kept in a file,
# since the parts run in subshells.

report_file=

report_begin() {
	report_file=$(mktemp)
	trap report_end EXIT
}

# pass NAME / fail NAME WHY / skip NAME WHY
pass() { report_line "ok $1"; }
fail() { report_line "not ok $1: $2"; }
skip() { report_line "skip $1: $2"; }

report_line() { printf '%s\n' "$1" | tee -a "$report_file"; }

report_count() { grep -c "^$1 " "$report_file" || true; }

# Ends the script, also when a set-up step died: that is a failure as well.
report_end() {
	local status=$? failed
	((status == 0)) || fail "set-up" "ended with status $status"
	failed=$(report_count 'not ok')
	printf '%d passed, %d failed, %d skipped\n' \
		"$(report_count ok)" "$failed" "$(report_count skip)"
	rm -f "$report_file"
	trap - EXIT
	exit $((failed != 0))
}

# check NAME LOG COMMAND... passes if the command does; its output goes to LOG,
# the end of which is shown on failure.
check() {
	local name=$1 log=$axv_logs/$2.log begin=$SECONDS
	shift 2
	logged "$log" "$@"
	if ((logged_status == 0)); then
		pass "$name ($((SECONDS - begin)) s)"
	else
		tail -n 25 "$log" | sed 's/^/    /'
		fail "$name" "status $logged_status, see $log"
	fi
}

# lab_tap PART SESSION: boots the lab host with SESSION, which prints lines
# `ok - NAME`, `not ok - NAME: WHY`, `skip - NAME: WHY` and at the end `1..N`,
# and reports them; then whether the host stayed clean and the module unloaded.
#
# lab_prefix goes before each name.
lab_prefix=''
lab_tap() {
	local part=$lab_prefix$1 line results=0 plan='' failed=
	local out=$axv_logs/${part// /-}.out
	host_check=yes
	host_boot "$2" >"$out"
	while IFS= read -r line; do
		line=${line%$'\r'}
		case $line in
		'ok - '*) pass "$part: ${line#ok - }" ;;
		'not ok - '*)
			report_line "not ok $part: ${line#not ok - }"
			failed=yes
			;;
		'skip - '*) report_line "skip $part: ${line#skip - }" ;;
		1..*)
			plan=${line#1..}
			continue
			;;
		*)
			printf '    %s\n' "$line"
			continue
			;;
		esac
		results=$((results + 1))
	done <"$out"
	if [[ $plan != "$results" ]]; then
		fail "$part: complete" "${plan:-no number of} results announced, $results seen (status ${host_status:-none}), see $out"
	fi
	if [[ -z $failed && ${host_status:-0} != 0 ]]; then
		fail "$part: complete" "nothing failed, but it ended with status $host_status, see $out"
	fi
	if [[ -z $host_trouble ]]; then
		pass "$part: host clean, module unloaded"
	else
		fail "$part: host clean, module unloaded" "$host_trouble, see $host_log"
	fi
}
