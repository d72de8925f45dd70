# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# On the debug kernel: every allocation of every call fails once; see
# tests/src/guests/allocation.rs, which says of each how it is to fail. Here any kind is
# let fail, also one that could wait for memory, and without a word in the kernel's log.

for kind in failslab fail_page_alloc; do
	dir=/sys/kernel/debug/$kind
	echo N >$dir/ignore-gfp-wait && echo 0 >$dir/verbose || exit
done
echo 0 >/sys/kernel/debug/fail_page_alloc/min-order || exit
echo N >/sys/kernel/debug/fail_page_alloc/ignore-gfp-highmem || exit
exec axvcpu-guests allocation/
