// SPDX-License-Identifier: MIT OR Apache-2.0
//! Names what a file is that is no kernel we can boot, and what its owner can do about it.

use std::path::Path;

use super::{elf, ImageError};

/// Signatures at fixed offsets: offset, bytes, name, cure.
const SIGNATURES: &[(usize, &[u8], &str, &str)] = &[
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image", ""),
    (0, b"\xff\xd8\xff", "a JPEG image", ""),
    (0, b"GIF8", "a GIF image", ""),
    (0, b"%PDF-", "a PDF document", ""),
    (0, b"\x1f\x8b", "gzip-compressed data", "Unpack it first (gunzip)."),
    (0, b"\xfd7zXZ\0", "xz-compressed data", "Unpack it first (unxz)."),
    (0, b"BZh", "bzip2-compressed data", "Unpack it first (bunzip2)."),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed data", "Unpack it first (unzstd)."),
    (0, b"\x04\x22\x4d\x18", "lz4-compressed data", "Unpack it first (unlz4)."),
    (0, b"\x02\x21\x4c\x18", "lz4-compressed data", "Unpack it first (unlz4)."),
    (0, b"PK\x03\x04", "a zip archive", ""),
    (0, b"070701", "a cpio archive", "An initramfs goes to ramdisk_path."),
    (0, b"070702", "a cpio archive", "An initramfs goes to ramdisk_path."),
    (257, b"ustar", "a tar archive", ""),
    (
        0,
        b"!<arch>\ndebian",
        "a Debian package",
        "The kernel is inside: dpkg -x PACKAGE DIRECTORY, then look for boot/vmlinuz-*.",
    ),
    (0, b"!<arch>\n", "an ar archive", ""),
    (0, b"QFI\xfb", "a qcow2 disk image", "Disks are not supported; a kernel is needed."),
    (32769, b"CD001", "an ISO 9660 image", "The kernel is inside; it has to be taken out first."),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image", ""),
    (0, b"\x27\x05\x19\x56", "a U-Boot image", ""),
    (0, b"\xca\xfe\xba\xbe", "a Java class file", ""),
    (0, b"\xcf\xfa\xed\xfe", "a Mach-O program", ""),
    (0, b"#!", "a script", ""),
    (510, b"\x55\xaa", "a disk or boot sector image", "Firmware would be needed to boot it; give the kernel itself."),
];

/// What is a kernel for the architecture.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// The architecture's name.
    pub(crate) name: &'static str,
    /// The numbers of its machines in ELF files.
    pub(crate) elf: &'static [u16],
    /// The number of its machine in PE files.
    pub(crate) pe: u16,
    /// The formats, as the cure for a file that has none of its own.
    pub(crate) kernels: &'static str,
}

/// The error for `image`, which no loader recognised.
pub(crate) fn not_a_kernel(path: &Path, image: &[u8], wanted: &Wanted) -> ImageError {
    let (what, cure) = describe(image, wanted);
    let cure = if cure.is_empty() { wanted.kernels.into() } else { cure };
    ImageError::NotAKernel { path: path.to_owned(), what, cure }
}

fn describe(image: &[u8], wanted: &Wanted) -> (String, String) {
    if image.is_empty() {
        return ("empty".into(), String::new());
    }
    if image.starts_with(elf::MAGIC) {
        return match elf::Elf::parse(image, wanted.elf) {
            Err(problem) => (problem, String::new()),
            Ok(elf) => elf.describe(),
        };
    }
    for (offset, signature, what, cure) in SIGNATURES {
        if image.get(*offset..).is_some_and(|rest| rest.starts_with(signature)) {
            // An EFI stub kernel for another machine, or the old zImage, also begins like a PE program or a boot sector.
            if image.starts_with(b"MZ") {
                break;
            }
            return ((*what).into(), (*cure).into());
        }
    }
    if image.starts_with(b"MZ") {
        return pe(image, wanted);
    }
    if image.get(0x38..).is_some_and(|rest| rest.starts_with(b"ARM\x64")) {
        return ("an arm64 kernel".into(), other_machine(wanted));
    }
    let sample = &image[..image.len().min(4096)];
    if let Ok(text) = std::str::from_utf8(sample) {
        if !text.chars().any(|c| c.is_control() && !c.is_whitespace()) {
            let html = text.trim_start().to_ascii_lowercase().starts_with("<!doctype html");
            return (if html { "an HTML page" } else { "text" }.into(), String::new());
        }
    }
    ("of an unknown format".into(), String::new())
}

/// The cure for code of another machine.
fn other_machine(wanted: &Wanted) -> String {
    format!("This machine needs a kernel for {}.", wanted.name)
}

/// A PE program (or a DOS one); kernels with an EFI stub look so, too.
fn pe(image: &[u8], wanted: &Wanted) -> (String, String) {
    let word = |at: usize| image.get(at..at + 2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    let header = word(0x3c).map_or(usize::MAX, usize::from);
    if image.get(header..).is_none_or(|rest| !rest.starts_with(b"PE\0\0")) {
        return ("a DOS program".into(), String::new());
    }
    let number = word(header + 4);
    let machine = match number {
        Some(0x8664) => "x86-64",
        Some(0x014c) => "32-bit x86",
        Some(0xaa64) => "arm64",
        Some(0x5064) => "64-bit RISC-V",
        _ => "another machine",
    };
    let cure = if number == Some(wanted.pe) {
        "EFI programs need firmware, which axvmm has not; give the Linux kernel itself.".into()
    } else {
        other_machine(wanted)
    };
    (format!("a PE (Windows or EFI) program for {machine}"), cure)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted = Wanted { name: "x86-64", elf: &[elf::EM_X86_64], pe: 0x8664, kernels: "Kernels are x." };

    fn describe(image: &[u8]) -> (String, String) {
        super::describe(image, &WANTED)
    }

    fn at(offset: usize, bytes: &[u8]) -> Vec<u8> {
        let mut image = vec![0; offset];
        image.extend_from_slice(bytes);
        image.resize(image.len() + 600, 0);
        image
    }

    #[test]
    fn everything_is_named_for_what_it_is() {
        for (offset, signature, what, _) in SIGNATURES {
            assert_eq!(describe(&at(*offset, signature)).0, *what);
        }
        assert_eq!(describe(b"").0, "empty");
        assert_eq!(describe(b"hello\nworld\n").0, "text");
        assert_eq!(describe(b"<!DOCTYPE html><html>").0, "an HTML page");
        assert_eq!(describe(&[0x80; 100]).0, "of an unknown format");
        assert_eq!(describe(b"MZ").0, "a DOS program");
        let (what, cure) = describe(&at(0x38, b"ARM\x64"));
        assert_eq!((what.as_str(), cure.as_str()), ("an arm64 kernel", "This machine needs a kernel for x86-64."));
    }

    #[test]
    fn pe_programs_tell_their_machine() {
        let mut image = vec![0; 0x200];
        image[..2].copy_from_slice(b"MZ");
        image[0x3c] = 0x80;
        image[0x80..0x84].copy_from_slice(b"PE\0\0");
        for (machine, name) in [(0x8664u16, "x86-64"), (0xaa64, "arm64"), (0x1234, "another machine")] {
            image[0x84..0x86].copy_from_slice(&machine.to_le_bytes());
            let (what, cure) = describe(&image);
            assert!(what.ends_with(name));
            assert_eq!(cure.contains("need firmware"), name == "x86-64", "{cure}");
        }
    }

    #[test]
    fn message_names_file_content_and_cure() {
        let error = not_a_kernel(Path::new("logo.png"), b"\x89PNG\r\n\x1a\n....", &WANTED);
        assert!(error.to_string().starts_with("logo.png is no kernel: it is a PNG image\nKernels are x"));
    }
}
