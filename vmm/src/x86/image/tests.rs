// SPDX-License-Identifier: MIT OR Apache-2.0
//! Small kernels of each format, made here; what the loaders leave in memory; and images that are refused.

use std::fs;

use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes as _, GuestAddress};

use super::*;
use crate::config::ModuleConfig;
use crate::exit::ExitCode;
use crate::image::bench::Bench;
use crate::x86::layout::{BOOT_INFO, STACK, ZERO_PAGE};

const RSDP: u64 = 0xe_0000;
const MEMORY: u64 = 64 << 20;

fn with_kernel(kernel: &[u8]) -> Bench {
    Bench::new(kernel, EntryMode::Real, layout::default_regions(MEMORY))
}

impl Bench {
    fn with_ramdisk(mut self, content: &[u8]) -> Self {
        self.config.ramdisk = Some(self.file("ramdisk", content));
        self
    }

    fn with_module(mut self, content: &[u8], cmdline: &str) -> Self {
        let name = format!("module{}", self.config.modules.len());
        let path = self.file(&name, content);
        self.config.modules.push(ModuleConfig { path, cmdline: cmdline.into() });
        self
    }

    fn with_cmdline(mut self, cmdline: &str) -> Self {
        self.config.cmdline = cmdline.into();
        self
    }

    fn with_memory(mut self, size: u64) -> Self {
        self.memory = layout::default_regions(size);
        self
    }
}

/// What is loaded from it here.
trait Load {
    fn load(&self) -> Result<(Guest, Loaded), ImageError>;

    fn refused(&self) -> (ExitCode, String) {
        let error = self.load().map(|(_, loaded)| loaded).unwrap_err();
        (error.exit_code(), error.to_string())
    }
}

impl Load for Bench {
    fn load(&self) -> Result<(Guest, Loaded), ImageError> {
        let ram = Ram::new(&self.memory).unwrap();
        let map = layout::memory_map(&self.memory);
        let loaded = load(&self.config, &ram, &map, GuestPhysAddr::new(RSDP))?;
        Ok((Guest(ram), loaded))
    }
}

struct Guest(Ram);

impl Guest {
    fn object<T: ByteValued>(&self, at: u64) -> T {
        self.0.as_vm_memory().read_obj(GuestAddress(at)).unwrap()
    }
    fn bytes(&self, at: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        self.0.read(GuestPhysAddr::new(at), &mut bytes).unwrap();
        bytes
    }
    fn text(&self, at: u64) -> String {
        let bytes = self.bytes(at, 4096);
        let end = bytes.iter().position(|byte| *byte == 0).unwrap();
        String::from_utf8(bytes[..end].to_vec()).unwrap()
    }
    fn word(&self, at: u64) -> u32 {
        self.object(at)
    }
}

/// A bzImage of protocol 2.15 with one setup sector and this payload.
fn bzimage(payload: &[u8], change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 1,
        syssize: payload.len().div_ceil(16) as u32,
        boot_flag: 0xaa55,
        jump: 0x6ceb,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        loadflags: 1,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 0x20_0000,
        relocatable_kernel: 1,
        xloadflags: 3,
        cmdline_size: 2047,
        pref_address: 0x100_0000,
        init_size: 0x80_0000,
        ..Default::default()
    };
    change(&mut header);
    let mut image = vec![0; 1024];
    image[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
    image.extend_from_slice(payload);
    image
}

#[test]
fn bzimage_gets_what_the_boot_protocol_promises() {
    let payload: Vec<u8> = (0..=255).cycle().take(5000).collect();
    let bench = with_kernel(&bzimage(&payload, |_| ())).with_ramdisk(&[7; 10_000]).with_cmdline("console=ttyS0 x");
    let (guest, loaded) = bench.load().unwrap();
    assert_eq!(loaded.start.mode, EntryMode::Long);
    assert_eq!(loaded.start.entry.as_u64(), 0x100_0200);
    assert_eq!(loaded.start.registers.rsi, ZERO_PAGE);
    assert_eq!(guest.bytes(0x100_0000, payload.len()), payload);

    let params: boot_params = guest.object(ZERO_PAGE);
    let (image, size, line, rsdp) =
        (params.hdr.ramdisk_image, params.hdr.ramdisk_size, params.hdr.cmd_line_ptr, params.acpi_rsdp_addr);
    assert_eq!(u64::from(image), MEMORY - 0x3000, "as high as possible, on a page");
    assert_eq!(size, 10_000);
    assert_eq!(guest.bytes(image.into(), 10_000), [7; 10_000]);
    assert_eq!(guest.text(line.into()), "console=ttyS0 x");
    assert_eq!(rsdp, RSDP);
    assert_eq!(params.hdr.type_of_loader, 0xff);
    assert_eq!((params.sentinel, params.ext_cmd_line_ptr, params.ext_ramdisk_image), (0, 0, 0));
    // The table of the protocol: header at 0x1f1, entries at 0x1e8, the E820 map at 0x2d0.
    assert_eq!(guest.bytes(ZERO_PAGE + 0x202, 4), b"HdrS");
    assert_eq!(guest.bytes(ZERO_PAGE + 0x1e8, 1), [6]);
    let map: Vec<(u64, u64, u32)> = (0..6)
        .map(|i| {
            let at = ZERO_PAGE + 0x2d0 + 20 * i;
            (guest.object(at), guest.object(at + 8), guest.object(at + 16))
        })
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x400, 2),
            (0xe_0000, 0x2_0000, 3),
            (0x10_0000, MEMORY - 0x10_0000, 1),
            (0xfec0_0000, 0x1000, 2),
            (0xfee0_0000, 0x1000, 2),
        ]
    );
}

#[test]
fn bzimage_goes_elsewhere_if_memory_is_short() {
    let small = |change: fn(&mut setup_header)| with_kernel(&bzimage(&[1; 100], change)).with_memory(16 << 20);
    let (guest, loaded) = small(|_| ()).load().unwrap();
    assert_eq!(loaded.start.entry.as_u64(), 0x20_0200);
    assert_eq!(guest.bytes(0x20_0000, 100), [1; 100]);
    let (code, text) = small(|header| header.relocatable_kernel = 0).refused();
    assert_eq!(code, ExitCode::MemoryTooSmall);
    assert!(text.contains("needs 8 MiB at 0x1000000"), "{text}");
    let (code, text) = small(|header| header.init_size = 32 << 20).refused();
    assert_eq!(code, ExitCode::MemoryTooSmall);
    assert!(text.contains("it has 16 MiB"), "{text}");
}

#[test]
fn kernels_without_64_bit_entry_start_in_32_bit_mode() {
    let old = bzimage(&[1; 64], |header| {
        header.version = 0x204;
        header.xloadflags = 0xffff;
        header.pref_address = u64::MAX;
        header.init_size = u32::MAX;
    });
    let (guest, loaded) = with_kernel(&old).load().unwrap();
    assert_eq!((loaded.start.mode, loaded.start.entry.as_u64()), (EntryMode::Protected, 0x10_0000));
    assert_eq!(loaded.start.registers.rsi, ZERO_PAGE);
    assert_eq!(guest.bytes(0x10_0000, 64), [1; 64]);
    let long = "x".repeat(256);
    assert_eq!(with_kernel(&old).with_cmdline(&long).refused().0, ExitCode::CmdlineTooLong);
}

#[test]
fn ramdisk_stays_below_the_kernel_s_limit() {
    let image = bzimage(&[1; 64], |header| {
        header.xloadflags = 1;
        header.initrd_addr_max = 0x2ff_ffff;
    });
    let (guest, _) = with_kernel(&image).with_ramdisk(&[9; 4096]).load().unwrap();
    let params: boot_params = guest.object(ZERO_PAGE);
    assert_eq!({ params.hdr.ramdisk_image }, 0x2ff_f000);
}

#[test]
fn damaged_bzimages() {
    let cut = bzimage(&[1; 5000], |_| ())[..3000].to_vec();
    let (code, text) = with_kernel(&cut).refused();
    assert_eq!(code, ExitCode::ImageMalformed);
    assert!(text.contains("cut off"), "{text}");
    let header_only = bzimage(&[], |_| ())[..0x220].to_vec();
    assert_eq!(with_kernel(&header_only).refused().0, ExitCode::ImageMalformed);
    let zimage = bzimage(&[1; 16], |header| header.loadflags = 0);
    assert!(with_kernel(&zimage).refused().1.contains("zImage of old"));
}

/// An ELF file with one segment and, optionally, a PVH note (in the second of two note segments).
fn elf(is_64: bool, paddr: u64, vaddr: u64, entry: u64, code: &[u8], pvh: Option<u32>) -> Vec<u8> {
    let note = |name: &[u8], kind: u32, data: &[u8]| {
        let mut note = Vec::new();
        for word in [name.len() as u32, data.len() as u32, kind] {
            note.extend_from_slice(&word.to_le_bytes());
        }
        for part in [name, data] {
            note.extend_from_slice(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    };
    let mut pieces: Vec<(u32, Vec<u8>)> = vec![(1, code.to_vec())];
    if let Some(entry) = pvh {
        let other = [note(b"GNU\0", 3, &[1; 20]), note(b"Xen\0", 6, b"linux\0")].concat();
        pieces.push((4, [other, note(b"Xen\0", 18, &entry.to_le_bytes())].concat()));
        pieces.push((4, note(b"GNU\0", 5, &[2; 7])));
    }
    let mut image = vec![0x7f, b'E', b'L', b'F', if is_64 { 2 } else { 1 }, 1, 1];
    image.resize(16, 0);
    image.extend_from_slice(&2u16.to_le_bytes());
    image.extend_from_slice(&(if is_64 { 62u16 } else { 3 }).to_le_bytes());
    image.extend_from_slice(&1u32.to_le_bytes());
    let word = |image: &mut Vec<u8>, value: u64| {
        image.extend_from_slice(&value.to_le_bytes()[..if is_64 { 8 } else { 4 }]);
    };
    let header = if is_64 { 64 } else { 52 };
    for value in [entry, header, 0] {
        word(&mut image, value);
    }
    image.extend_from_slice(&0u32.to_le_bytes());
    let size = if is_64 { 56u16 } else { 32 };
    for value in [header as u16, size, pieces.len() as u16, 0, 0, 0] {
        image.extend_from_slice(&value.to_le_bytes());
    }
    let mut offset = header + u64::from(size) * pieces.len() as u64;
    for (kind, data) in &pieces {
        image.extend_from_slice(&kind.to_le_bytes());
        if is_64 {
            image.extend_from_slice(&7u32.to_le_bytes());
        }
        let memory_size = if *kind == 1 { data.len() as u64 + 0x1000 } else { data.len() as u64 };
        for value in [offset, vaddr, paddr, data.len() as u64, memory_size] {
            word(&mut image, value);
        }
        if is_64 {
            word(&mut image, 4096);
        } else {
            image.extend_from_slice(&[0; 8]);
        }
        offset += data.len() as u64;
    }
    for (_, data) in &pieces {
        image.extend_from_slice(data);
    }
    image
}

#[test]
fn pvh_kernels_of_both_classes() {
    for is_64 in [false, true] {
        let kernel = elf(is_64, 0x20_0000, 0xc020_0000, 0xc020_0000, &[0x90; 100], Some(0x20_0010));
        let bench = with_kernel(&kernel)
            .with_cmdline("main")
            .with_ramdisk(&[1; 5])
            .with_module(&[2; 4097], "first module")
            .with_module(&[3; 1], "");
        let (guest, loaded) = bench.load().unwrap();
        assert_eq!((loaded.start.mode, loaded.start.entry.as_u64()), (EntryMode::Protected, 0x20_0010));
        assert_eq!(loaded.start.registers, StartRegisters { rbx: BOOT_INFO, ..Default::default() });
        assert_eq!(guest.bytes(0x20_0000, 101), [&[0x90; 100][..], &[0]].concat());
        let info: hvm_start_info = guest.object(BOOT_INFO);
        assert_eq!((info.magic, info.version, info.rsdp_paddr, info.nr_modules), (0x336e_c578, 1, RSDP, 3));
        assert_eq!(guest.text(info.cmdline_paddr), "main");
        let modules: Vec<hvm_modlist_entry> = (0..3).map(|i| guest.object(info.modlist_paddr + 32 * i)).collect();
        assert_eq!(modules.iter().map(|m| m.size).collect::<Vec<_>>(), [5, 4097, 1]);
        assert_eq!(modules.iter().map(|m| m.paddr).collect::<Vec<_>>(), [0x20_2000, 0x20_3000, 0x20_5000]);
        assert_eq!(guest.text(modules[1].cmdline_paddr), "first module");
        assert_eq!(guest.bytes(modules[1].paddr, 4097), [2; 4097]);
        let map: Vec<hvm_memmap_table_entry> =
            (0..info.memmap_entries.into()).map(|i| guest.object(info.memmap_paddr + 24 * i)).collect();
        assert_eq!((map[3].addr, map[3].size, map[3].type_), (0x10_0000, MEMORY - 0x10_0000, 1));
    }
}

#[test]
fn plain_64_bit_elf_kernels() {
    let kernel = elf(true, 0x20_0000, 0xffff_ffff_8020_0000, 0xffff_ffff_8020_0008, &[0x90; 100], None);
    let (guest, loaded) = with_kernel(&kernel).with_cmdline("hello").with_ramdisk(&[4; 8]).load().unwrap();
    assert_eq!((loaded.start.mode, loaded.start.entry.as_u64()), (EntryMode::Long, 0x20_0008));
    let registers = loaded.start.registers;
    assert_eq!((registers.rsi, registers.rsp), (ZERO_PAGE, STACK.end));
    let params: boot_params = guest.object(ZERO_PAGE);
    let (line, disk) = (params.hdr.cmd_line_ptr, params.hdr.ramdisk_image);
    assert_eq!(guest.text(line.into()), "hello");
    assert_eq!(guest.bytes(disk.into(), 8), [4; 8]);
}

/// A multiboot header with these flags and, for flag 16, addresses.
fn multiboot_header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let checksum = 0u32.wrapping_sub(magic.wrapping_add(flags));
    [magic, flags, checksum].iter().chain(addresses).flat_map(|word| word.to_le_bytes()).collect()
}

fn check_multiboot(bench: Bench, code_at: u64, entry: u64, first_module: u64) {
    let bench = bench.with_cmdline("kernel line").with_module(&[5; 10], "one").with_module(&[6; 20], "two");
    let (guest, loaded) = bench.load().unwrap();
    assert_eq!((loaded.start.mode, loaded.start.entry.as_u64()), (EntryMode::Protected, entry));
    let registers = loaded.start.registers;
    assert_eq!((registers.rax, registers.rbx), (0x2bad_b002, BOOT_INFO));
    assert_eq!(guest.bytes(code_at, 4), [0x90; 4]);
    let info = |index: u64| guest.word(BOOT_INFO + 4 * index);
    assert_eq!(info(0), 0b10_0100_1101);
    assert_eq!((info(1), info(2)), (640, (MEMORY >> 10) as u32 - 1024));
    assert_eq!(guest.text(info(4).into()), "kernel line");
    assert_eq!(info(5), 2);
    let module = |i: u64, field: u64| guest.word(u64::from(info(6)) + 16 * i + 4 * field);
    assert_eq!((u64::from(module(0, 0)), module(0, 1) - module(0, 0)), (first_module, 10));
    assert_eq!((module(1, 0), module(1, 1) - module(1, 0)), (module(0, 0) + 0x1000, 20));
    assert_eq!((guest.text(module(0, 2).into()), guest.text(module(1, 2).into())), ("one".into(), "two".into()));
    assert_eq!(guest.bytes(module(1, 0).into(), 20), [6; 20]);
    let mut at = u64::from(info(12));
    let end = at + u64::from(info(11));
    let mut ram = 0;
    while at < end {
        if guest.word(at + 20) == 1 {
            ram += guest.object::<u64>(at + 12);
        }
        at += u64::from(guest.word(at)) + 4;
    }
    assert_eq!((at, ram), (end, 0x9_fc00 + MEMORY - 0x10_0000));
    assert_eq!(guest.text(info(16).into()), "axvmm");
}

#[test]
fn multiboot_elf_kernels_of_both_classes() {
    for is_64 in [false, true] {
        let code = [multiboot_header(3, &[]), vec![0x90; 100]].concat();
        let kernel = elf(is_64, 0x10_0000, 0x10_0000, 0x10_000c, &code, None);
        check_multiboot(with_kernel(&kernel), 0x10_000c, 0x10_000c, 0x10_2000);
    }
}

#[test]
fn multiboot_flat_kernels() {
    // The header is 8 bytes into the file; memory behind the data is to be cleared up to bss_end.
    let header = multiboot_header(0x1_0003, &[0x20_0008, 0x20_0000, 0, 0x20_8000, 0x20_0030]);
    let kernel = [vec![0; 8], header, vec![0x90; 100]].concat();
    check_multiboot(with_kernel(&kernel), 0x20_0030, 0x20_0030, 0x20_8000);
}

#[test]
fn damaged_multiboot_kernels() {
    let refused = |image: &[u8]| with_kernel(image).refused();
    let (code, text) = refused(&multiboot_header(0x8, &[]));
    assert_eq!(code, ExitCode::ImageMalformed);
    assert!(text.contains("unknown features 0x8"), "{text}");
    assert!(refused(&multiboot_header(3, &[])).1.contains("neither ELF nor"));
    for addresses in [[0, 0x20_0000, 0, 0, 0], [0x20_0008, 0x20_0000, 0, 0, 0], [0x20_0000, 0x20_0000, 0x10_0000, 0, 0]]
    {
        let (_, text) = refused(&multiboot_header(0x1_0000, &addresses));
        assert!(text.contains("contradict"), "{addresses:x?}: {text}");
    }
    let far = [0xffff_0000, 0xffff_0000, 0, 0, 0];
    assert_eq!(refused(&multiboot_header(0x1_0000, &far)).0, ExitCode::MemoryTooSmall);
    let wrong_sum = [&multiboot_header(3, &[])[..8], &[0; 4]].concat();
    assert_eq!(refused(&wrong_sum).0, ExitCode::ImageUnknown);
}

#[test]
fn raw_binaries_start_where_they_are_told() {
    for mode in [EntryMode::Real, EntryMode::Protected, EntryMode::Long] {
        let mut bench = with_kernel(&[0xf4; 100]);
        bench.config.entry_point = Some(0x8010);
        bench.config.load_addr = Some(0x8000);
        bench.config.entry_mode = mode;
        let (guest, loaded) = bench.load().unwrap();
        assert_eq!((loaded.start.mode, loaded.start.entry.as_u64()), (mode, 0x8010));
        assert_eq!(guest.bytes(0x8000, 100), [0xf4; 100]);
        bench.config.entry_point = Some(0x8064);
        assert!(bench.refused().1.contains("outside of 0x8000 to 0x8064"));
        bench.config.entry_point = Some(0xe_0010);
        bench.config.load_addr = Some(0xe_0000);
        assert!(bench.refused().1.contains("overlaps the ACPI tables"));
        bench.config.load_addr = Some(0xdf_ff00);
        bench.config.entry_point = Some(0xdf_ff00);
        bench.memory = layout::default_regions(4 << 20);
        assert_eq!(bench.refused().0, ExitCode::MemoryTooSmall);
    }
    let mut page_tables = with_kernel(&[0x90; 0x1000]);
    page_tables.config.entry_point = Some(0x9_0000);
    assert!(page_tables.load().is_ok(), "real mode has none");
    page_tables.config.entry_mode = EntryMode::Long;
    assert!(page_tables.refused().1.contains("overlaps"));
}

#[test]
fn files_that_cannot_be_read() {
    let mut bench = with_kernel(b"x");
    bench.config.path = bench.folder.path().join("none");
    let (code, text) = bench.refused();
    assert_eq!(code, ExitCode::ImageUnreadable);
    assert!(text.contains("cannot read the kernel") && text.ends_with("there is no such file"), "{text}");
    bench.config.path = bench.folder.path().to_owned();
    assert!(bench.refused().1.ends_with("it is a directory"));
    bench.config.path = "/dev/null".into();
    assert!(bench.refused().1.ends_with("it is not a regular file"));

    let mut bench = with_kernel(&bzimage(&[1; 16], |_| ()));
    bench.config.ramdisk = Some(bench.folder.path().join("none"));
    let (code, text) = bench.refused();
    assert_eq!(code, ExitCode::RamdiskUnreadable);
    assert!(text.contains("the initial RAM disk"), "{text}");
    assert!(bench.with_ramdisk(b"").refused().1.ends_with("it is empty"));
}

#[test]
fn files_that_do_not_fit() {
    let bench = with_kernel(&bzimage(&[1; 16], |_| ())).with_ramdisk(b"x");
    let file = fs::File::options().write(true).open(bench.config.ramdisk.as_ref().unwrap()).unwrap();
    file.set_len(MEMORY).unwrap();
    let (code, text) = bench.refused();
    assert_eq!(code, ExitCode::RamdiskTooLarge);
    assert!(text.contains("(64 MiB) does not fit") && text.contains("largest space free for it has 40 MiB"), "{text}");
    let bench = with_kernel(&elf(true, 0x20_0000, 0, 0x20_0000, &[0; 8], Some(0x20_0000))).with_module(b"x", "");
    fs::File::options().write(true).open(&bench.config.modules[0].path).unwrap().set_len(MEMORY).unwrap();
    assert!(bench.refused().1.starts_with("the module "));
}

#[test]
fn formats_and_configurations_that_do_not_go_together() {
    let conflict = |bench: Bench, words: &str| {
        let (code, text) = bench.refused();
        assert_eq!(code, ExitCode::ImageUnsupported, "{text}");
        assert!(text.contains(words), "{text}");
    };
    let linux = bzimage(&[1; 16], |_| ());
    conflict(with_kernel(&linux).with_module(b"m", ""), "takes no modules");
    let mut with_entry = with_kernel(&linux);
    with_entry.config.entry_point = Some(0x10_0000);
    conflict(with_entry, "remove entry_point");
    let raw = || {
        let mut bench = with_kernel(&[0xf4; 4]);
        bench.config.entry_point = Some(0x1000);
        bench
    };
    conflict(raw().with_ramdisk(b"r"), "remove ramdisk_path");
    conflict(raw().with_module(b"m", ""), "takes no modules");
    conflict(raw().with_cmdline("x"), "takes no command line");
    conflict(with_kernel(&elf(true, 0x20_0000, 0, 0x20_0000, &[0; 8], None)).with_module(b"m", ""), "takes no modules");
}

#[test]
fn what_is_no_kernel_is_named() {
    let refused = |image: &[u8]| {
        let (code, text) = with_kernel(image).refused();
        assert_eq!(code, ExitCode::ImageUnknown, "{text}");
        text
    };
    assert!(refused(b"\x89PNG\r\n\x1a\n0000").contains("a PNG image"));
    assert!(refused(b"").contains("it is empty"));
    assert!(refused(b"\x1f\x8b\x08rest").contains("gzip"));
    let mut arm = elf(true, 0, 0, 0, &[0; 8], None);
    arm[18] = 183;
    assert!(refused(&arm).contains("another machine, arm64"));
    assert!(refused(&arm[..60]).contains("arm64") || refused(&arm[..60]).contains("cut off"));
    let mut library = elf(true, 0x20_0000, 0, 0, &[0; 8], None);
    library[16] = 3;
    assert!(refused(&library).contains("library"));
    assert!(refused(&elf(false, 0x20_0000, 0, 0, &[0; 8], None)).contains("without PVH note or multiboot"));
    let mut png = with_kernel(b"\x89PNG\r\n\x1a\n0000");
    png.config.entry_point = Some(0x1000);
    assert!(png.load().is_ok(), "who gives an entry point means it");
    let mut empty = with_kernel(b"");
    empty.config.entry_point = Some(0x1000);
    assert!(empty.refused().1.contains("it is empty"));
}

#[test]
fn no_image_makes_a_loader_panic() {
    // Every prefix, and single bytes changed, of one kernel of each format.
    let kernels = [
        bzimage(&[1; 64], |_| ()),
        elf(true, 0x20_0000, 0, 0x20_0000, &[0; 8], Some(0x20_0000)),
        elf(false, 0x20_0000, 0, 0x20_0000, &multiboot_header(3, &[]), None),
        multiboot_header(0x1_0003, &[0x20_0000, 0x20_0000, 0, 0, 0x20_0000]),
    ];
    for kernel in kernels {
        let bench = with_kernel(&kernel).with_memory(4 << 20);
        for length in (0..kernel.len()).step_by(3) {
            fs::write(&bench.config.path, &kernel[..length]).unwrap();
            let _ = bench.load();
        }
        for at in (0..kernel.len()).filter(|at| kernel.len() < 600 || *at >= 0x1f0 && *at < 0x270) {
            for value in [0, 0x7f, 0xff] {
                let mut changed = kernel.clone();
                changed[at] = value;
                fs::write(&bench.config.path, &changed).unwrap();
                let _ = bench.load();
            }
        }
    }
}
