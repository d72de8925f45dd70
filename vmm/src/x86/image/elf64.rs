// SPDX-License-Identifier: MIT OR Apache-2.0
//! Plain 64-bit ELF kernels, which speak no boot protocol that is known here.

use axvcpu_uapi::addr::GuestPhysAddr;

use super::{Loaded, Loader};
use crate::config::EntryMode;
use crate::image::elf::Elf;
use crate::image::ImageError;
use crate::x86::boot::{Start, StartRegisters};
use crate::x86::layout;

impl Loader<'_> {
    /// A plain 64-bit kernel: 64-bit mode, memory below 4 GiB mapped one to one, RSI at Linux boot parameters, a stack.
    pub(super) fn load_elf(&mut self, elf: &Elf<'_>) -> Result<Loaded, ImageError> {
        self.refuse_modules("plain 64-bit ELF kernel")?;
        self.load_segments(elf)?;
        let entry = elf.physical_entry();
        if !self.ram.contains(&(entry..entry.saturating_add(1))) {
            return Err(self.malformed("ELF file", format!("its entry point {entry:#x} is in no segment")));
        }
        let mut params = self.boot_params()?;
        params.hdr.boot_flag = 0xaa55;
        params.hdr.header = u32::from_le_bytes(*b"HdrS");
        self.place_linux_files(&mut params, layout::HIGH_START..u32::MAX.into())?;
        self.place_boot_params(&params)?;
        self.placement.claim("the boot stack", layout::STACK)?;
        let registers = StartRegisters { rsi: layout::ZERO_PAGE, rsp: layout::STACK.end, ..Default::default() };
        Ok(Loaded {
            format: "64-bit ELF",
            start: Start { mode: EntryMode::Long, entry: GuestPhysAddr::new(entry), registers },
        })
    }
}
