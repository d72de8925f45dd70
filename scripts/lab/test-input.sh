# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# On the lab host: everything a user can get wrong gets its own exit code
# (axvmm(1)) and a message that names the thing.

# shellcheck source=tap.sh
. /lab/tests/tap.sh

cd /tmp || exit

# refuses NAME STATUS PATTERN ARGUMENT...: axvmm ends with STATUS, and says PATTERN
# (an extended regular expression).
refuses() {
	name=$1 want=$2 pattern=$3
	shift 3
	axvmm "$@" >out 2>&1 </dev/null &
	wait_limited $! 20
	status=$?
	if [ $status -ne "$want" ]; then
		not_ok "$name" "status $status instead of $want"
		show out
	elif ! grep -qiE -e "$pattern" out; then
		not_ok "$name" "the message lacks '$pattern'"
		show out
	elif grep -qiE 'panicked|backtrace' out; then
		not_ok "$name" "axvmm panicked"
		show out
	else
		ok "$name"
	fi
}

# config NAME SED-SCRIPT...: the lab's guest, edited, into NAME.toml.
config() {
	guest_config "$1.toml" 256M
	file=$1.toml
	shift
	for edit; do sed -i "$edit" "$file"; done
}

refuses "no arguments" 2 'config'
refuses "unknown option" 2 'frobnicate' --frobnicate
refuses "no such configuration" 20 'missing\.toml' --config missing.toml
refuses "a folder as configuration" 20 'director|folder' --config /tmp
head -c 4096 /lab/guest/vmlinuz >binary.toml
refuses "a binary as configuration" 20 'UTF-8' --config binary.toml

config syntax '/^kernel_path/s/=/=/;/^kernel_path/s/"$//'
refuses "not TOML" 22 'syntax\.toml:[0-9]+:[0-9]+' --config syntax.toml
config unknown 's/^memory = /memroy = /'
refuses "unknown key, with its place" 24 'unknown\.toml:[0-9]+:1.*memroy' --config unknown.toml
config type 's/^cpu_num = .*/cpu_num = "one"/'
refuses "wrong type, with its place" 26 'type\.toml:[0-9]+:[0-9]+' --config type.toml
config lacking '/^kernel_path/d'
refuses "a key is missing" 26 'kernel_path' --config lacking.toml
config value 's/^memory = .*/memory = 12345678901/'
refuses "a value without sense" 28 'value\.toml:[0-9]+' --config value.toml
config small 's/^memory = .*/memory = "4K"/'
refuses "memory too small" 30 'small' --config small.toml
config overlap 's/^memory = .*/memory_regions = [{ base = 0, size = "128M" }, { base = "64M", size = "128M" }]/'
refuses "memory overlaps" 32 'overlaps' --config overlap.toml
config cpus 's/^cpu_num = .*/cpu_num = 65/'
refuses "more CPUs than it can do" 34 '64 CPUs' --config cpus.toml
config absent 's/^cpu_num = .*/cpu_num = 2\nphys_cpu_sets = [0x1, 0x8001]/'
refuses "a host CPU that is not there" 34 'vCPU 1 .*CPU 15:.*has the CPUs 0' --config absent.toml
printf '\372\364' >dead
config dead 's/^cpu_num = .*/cpu_num = 3/' 's/^ramdisk_path.*/entry_point = 0x8000/' 's/^cmdline.*//' \
	's|^kernel_path = .*|kernel_path = "/tmp/dead"|'
refuses "a guest that halts with its other CPUs never started" 12 'nothing can wake' --config dead.toml

config nokernel 's|^kernel_path = .*|kernel_path = "/nowhere/vmlinuz"|'
refuses "the kernel is missing" 40 '/nowhere/vmlinuz' --config nokernel.toml
printf '\211PNG\r\n\032\n\0\0\0\rIHDR' >picture.png
dd if=/dev/urandom bs=1024 count=64 >>picture.png 2>/dev/null
config png 's|^kernel_path = .*|kernel_path = "/tmp/picture.png"|'
refuses "a picture as kernel" 42 'PNG' --config png.toml
head -c 100000 /lab/guest/vmlinuz >half
config truncated 's|^kernel_path = .*|kernel_path = "/tmp/half"|'
refuses "half a kernel" 44 'half' --config truncated.toml
config noinitrd 's|^ramdisk_path = .*|ramdisk_path = "/nowhere/initrd"|'
refuses "the initial RAM disk is missing" 46 '/nowhere/initrd' --config noinitrd.toml
dd if=/dev/zero of=big bs=1 count=0 seek=400M 2>/dev/null
config bigrd 's|^ramdisk_path = .*|ramdisk_path = "/tmp/big"|'
refuses "the initial RAM disk is too large" 48 'fit|large' --config bigrd.toml
awk 'BEGIN { for (i = 0; i < 4000; i++) printf "x" }' >long
config cmdline "s/^cmdline = \"/&$(cat long) /"
refuses "the command line is too long for this kernel" 50 'command line' --config cmdline.toml

config good
axvmm check --config good.toml >out 2>&1
status=$?
if [ $status -eq 0 ]; then
	ok "check finds nothing wrong with a good configuration"
else
	not_ok "check finds nothing wrong with a good configuration" "status $status"
	show out
fi

# The device: not for everybody, not there, and not what it seems.
chmod 755 /tmp && chmod 644 good.toml
su user -c 'axvmm --config /tmp/good.toml' >out 2>&1 </dev/null
status=$?
if [ $status -eq 62 ] && grep -q udev out; then
	ok "no permission"
else
	not_ok "no permission" "status $status"
	show out
fi
refuses "no /dev/kvm" 60 '/dev/kvm.*not loaded' --hypervisor kvm --config good.toml
refuses "a /dev/kvm that is something else" 70 'not KVM' --hypervisor kvm --device /dev/null --config good.toml
mknod /tmp/kvm c 10 232
chmod 600 /tmp/kvm
su user -c 'axvmm --hypervisor kvm --device /tmp/kvm --config /tmp/good.toml' >out 2>&1 </dev/null
status=$?
if [ $status -eq 62 ] && grep -q usermod out; then
	ok "no permission for KVM"
else
	not_ok "no permission for KVM" "status $status"
	show out
fi
axvmm doctor --hypervisor kvm >out 2>&1
status=$?
if [ $status -eq 60 ] && grep -q 'modprobe kvm' out; then
	ok "the doctor says how to load KVM"
else
	not_ok "the doctor says how to load KVM" "status $status"
	show out
fi
rmmod axvcpu
refuses "no /dev/axvcpu" 60 '/dev/axvcpu' --config good.toml
mknod /dev/axvcpu c 1 3
refuses "a /dev/axvcpu that is something else" 70 '/dev/axvcpu' --config good.toml
rm /dev/axvcpu
insmod /lab/tests/axvcpu_other_abi.ko
refuses "a module of another ABI version" 70 'version' --config good.toml
rmmod axvcpu_other_abi
insmod /lab/axvcpu.ko
refuses "and now all is well" 0 'Linux guest' --config good.toml

plan
