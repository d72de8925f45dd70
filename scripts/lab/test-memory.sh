# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# Guest memory on a host that swaps, groups processes, keeps huge pages in reserve
# and merges equal ones: the cases of axvcpu-guests that skip elsewhere, and their
# neighbours; or the cases whose names match PATTERN.
#
# test-memory.sh [PATTERN...]

modprobe zram || exit
echo 96M >/sys/block/zram0/disksize
mkswap /dev/zram0 >/dev/null
swapon /dev/zram0 || exit
mkdir -p /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup || exit
echo +memory >/sys/fs/cgroup/cgroup.subtree_control || exit
echo 4 >/proc/sys/vm/nr_hugepages

[ $# -gt 0 ] || set -- host-memory/ dirty-log/ spaces/ memory/
axvcpu-guests "$@"
status=$?
swapoff /dev/zram0
exit $status
