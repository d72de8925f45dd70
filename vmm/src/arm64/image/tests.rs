// SPDX-License-Identifier: MIT OR Apache-2.0
//! Small kernels of each format, made here; what the loader leaves in memory; and images that are refused.

use super::*;
use crate::arm64::layout;
use crate::config::{EntryMode, ModuleConfig};
use crate::exit::ExitCode;
use crate::image::bench::Bench;
use ::fdt::Fdt;

const MEMORY: u64 = 64 << 20;

fn with_kernel(kernel: &[u8]) -> Bench {
    Bench::new(kernel, EntryMode::default(), layout::default_regions(MEMORY))
}

/// What is loaded from it here.
trait Load {
    fn load(&self) -> Result<(Ram, Loaded), ImageError>;

    fn refused(&self) -> (ExitCode, String) {
        let error = self.load().map(|(_, loaded)| loaded).unwrap_err();
        (error.exit_code(), error.to_string())
    }
}

impl Load for Bench {
    fn load(&self) -> Result<(Ram, Loaded), ImageError> {
        let ram = Ram::new(&self.memory).unwrap();
        let seeds = fdt::Seeds { rng: [1; 64], kaslr: 2 };
        let machine = fdt::Machine { cpus: 2, memory: &self.memory, serial: true, seeds };
        let loaded = load(&self.config, &ram, &machine)?;
        Ok((ram, loaded))
    }
}

fn bytes(ram: &Ram, at: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    ram.read(GuestPhysAddr::new(at), &mut bytes).unwrap();
    bytes
}

/// An Image of 4 KiB with this header.
fn arm64_image(text_offset: u64, image_size: u64, flags: u64) -> Vec<u8> {
    let mut image = vec![0x5a; 4096];
    for (at, value) in [(8, text_offset), (16, image_size), (24, flags)] {
        image[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    image[0x38..0x3c].copy_from_slice(b"ARM\x64");
    image
}

/// A 64-bit ELF file for `machine` with one segment of the given physical address and memory size.
fn elf(machine: u16, kind: u16, paddr: u64, entry: u64, memory_size: u64) -> Vec<u8> {
    let mut file = vec![0; 64 + 56];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let content = [0xd5; 16];
    for (at, value) in [(16, kind), (18, machine), (54, 56), (56, 1)] {
        file[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    file[24..32].copy_from_slice(&entry.to_le_bytes());
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[64..68].copy_from_slice(&1u32.to_le_bytes());
    let words = [120, 0xffff_8000_0000_0000, paddr, content.len() as u64, memory_size];
    for (i, value) in words.into_iter().enumerate() {
        file[72 + 8 * i..80 + 8 * i].copy_from_slice(&value.to_le_bytes());
    }
    file.extend(content);
    file
}

#[test]
fn an_image_lies_where_its_header_says_and_the_tree_tells_of_the_rest() {
    let image = arm64_image(0x8_0000, 1 << 20, 0xa);
    let mut bench = with_kernel(&image);
    bench.config.ramdisk = Some(bench.file("ramdisk", &[7; 5000]));
    bench.config.cmdline = "console=ttyS0 a=b".into();
    let (ram, loaded) = bench.load().unwrap();
    assert_eq!((loaded.format, loaded.start.entry.as_u64()), ("arm64 Image", 0x4008_0000));
    assert_eq!(bytes(&ram, 0x4008_0000, 4096), image);

    let end = 0x4000_0000 + MEMORY;
    let at = loaded.start.fdt.as_u64();
    let size = u32::from_be_bytes(bytes(&ram, at + 4, 4).try_into().unwrap());
    let tree = bytes(&ram, at, size as usize);
    let fdt = Fdt::new(&tree).unwrap();
    assert_eq!(fdt.chosen().bootargs(), Some("console=ttyS0 a=b"));
    let chosen = fdt.find_node("/chosen").unwrap();
    let word = |name: &str| u64::from_be_bytes(chosen.property(name).unwrap().value.try_into().unwrap());
    let (from, to) = (word("linux,initrd-start"), word("linux,initrd-end"));
    assert_eq!((from, to), (end - 8192, end - 8192 + 5000));
    assert_eq!(bytes(&ram, from, 5000), [7; 5000]);
    assert!(at % 8 == 0 && at + u64::from(size) <= from, "{at:#x}");
}

#[test]
fn elf_kernels_start_at_their_physical_entry() {
    let at = 0x4100_0000;
    let (ram, loaded) = with_kernel(&elf(183, 2, at, 0xffff_8000_0000_0008, 0x1000)).load().unwrap();
    assert_eq!((loaded.format, loaded.start.entry.as_u64()), ("64-bit ELF", at + 8));
    assert_eq!(bytes(&ram, at, 16), [0xd5; 16]);
}

#[test]
fn raw_binaries_start_where_the_configuration_says() {
    let mut bench = with_kernel(&[1, 2, 3, 4, 5, 6, 7, 8]);
    bench.config.entry_point = Some(0x4020_0004);
    bench.config.load_addr = Some(0x4020_0000);
    let (ram, loaded) = bench.load().unwrap();
    assert_eq!((loaded.format, loaded.start.entry.as_u64()), ("raw binary", 0x4020_0004));
    assert_eq!(bytes(&ram, 0x4020_0000, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
    bench.config.load_addr = Some(0x1000);
    assert_eq!(bench.refused().0, ExitCode::ImageMalformed);
    bench.config.entry_point = Some(0x1000);
    assert_eq!(bench.refused().0, ExitCode::MemoryTooSmall, "devices are there");
}

#[test]
fn bad_images_are_named_for_what_they_are() {
    let zboot = [b"MZ\0\0zimg".as_slice(), &[0; 100]].concat();
    let cases = [
        (arm64_image(0, 1 << 20, 1), ExitCode::ImageUnsupported, "big-endian"),
        (arm64_image(0, 0, 0), ExitCode::ImageMalformed, "does not tell its size"),
        (arm64_image(0, 100, 0), ExitCode::ImageMalformed, "smaller size"),
        (arm64_image(u64::MAX, 1 << 20, 0), ExitCode::ImageMalformed, "does not exist"),
        (arm64_image(0, 1 << 30, 0), ExitCode::MemoryTooSmall, "0x40000000 to 0x80000000"),
        (elf(62, 2, 0x4000_0000, 0x4000_0000, 64), ExitCode::ImageUnknown, "x86-64"),
        (elf(183, 3, 0x4000_0000, 0x4000_0000, 64), ExitCode::ImageUnknown, "position-independent"),
        (elf(183, 2, 0x1000, 0x1000, 64), ExitCode::MemoryTooSmall, "the kernel wants 0x1000"),
        (zboot, ExitCode::ImageUnknown, "compressed kernel for EFI"),
        (b"\x1f\x8b\x08".to_vec(), ExitCode::ImageUnknown, "gunzip"),
        (vec![0x80; 64], ExitCode::ImageUnknown, "Kernels are Image"),
        (vec![], ExitCode::ImageUnknown, "empty"),
    ];
    for (image, code, words) in cases {
        let (found, text) = with_kernel(&image).refused();
        assert_eq!(found, code, "{text}");
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn what_does_not_go_together_is_refused() {
    let image = arm64_image(0, 1 << 20, 0);
    let mut bench = with_kernel(&image);
    bench.config.entry_point = Some(0x4000_0000);
    assert_eq!(bench.refused().0, ExitCode::ImageUnsupported);
    let mut bench = with_kernel(&image);
    bench.config.modules.push(ModuleConfig { path: bench.file("m", b"x"), cmdline: String::new() });
    assert_eq!(bench.refused().0, ExitCode::ImageUnsupported);
    let mut bench = with_kernel(&image);
    bench.config.ramdisk = Some(bench.file("ramdisk", &vec![0; MEMORY as usize]));
    assert_eq!(bench.refused().0, ExitCode::RamdiskTooLarge);
    let mut bench = with_kernel(&arm64_image(0, MEMORY, 0));
    bench.memory = layout::default_regions(MEMORY);
    let (code, text) = bench.refused();
    assert_eq!(code, ExitCode::MemoryTooSmall);
    assert!(text.contains("device tree"), "{text}");
}
