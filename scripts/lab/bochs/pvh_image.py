#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""The two images that start the lab host in Bochs; see pvh-rom.S.

pvh_image.py rom CODE OUT                         pads and checksums the option ROM
pvh_image.py ram VMLINUX INITRD CMDLINE SIZE OUT  what lies in memory at its start

The second prints nothing and fails if it does not fit into SIZE MiB.
"""
import struct
import sys
from pathlib import Path

BLOCK = 0x800000  # address of the boot block, as in pvh-rom.S
BLOCK_INFO, BLOCK_MODULE, BLOCK_CMDLINE, BLOCK_SIZE = 0x40, 0x80, 0x100, 0x1000
START_MAGIC = 0x336EC578  # XEN_HVM_START_MAGIC_VALUE
PT_LOAD, PT_NOTE = 1, 4
XEN_ELFNOTE_PHYS32_ENTRY = 18
PAGE = 0x1000


def align(value, to):
    return -(-value // to) * to


def rom(code, out):
    """An option ROM's bytes add up to 0; its third byte is its length in 512 bytes."""
    data = bytearray(Path(code).read_bytes())
    size = data[2] * 512
    if len(data) >= size:
        sys.exit(f"the ROM has {len(data)} bytes, of at most {size - 1}")
    data += bytes(size - len(data))
    data[-1] = -sum(data) % 256
    Path(out).write_bytes(data)


def program_headers(elf):
    """Type, file offset, physical address, size in the file and in memory of each (ELF64)."""
    if elf[:6] != b"\x7fELF\x02\x01":
        sys.exit("the kernel is not a 64-bit ELF file")
    start, = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    for at in range(start, start + size * count, size):
        kind, _, offset, _, physical, length, memory = struct.unpack_from("<IIQQQQQ", elf, at)
        yield kind, offset, physical, length, memory


def pvh_entry(elf):
    """The physical address of the PVH entry, from the kernel's notes."""
    for kind, offset, _, length, _ in program_headers(elf):
        at = offset
        while kind == PT_NOTE and at < offset + length:
            name_size, size, what = struct.unpack_from("<III", elf, at)
            name = elf[at + 12 : at + 12 + name_size]
            at += 12 + align(name_size, 4)
            if name == b"Xen\0" and what == XEN_ELFNOTE_PHYS32_ENTRY:
                return struct.unpack_from("<I", elf, at)[0]
            at += align(size, 4)
    sys.exit("the kernel has no PVH entry")


def ram(vmlinux, initrd, cmdline, mib, out):
    """Boot block, kernel segments, initramfs: one file, to be loaded at BLOCK."""
    elf = Path(vmlinux).read_bytes()
    initrd = Path(initrd).read_bytes()
    loads = [header[1:] for header in program_headers(elf) if header[0] == PT_LOAD]
    module = align(max(physical + memory for _, physical, _, memory in loads), PAGE)
    end = module + align(len(initrd), PAGE)
    # The last block of RAM is the BIOS's own.
    if end > (int(mib) << 20) - BLOCK:
        sys.exit(f"kernel and initramfs reach up to {end >> 20} MiB: give the host more than {mib} MiB")
    line = cmdline.encode() + b"\0"
    if BLOCK_CMDLINE + len(line) > BLOCK_SIZE:
        sys.exit("the command line is too long")

    block = bytearray(BLOCK_SIZE)
    struct.pack_into("<II", block, 0, pvh_entry(elf), end)
    # struct hvm_start_info, version 1. Memory map and its length: the ROM's. RSDP:
    # the kernel finds it in the BIOS.
    struct.pack_into("<IIIIQQQQII", block, BLOCK_INFO, START_MAGIC, 1, 0, 1,
                     BLOCK + BLOCK_MODULE, BLOCK + BLOCK_CMDLINE, 0, 0, 0, 0)
    # struct hvm_modlist_entry
    struct.pack_into("<QQQQ", block, BLOCK_MODULE, module, len(initrd), 0, 0)
    block[BLOCK_CMDLINE : BLOCK_CMDLINE + len(line)] = line

    with open(out, "wb") as image:
        image.write(block)
        for offset, physical, size, _ in loads:
            if physical < BLOCK + BLOCK_SIZE:
                sys.exit(f"the kernel wants to be loaded at {physical:#x}")
            image.seek(physical - BLOCK)
            image.write(elf[offset : offset + size])
        image.seek(module - BLOCK)
        image.write(initrd)
        image.truncate(end - BLOCK)


if __name__ == "__main__":
    {"rom": rom, "ram": ram}[sys.argv[1]](*sys.argv[2:])
