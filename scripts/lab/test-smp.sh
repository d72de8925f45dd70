# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# On the lab host: a stock Linux guest with several CPUs. The arguments are
# numbers of CPUs, a boot each; guest-smp.sh is what the guest does. SMP_MIB is how
# much each of its workers compresses (many CPUs get half of it: they are in each
# other's way enough), SMP_LIMIT how many seconds a boot may take.

# shellcheck source=tap.sh
. /lab/tests/tap.sh

limit=$((${SMP_LIMIT:-300} * AXVCPU_PATIENCE))
all_mib=${SMP_MIB:-4}

# The guest's initramfs with the test added: archives add up.
mkdir -p /tmp/add/lab
cp /lab/tests/tap.sh /lab/tests/guest-smp.sh /lab/bin/axvcpu-load /tmp/add/lab/
(cd /tmp/add && find . | cpio -o -H newc 2>/dev/null) | cat /lab/guest/initrd.img - >/tmp/smp.img

# When the host's time of day began to run, by its own clock since boot, in hundredths of a
# second: by its whole seconds, as the guest tells its own, and by the quickest of several
# looks, as each takes its time on a busy machine.
quickest=''
for _ in 1 2 3 4 5 6 7 8 9 10; do
	begin=$(now)
	seconds=$(date +%s)
	took=$(($(now) - begin))
	if [ -z "$quickest" ] || [ $took -lt "$quickest" ]; then
		quickest=$took
		host_epoch=$((seconds * 100 - (begin + took / 2) / 10))
	fi
done

# smp_config FILE CPUS
smp_config() {
	sed -e "s/^cmdline = \"/&lab=smp smp.cpus=$2 smp.mib=$mib /" -e "s/^cpu_num = .*/cpu_num = $2/" \
		-e 's|^ramdisk_path = .*|ramdisk_path = "/tmp/smp.img"|' \
		-e "s/^\[base\]/&\nhypervisor = \"$hypervisor\"/" \
		-e "s/^memory = .*/memory = \"$((192 + mib * 16 + $2 * 8))M\"/" /lab/vm.toml >"$1"
}

# within NAME DIFFERENCE LIMIT
within() {
	if [ "$2" -ge "-$3" ] && [ "$2" -le "$3" ]; then
		ok "$1 ($2)"
	else
		not_ok "$1" "$2, more than $3"
	fi
}

# smp_tick CLOCK VALUE: one of the guest's clocks against ours, now. Whatever delays
# the line makes ours later, so the smallest differences are the right ones; and no
# process is started here.
smp_tick() {
	IFS='. ' read -r seconds hundredths _ </proc/uptime
	ours=$((seconds * 100 + ${hundredths#0}))
	case $1 in
	uptime)
		set -- $((ours - $2))
		[ -n "$uptime_off" ] && [ "$uptime_off" -le "$1" ] || uptime_off=$1
		;;
	date)
		set -- $((host_epoch + ours - $2 * 100))
		[ -n "$date_off" ] && [ "$date_off" -le "$1" ] || date_off=$1
		;;
	hwclock)
		set -- $((host_epoch + ours - $2 * 100))
		[ -n "$clock_off" ] && [ "$clock_off" -le "$1" ] || clock_off=$1
		;;
	esac
}

# smp_ticked NAME: the last tick of a series has come.
smp_ticked() {
	if [ -z "$first_off" ]; then
		first=$(now) first_off=$uptime_off
	else
		within "$1: drift in $((($(now) - first) / 1000)) s, in hundredths of a second" \
			$((first_off - uptime_off)) 100
	fi
	within "$1: date, in hundredths of a second behind the host's" "$date_off" 200
	within "$1: hwclock, in hundredths of a second behind the host's" "$clock_off" 200
	uptime_off='' date_off='' clock_off=''
}

# smp_clock TIMES: how often the guest called its clock unstable. It never has to where
# the host still trusts its own.
smp_clock() {
	on=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
	case $1/$on in
	0/* | */hpet | */acpi_pm) ok "$name: clock as stable as the host's ($on)" ;;
	*) not_ok "$name: clock as stable as the host's" "the guest calls its own unstable" ;;
	esac
}

# smp_run CPUS: one boot. The guest's results become ours.
smp_run() {
	name="$1 CPUs" seen=0 planned=none mib=$all_mib
	first_off='' uptime_off='' date_off='' clock_off=''
	[ "$1" -le 4 ] || mib=$(((all_mib + 1) / 2))
	smp_config /tmp/smp.toml "$1"
	rm -f /tmp/smp.pipe
	mkfifo /tmp/smp.pipe
	begin=$(now)
	axvmm --stats --config /tmp/smp.toml </dev/null >/tmp/smp.pipe 2>/tmp/smp.stats &
	vmm=$!
	(
		sleep "$limit"
		kill -9 $vmm
	) &
	killer=$!
	# shellcheck disable=SC2086 # a tick's words
	while read -r line; do
		line=${line%"$(printf '\r')"}
		case $line in
		'ok - '* | 'not ok - '* | 'skip - '*)
			tap_count=$((tap_count + 1)) seen=$((seen + 1))
			echo "${line%% - *} - $name: ${line#* - }"
			;;
		1..*) planned=${line#1..} ;;
		'tick '*) smp_tick ${line#tick } ;;
		ticked) smp_ticked "$name" ;;
		'clock '*) smp_clock "${line#clock }" ;;
		*) echo "  | $line" ;;
		esac
	done </tmp/smp.pipe
	wait $vmm
	status=$?
	kill $killer 2>/dev/null
	if [ $status -ne 0 ]; then
		not_ok "$name: power-off" "axvmm ended with status $status"
		show /tmp/smp.stats
	elif [ "$planned" != $seen ]; then
		not_ok "$name: complete" "$planned results announced, $seen seen"
	else
		ok "$name: boots, works and powers off"
	fi
	echo "  | $name, start to power-off: $(($(now) - begin)) ms"
	grep -E '^vCPU|time:' /tmp/smp.stats | sed 's/^/  | /'
}

for cpus; do smp_run "$cpus"; done
plan
