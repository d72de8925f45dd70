// SPDX-License-Identifier: MIT OR Apache-2.0
//! bzImage: the Linux/x86 boot protocol (Linux `Documentation/arch/x86/boot.rst`), entered in 64-bit mode where the
//! kernel can, else in 32-bit mode.

use std::io::Cursor;
use std::ops::Range;

use axvcpu_uapi::addr::GuestPhysAddr;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued as _, GuestAddress};

use super::{Loaded, Loader, Role};
use crate::config::{Bytes, EntryMode};
use crate::image::ImageError;
use crate::x86::boot::{Start, StartRegisters};
use crate::x86::layout;

/// Offset of the setup header in the image and in the boot parameters.
const HEADER: usize = 0x1f1;
/// Offset of the 64-bit entry point in the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// Boot protocol 2.10: `pref_address` and `init_size` are there.
const VERSION_INIT_SIZE: u16 = 0x20a;
/// Boot protocol 2.12: `xloadflags` is there.
const VERSION_XLOADFLAGS: u16 = 0x20c;
/// `loadflags`: the kernel is loaded at 1 MiB.
const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: there is a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1 << 0;
/// `xloadflags`: kernel, boot parameters, command line and RAM disk may be above 4 GiB.
const XLF_ABOVE_4G: u16 = 1 << 1;
/// `type_of_loader`: one without a number of its own.
const UNKNOWN_LOADER: u8 = 0xff;
/// Command-line limit of protocols that do not tell theirs.
const OLD_CMDLINE_LIMIT: u32 = 255;
/// Entries of the memory map in the boot parameters.
const MAX_E820: usize = 128;

/// Whether `image` is a Linux kernel with a setup header.
pub(super) fn recognise(image: &[u8]) -> bool {
    image.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) && image.get(0x202..0x206) == Some(b"HdrS")
}

impl Loader<'_> {
    pub(super) fn load_bzimage(&mut self, image: &[u8]) -> Result<Loaded, ImageError> {
        self.refuse_modules("bzImage")?;
        let header = self.setup_header(image)?;
        // Copies: the fields are not aligned.
        let (version, xloadflags) = (header.version, header.xloadflags);
        let is_64 = version >= VERSION_XLOADFLAGS && xloadflags & XLF_KERNEL_64 != 0;

        let payload = self.payload(image, &header)?;
        let (load_at, reserve) = self.choose_address(&header, payload.end - payload.start)?;
        self.claim("the kernel", load_at, reserve)?;
        BzImage::load(self.ram.as_vm_memory(), Some(GuestAddress(load_at)), &mut Cursor::new(image), None)
            .map_err(|error| self.malformed("bzImage", error.to_string()))?;

        let mut params = self.boot_params()?;
        params.hdr = header;
        params.hdr.type_of_loader = UNKNOWN_LOADER;
        // Always below 4 GiB, where RAM disks and kernels are put.
        params.hdr.code32_start = u32::try_from(load_at).unwrap_or(u32::MAX);
        let limit = if version >= 0x206 { header.cmdline_size } else { OLD_CMDLINE_LIMIT };
        let (length, limit) = (self.config.cmdline.len(), limit as usize);
        if length > limit {
            return Err(ImageError::CmdlineTooLong { length, limit });
        }
        let max = if xloadflags & XLF_ABOVE_4G != 0 && is_64 { u32::MAX } else { header.initrd_addr_max };
        self.place_linux_files(&mut params, layout::HIGH_START..u64::from(max) + 1)?;
        self.place_boot_params(&params)?;

        let (mode, entry) = if is_64 { (EntryMode::Long, load_at + ENTRY_64) } else { (EntryMode::Protected, load_at) };
        let registers = StartRegisters { rsi: layout::ZERO_PAGE, ..Default::default() };
        Ok(Loaded {
            format: if is_64 { "bzImage, 64-bit" } else { "bzImage, 32-bit" },
            start: Start { mode, entry: GuestPhysAddr::new(entry), registers },
        })
    }

    /// The setup header, as long as the image says it is; what is beyond is zero.
    fn setup_header(&self, image: &[u8]) -> Result<setup_header, ImageError> {
        // The byte at 0x201 is the offset of a jump that ends the header.
        let end = 0x202 + usize::from(image.get(0x201).copied().unwrap_or(0));
        let Some(bytes) = image.get(HEADER..end) else {
            return Err(self.malformed("bzImage", "it ends within its header; was it cut off?"));
        };
        let mut header = setup_header::default();
        let length = bytes.len().min(size_of::<setup_header>());
        header.as_mut_slice()[..length].copy_from_slice(&bytes[..length]);
        if header.version < 0x200 || header.loadflags & LOADED_HIGH == 0 {
            return Err(self.malformed("bzImage", "it is a zImage of old, which is loaded below 1 MiB"));
        }
        Ok(header)
    }

    /// The part of the image that is loaded: behind the boot sector and the setup sectors.
    fn payload(&self, image: &[u8], header: &setup_header) -> Result<Range<u64>, ImageError> {
        let setup = (u64::from(if header.setup_sects == 0 { 4 } else { header.setup_sects }) + 1) * 512;
        let end = image.len() as u64;
        // `syssize` counts paragraphs of the protected-mode code. A signature may follow it.
        let needed = setup + u64::from(header.syssize) * 16;
        if end <= setup || end + 15 < needed {
            let detail = format!("it should have {}, and has {}; was it cut off?", Bytes(needed), Bytes(end));
            return Err(self.malformed("bzImage", detail));
        }
        Ok(setup..end)
    }

    /// Where to load the kernel, and the memory it needs there to unpack itself.
    fn choose_address(&self, header: &setup_header, payload: u64) -> Result<(u64, u64), ImageError> {
        if header.version < VERSION_INIT_SIZE {
            return Ok((layout::HIGH_START, payload));
        }
        let reserve = payload.max(header.init_size.into());
        let preferred = header.pref_address;
        let fits = |at: u64| {
            at.checked_add(reserve).is_some_and(|end| end <= u32::MAX.into() && self.ram.contains(&(at..end)))
        };
        if preferred >= layout::HIGH_START && fits(preferred) {
            return Ok((preferred, reserve));
        }
        let alignment = u64::from(header.kernel_alignment).max(4096);
        let lowest = layout::HIGH_START.next_multiple_of(alignment);
        if header.relocatable_kernel != 0 && fits(lowest) {
            return Ok((lowest, reserve));
        }
        let at = if header.relocatable_kernel != 0 { lowest } else { preferred };
        Err(self
            .too_small(format!("it needs {} at {at:#x} to unpack itself", Bytes(reserve.next_multiple_of(1 << 20)))))
    }

    /// Boot parameters with the memory map and the ACPI tables.
    pub(super) fn boot_params(&self) -> Result<boot_params, ImageError> {
        let mut params = boot_params { acpi_rsdp_addr: self.arch.rsdp.as_u64(), ..Default::default() };
        if self.arch.map.len() > MAX_E820 {
            return Err(
                self.conflict("Linux kernel", "takes a memory map of 128 entries: give it fewer memory_regions")
            );
        }
        params.e820_entries = self.arch.map.len() as u8;
        for (slot, entry) in self.arch.map.iter().enumerate() {
            params.e820_table[slot] = boot_e820_entry { addr: entry.base, size: entry.size, type_: entry.kind as u32 };
        }
        Ok(params)
    }

    /// Command line and RAM disk, the latter as high as possible within `limits`.
    pub(super) fn place_linux_files(&mut self, params: &mut boot_params, limits: Range<u64>) -> Result<(), ImageError> {
        let config = self.config;
        // Both are placed below 4 GiB: the upper halves (`ext_*`) stay zero.
        params.hdr.cmd_line_ptr = self.place_cmdline(&config.cmdline)? as u32;
        if let Some(path) = &config.ramdisk {
            let (base, size) = self.place_file(Role::Ramdisk, path, limits, true)?;
            params.hdr.ramdisk_image = base as u32;
            params.hdr.ramdisk_size = size as u32;
            params.ext_ramdisk_size = (size >> 32) as u32;
        }
        Ok(())
    }

    pub(super) fn place_boot_params(&mut self, params: &boot_params) -> Result<(), ImageError> {
        self.place("the boot parameters", layout::ZERO_PAGE, params.as_slice())
    }
}
