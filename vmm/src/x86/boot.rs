// SPDX-License-Identifier: MIT OR Apache-2.0
//! The CPU at the guest's first instruction: registers, GDT and page tables for each way of starting.

use std::ops::Range;

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::x86::{Control, DescriptorTable, General, Segment, Segments, RBX, RSI, RSP};
use axvcpu_uapi::x86::{RAX, RDI};

use crate::config::EntryMode;
use crate::hypervisor;
use crate::memory::{OutOfRam, Ram};
use crate::x86::device::power::RESET_VALUE;
use crate::x86::hypervisor::X86Vcpu;
use crate::x86::layout::{GDT, PAGE_TABLES, RESET_VECTOR};

/// Selector of the code segment at entry: `__BOOT_CS` of the Linux boot protocol, which suits the others, too.
const CODE_SELECTOR: u16 = 0x10;
/// Selector of the data segments at entry: `__BOOT_DS`.
const DATA_SELECTOR: u16 = 0x18;

/// CR0: protection on.
const CR0_PE: u64 = 1 << 0;
/// CR0: the coprocessor is a 387; always set.
const CR0_ET: u64 = 1 << 4;
/// CR0: paging on.
const CR0_PG: u64 = 1 << 31;
/// CR4: 64-bit page-table entries.
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// All the firmware there is: `mov al, 6; mov dx, 0xcf9; out dx, al; 1: hlt; jmp 1b`. Linux jumps there to restart when ACPI
/// is hardware-reduced and there is no EFI (`efi_reboot_required` in `arch/x86/platform/efi/quirks.c`).
const RESET_CODE: [u8; 9] = [0xb0, RESET_VALUE, 0xba, 0xf9, 0x0c, 0xee, 0xf4, 0xeb, 0xfd];

/// Writes the code at the real-mode reset vector, which resets the machine.
///
/// # Errors
/// [`OutOfRam`].
pub fn write_reset_vector(ram: &Ram) -> Result<(), OutOfRam> {
    ram.write(GuestPhysAddr::new(RESET_VECTOR), &RESET_CODE)
}

/// How the boot processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Mode of the CPU.
    pub mode: EntryMode,
    /// Address of the first instruction; below 4 GiB outside long mode.
    pub entry: GuestPhysAddr,
    /// Values that the boot protocol puts into registers; the others are zero.
    pub registers: StartRegisters,
}

/// Registers that carry something at entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StartRegisters {
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RSI.
    pub rsi: u64,
    /// RDI.
    pub rdi: u64,
    /// RSP.
    pub rsp: u64,
}

impl Start {
    /// The memory that [`prepare`](Self::prepare) writes.
    #[must_use]
    pub fn memory(&self) -> Vec<(&'static str, Range<u64>)> {
        let gdt = ("the boot GDT", GDT..GDT + 0x1000);
        match self.mode {
            EntryMode::Real => vec![],
            EntryMode::Protected => vec![gdt],
            EntryMode::Long => vec![gdt, ("the boot page tables", PAGE_TABLES..PAGE_TABLES + 6 * 0x1000)],
        }
    }

    /// Writes the GDT and page tables that the mode needs.
    ///
    /// # Errors
    /// [`OutOfRam`].
    pub fn prepare(&self, ram: &Ram) -> Result<(), OutOfRam> {
        if self.mode == EntryMode::Real {
            return Ok(());
        }
        let code = code_segment(self.mode);
        for (index, descriptor) in [0, 0, descriptor(&code), descriptor(&DATA)].into_iter().enumerate() {
            ram.write(GuestPhysAddr::new(GDT + 8 * index as u64), &descriptor.to_le_bytes())?;
        }
        if self.mode == EntryMode::Long {
            write_page_tables(ram)?;
        }
        Ok(())
    }

    /// Where a vCPU has to be told to start before it is set up; [`apply`](Self::apply) corrects what the real-mode
    /// start cannot express.
    #[must_use]
    pub fn reset_entry(&self) -> GuestPhysAddr {
        match self.mode {
            EntryMode::Real | EntryMode::Protected => self.entry,
            EntryMode::Long => GuestPhysAddr::new(self.entry.as_u64() & 0xffff_f000),
        }
    }

    /// Gives a vCPU that has been set up its registers.
    ///
    /// # Errors
    /// Those of [`hypervisor::Registers`].
    pub fn apply(&self, vcpu: &mut impl X86Vcpu) -> hypervisor::Result<()> {
        let mut general: General = vcpu.get()?;
        let StartRegisters { rax, rbx, rsi, rdi, rsp } = self.registers;
        for (index, value) in [(RAX, rax), (RBX, rbx), (RSI, rsi), (RDI, rdi), (RSP, rsp)] {
            general.gpr[index] = value;
        }
        if self.mode != EntryMode::Real {
            let mut control: Control = vcpu.get()?;
            let mut segments: Segments = vcpu.get()?;
            self.set_mode(&mut control, &mut segments);
            // The order matters to a module that checks sets against each other: long mode first, then 64-bit code.
            vcpu.set(&control)?;
            vcpu.set(&segments)?;
            general.rip = self.entry.as_u64();
        }
        vcpu.set(&general)
    }

    fn set_mode(&self, control: &mut Control, segments: &mut Segments) {
        control.cr0 = CR0_PE | CR0_ET;
        if self.mode == EntryMode::Long {
            control.cr0 |= CR0_PG;
            control.cr3 = PAGE_TABLES;
            control.cr4 = CR4_PAE;
            control.efer = EFER_LME_LMA;
        }
        segments.cs = code_segment(self.mode);
        for segment in [&mut segments.ss, &mut segments.ds, &mut segments.es, &mut segments.fs, &mut segments.gs] {
            *segment = DATA;
        }
        segments.gdtr = DescriptorTable { base: GDT, limit: 4 * 8 - 1, reserved: [0; 3] };
    }
}

/// Flat data segment: type 3 (read, write, accessed), S, P, D/B, G (APM volume 2, section 4.7).
const DATA: Segment = Segment { base: 0, limit: u32::MAX, selector: DATA_SELECTOR, attributes: 0xc93 };

/// Flat code segment: type 0xb (execute, read, accessed), S, P, G, and L or D.
const fn code_segment(mode: EntryMode) -> Segment {
    let attributes = if matches!(mode, EntryMode::Long) { 0xa9b } else { 0xc9b };
    Segment { base: 0, limit: u32::MAX, selector: CODE_SELECTOR, attributes }
}

/// The GDT entry of a flat segment (APM volume 2, section 4.7.1).
const fn descriptor(segment: &Segment) -> u64 {
    let attributes = segment.attributes as u64;
    // Attributes 7:0 are descriptor bits 47:40, attributes 11:8 are bits 55:52; the limit in pages is 0xfffff.
    0xffff | (attributes & 0xff) << 40 | 0xf << 48 | (attributes >> 8 & 0xf) << 52
}

/// Maps the first 4 GiB one to one by 2 MiB pages: PML4, PDPT and four directories from [`PAGE_TABLES`] on.
fn write_page_tables(ram: &Ram) -> Result<(), OutOfRam> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let directory = |i: u64| PAGE_TABLES + (2 + i) * 0x1000;
    let word = |at: u64, value: u64| ram.write(GuestPhysAddr::new(at), &value.to_le_bytes());
    word(PAGE_TABLES, (PAGE_TABLES + 0x1000) | PRESENT_WRITABLE)?;
    for i in 0..4 {
        word(PAGE_TABLES + 0x1000 + 8 * i, directory(i) | PRESENT_WRITABLE)?;
        for j in 0..512 {
            word(directory(i) + 8 * j, (i << 30 | j << 21) | LARGE | PRESENT_WRITABLE)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryRegion;
    use crate::x86::paging::{self, Access, GuestMemory, PagingState};
    use axvcpu_uapi::addr::GuestVirtAddr;

    fn start(mode: EntryMode) -> Start {
        Start { mode, entry: GuestPhysAddr::new(0x10_0000), registers: StartRegisters::default() }
    }

    fn ram() -> Ram {
        Ram::new(&[MemoryRegion { base: 0, size: 2 << 20 }]).unwrap()
    }

    struct Tables(Ram);
    impl GuestMemory for Tables {
        type Error = OutOfRam;
        fn read(&mut self, at: GuestPhysAddr, data: &mut [u8]) -> Result<(), OutOfRam> {
            self.0.read(at, data)
        }
        fn compare_exchange(&mut self, at: GuestPhysAddr, width: usize, old: u64, new: u64) -> Result<bool, OutOfRam> {
            self.0.compare_exchange(at, width, old, new)
        }
    }

    #[test]
    fn first_4_gib_map_to_themselves() {
        let ram = ram();
        start(EntryMode::Long).prepare(&ram).unwrap();
        let (mut control, mut segments) = (Control::default(), Segments::default());
        start(EntryMode::Long).set_mode(&mut control, &mut segments);
        let state = PagingState {
            cr0: control.cr0,
            cr3: control.cr3,
            cr4: control.cr4,
            efer: control.efer,
            cpl: 0,
            ac: false,
            phys_bits: 48,
            gib_pages: false,
        };
        for at in [0, 0x1234, 0x10_0000, 0x3fff_ffff, 0x8765_4321, 0xffff_ffff] {
            let found =
                paging::translate(&state, &mut Tables(ram.clone()), GuestVirtAddr::new(at), Access::Write).unwrap();
            assert_eq!(found.gpa.as_u64(), at);
        }
        assert!(paging::translate(&state, &mut Tables(ram), GuestVirtAddr::new(1 << 32), Access::Read).is_err());
    }

    #[test]
    fn descriptors_are_the_classic_flat_ones() {
        assert_eq!(descriptor(&code_segment(EntryMode::Protected)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&code_segment(EntryMode::Long)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&DATA), 0x00cf_9300_0000_ffff);
        let ram = ram();
        start(EntryMode::Protected).prepare(&ram).unwrap();
        let mut entry = [0; 8];
        ram.read(GuestPhysAddr::new(GDT + u64::from(CODE_SELECTOR)), &mut entry).unwrap();
        assert_eq!(u64::from_le_bytes(entry), 0x00cf_9b00_0000_ffff);
    }

    #[test]
    fn reset_code_writes_the_reset_register() {
        let ram = ram();
        write_reset_vector(&ram).unwrap();
        let mut code = [0; 9];
        ram.read(GuestPhysAddr::new(0xf_fff0), &mut code).unwrap();
        let text: Vec<String> = iced_x86::Decoder::with_ip(16, &code, 0xfff0, 0)
            .iter()
            .map(|insn| {
                let mut text = String::new();
                iced_x86::FastFormatter::new().format(&insn, &mut text);
                text
            })
            .collect();
        assert_eq!(text, ["mov al,6h", "mov dx,0CF9h", "out dx,al", "hlt", "jmp 0FFF6h"]);
        assert_eq!(crate::x86::layout::port::RESET, 0xcf9);
    }

    #[test]
    fn real_mode_needs_nothing() {
        assert!(start(EntryMode::Real).memory().is_empty());
        let ram = ram();
        start(EntryMode::Real).prepare(&ram).unwrap();
        let mut page = [0; 0x20];
        ram.read(GuestPhysAddr::new(GDT), &mut page).unwrap();
        assert_eq!(page, [0; 0x20]);
    }
}
