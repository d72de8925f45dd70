# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# The initramfs images of lab host and guest: BusyBox, an init script of ours,
# and for the host a few stock modules (axv_host_modules), the guest's files and our
# programs.
#
# An image is a cpio archive; several one behind the other are one image to the
# kernel. So the parts that change (module, programs, session) are kept apart
# from those that do not.

busybox() { "$axv_root/usr/bin/busybox" "$@"; }

# image_pack DIRECTORY FILE: an archive owned by root, not compressed (unpacking
# costs more under emulation than reading).
image_pack() {
	(cd "$1" && find . | LC_ALL=C sort | busybox cpio -o -H newc -R 0:0 2>/dev/null) >"$2.tmp"
	mv "$2.tmp" "$2"
}

# image_base RELEASE: the unchanging parts for that kernel, in its directory:
# guest.img, and host.img with the guest inside, which always has the main kernel.
image_base() {
	step "image-$1" "$(cat "$axv_top"/scripts/lab/*.sh "$axv_top"/scripts/lab/*-init "$axv_top"/scripts/lab/*.toml |
		key_of "$1" "$axv_kernel" "${axv_host_modules[*]}" "$(code_of image_make image_pack)")" \
		"Images for $1" image_make "$1"
}

image_make() {
	local release=$1 dir tree
	dir=$(kernel_dir "$release")
	tree=$dir/tree.tmp
	rm -rf "$tree"

	mkdir -p "$tree/guest/bin"
	cp "$axv_busybox" "$tree/guest/bin/"
	install -m 755 "$axv_top/scripts/lab/guest-init" "$tree/guest/init"
	mkdir "$tree/guest/lab"
	cp "$axv_top/scripts/lab/work.sh" "$tree/guest/lab/"
	image_pack "$tree/guest" "$dir/guest.img"

	mkdir -p "$tree/host/bin" "$tree/host/lab/guest" "$tree/host/etc"
	cp "$axv_busybox" "$tree/host/bin/"
	install -m 755 "$axv_top/scripts/lab/host-init" "$tree/host/init"
	printf 'root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n' >"$tree/host/etc/passwd"
	printf 'root:x:0:\nuser:x:1000:\n' >"$tree/host/etc/group"
	mkdir -p "$tree/host/lab/tests"
	cp "$axv_top"/scripts/lab/*.toml "$tree/host/lab/"
	cp "$axv_top"/scripts/lab/*.sh "$tree/host/lab/tests/"
	cp "$(kernel_dir "$axv_kernel")/vmlinuz" "$dir/guest.img" "$tree/host/lab/guest/"
	mv "$tree/host/lab/guest/guest.img" "$tree/host/lab/guest/initrd.img"
	image_modules "$release" "$tree/host"
	image_pack "$tree/host" "$dir/host.img"
	rm -rf "$tree"
}

# The stock modules named above and all they depend on, decompressed.
image_modules() {
	local release=$1 to=$2/lib/modules/$1 from file module
	from=$(kernel_dir "$release")
	for module in "${axv_host_modules[@]}"; do
		in_root modprobe --dirname "$from" --set-version "$release" \
			--show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p'
	done | sort -u | while read -r file; do
		file=${file#"$from/lib/modules/$release/"}
		mkdir -p "$to/$(dirname "$file")"
		busybox xz -dc "$from/lib/modules/$release/$file" >"$to/${file%.xz}"
	done
	in_root depmod --basedir "$2" "$release"
}
