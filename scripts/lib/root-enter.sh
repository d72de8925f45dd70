# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# Runs as root in a fresh, private mount namespace (see root.sh): fills in the
# build root's mounts and becomes the command. The namespace dies with it.
#
# root-enter.sh ROOT UID:GID DIRECTORY CHECKOUT CACHE COMMAND...
set -euo pipefail

root=$1 user=$2 directory=$3
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
for path in "$4" "$5"; do
	mkdir -p "$root$path"
	mount --bind "$path" "$root$path"
done
if [[ -e /etc/resolv.conf ]]; then
	touch "$root/etc/resolv.conf"
	mount --bind "$(readlink -f /etc/resolv.conf)" "$root/etc/resolv.conf"
fi
shift 5
# shellcheck disable=SC2016 # expanded by the inner shell
exec chroot --userspec="$user" "$root" \
	/bin/sh -c 'cd "$1" && shift && exec "$@"' sh "$directory" "$@"
