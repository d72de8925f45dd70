// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guests: 64-bit code in a loop, the same bytes for every hypervisor.
//!
//! | guest physical | content |
//! |---|---|
//! | [`CODE`] | the loop |
//! | [`INTERRUPT`] | handler of vector [`VECTOR`]: end of interrupt, and back |
//! | [`FAULT`] | handler of #GP: skips an instruction of two bytes |
//! | [`TABLES`] | page tables: the first GiB, identical, by 2 MiB pages |
//! | below [`STACK`] | stack; each vCPU has 4 KiB |
//! | [`SMALL`], [`HUGE`] | places for memory that is mapped anew for each sample |
//! | from [`MMIO`] | not memory |
//!
//! A loop is a piece of code that prepares, and a body that is executed R15 times; then comes an OUT to port [`DONE`].
//! Preparation and body have RDI, R12, R13 and R14 for themselves.

use axvcpu_tests::machine::{flat_segment, CODE64, FLAT, TASK};
use axvcpu_tests::machine::{CR0_ET, CR0_MP, CR0_NE, CR0_PE, CR0_PG, CR0_WP, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_PAE};
use axvcpu_tests::machine::{EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE, FLAGS};
use axvcpu_uapi::client::Memory;
use axvcpu_uapi::x86::{Control, DescriptorTable, General, Segment, Segments, RSP};

/// Size of the RAM at address 0.
pub(crate) const RAM_SIZE: usize = 2 << 20;
/// The loop.
pub(crate) const CODE: u64 = 0x1000;
/// Handler of [`VECTOR`].
pub(crate) const INTERRUPT: u64 = 0x1800;
/// Handler of #GP.
pub(crate) const FAULT: u64 = 0x1900;
const GDT: u64 = 0x2000;
const IDT: u64 = 0x3000;
/// Top of the stack of vCPU 0; that of vCPU 1 is a page above.
pub(crate) const STACK: u64 = 0x9000;
const TSS: u64 = 0x4000;
const TABLES: u64 = 0x1_0000;
/// Memory by pages of 4 KiB.
pub(crate) const SMALL: u64 = 0x0800_0000;
/// Memory by pages of 2 MiB.
pub(crate) const HUGE: u64 = 0x1000_0000;
/// No memory.
pub(crate) const MMIO: u64 = 0x3000_0000;

/// The vector that interrupts use.
pub(crate) const VECTOR: u8 = 0x40;
/// Vector of #GP.
const GENERAL_PROTECTION: u8 = 13;
/// The port that ends a loop.
pub(crate) const DONE: u16 = 0xf4;

/// An instruction that does nothing.
pub(crate) const NOP: &[u8] = &[0x90];

/// `before`, `body` until R15 is zero, and `after`.
pub(crate) fn assemble(before: &[u8], body: &[u8], after: &[u8]) -> Vec<u8> {
    let mut code = before.to_vec();
    code.extend(body);
    code.extend([0x49, 0xff, 0xcf]); // dec r15
    let back = -(body.len() as i32 + 3 + 6);
    code.extend([0x0f, 0x85]); // jnz
    code.extend(back.to_le_bytes());
    code.extend(after);
    code.extend([0xe6, DONE as u8]); // out DONE, al
    code
}

/// Stores tables and handlers.
///
/// # Errors
/// None that memory of [`RAM_SIZE`] could cause.
pub(crate) fn prepare(ram: &Memory) -> axvcpu_uapi::client::Result<()> {
    let word = |at: u64, value: u64| ram.write_u64(at as usize, value);
    // Descriptors as in APM vol. 2 section 4.7, at the selectors of axvcpu_tests::machine: null, 32-bit code, data, 64-bit
    // code, TSS.
    let descriptors =
        [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00af_9b00_0000_ffff, 0x0000_8b00_0000_0067 | TSS << 16, 0];
    for (at, descriptor) in (GDT..).step_by(8).zip(descriptors) {
        word(at, descriptor)?;
    }
    for (vector, handler) in [(VECTOR, INTERRUPT), (GENERAL_PROTECTION, FAULT)] {
        // A present interrupt gate (APM vol. 2 section 4.8.4); handlers are below 64 KiB.
        word(IDT + 16 * u64::from(vector), handler | u64::from(CODE64) << 16 | 0x8e00 << 32)?;
    }
    word(TABLES, (TABLES + 0x1000) | 7)?;
    word(TABLES + 0x1000, (TABLES + 0x2000) | 7)?;
    for page in 0..512 {
        // Accessed and dirty already, so that the CPU has nothing to write there: P, RW, US, A, D, PS.
        word(TABLES + 0x2000 + 8 * page, page << 21 | 0xe7)?;
    }
    ram.write(INTERRUPT as usize, interrupt_handler())?;
    ram.write(FAULT as usize, axvcpu_tests::code!(fault, 64, "add rsp, 8", "add qword ptr [rsp], 2", "iretq"))
}

/// Instructions of the handler of [`VECTOR`].
pub(crate) const INTERRUPT_INSTRUCTIONS: usize = 6;
/// Instructions of the handler of #GP.
pub(crate) const FAULT_INSTRUCTIONS: usize = 3;

/// Tells the local APIC, in x2APIC mode, and R14.
fn interrupt_handler() -> &'static [u8] {
    axvcpu_tests::code!(interrupt, 64, "mov ecx, 0x80b", "xor eax, eax", "xor edx, edx", "wrmsr", "inc r14", "iretq")
}

/// Control registers: long mode, over what the vCPU has of the rest.
pub(crate) fn control(old: Control) -> Control {
    Control {
        cr0: CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG,
        cr3: TABLES,
        cr4: CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT,
        efer: EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE,
        ..old
    }
}

/// Segments.
pub(crate) fn segments() -> Segments {
    let data = flat_segment(FLAT, 0xc93);
    Segments {
        es: data,
        cs: flat_segment(CODE64, 0xa9b),
        ss: data,
        ds: data,
        fs: data,
        gs: data,
        ldtr: Segment::default(),
        tr: Segment { base: TSS, limit: 0x67, selector: TASK, attributes: 0x8b },
        gdtr: DescriptorTable { base: GDT, limit: 0x2f, ..DescriptorTable::default() },
        idtr: DescriptorTable { base: IDT, limit: 0xfff, ..DescriptorTable::default() },
    }
}

/// General registers at the start of `turns` turns of the loop on vCPU `id`. Interrupts are off.
pub(crate) fn general(id: u32, turns: u64) -> General {
    let mut general = General { rip: CODE, rflags: FLAGS, ..General::default() };
    general.gpr[RSP] = STACK + 0x1000 * u64::from(id);
    general.gpr[15] = turns;
    general
}
