// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the cases of the local APIC share: a machine with its handlers, and guest code that writes MSRs.

use crate::harness::Stop;
use crate::machine::{Machine, Mode, CODE};
use axvcpu_uapi::client::Apic;
use axvcpu_uapi::x86::LocalApic;

/// Address of a message to APIC id 0.
pub(super) const MSI: u64 = 0xfee0_0000;
/// The register for the spurious vector, which enables the APIC.
const SVR: u32 = 0xf0;

/// A machine with APIC enabled, and a handler for vector 0x40 at CODE + 0x100 and for 0x60 at CODE + 0x180. Interrupts
/// are as the code sets them.
pub(super) fn machine(code: &[u8]) -> Result<Machine, Stop> {
    let mut m = Machine::with(Mode::Long, code, Apic::InKernel)?;
    m.vector(0x40, CODE + 0x100)?;
    m.vector(0x60, CODE + 0x180)?;
    m.vcpu.apic_access(SVR, Some(0x1ff))?;
    Ok(m)
}

/// The same at its first mark, OUT 0x80.
pub(super) fn started(code: &[u8]) -> Result<Machine, Stop> {
    let mut m = machine(code)?;
    m.expect_mark(0x80)?;
    Ok(m)
}

/// The register at `offset` of the xAPIC page, in either mode.
pub(super) fn register(m: &Machine, offset: usize) -> Result<u32, Stop> {
    Ok(m.vcpu.get::<LocalApic>()?.regs[offset / 16])
}

/// Code with `write msr, value`, which changes RAX, RCX and RDX, and `eoi`, the end of interrupt in x2APIC mode from a handler,
/// which keeps them. `handler offset, port` is a handler at that offset, which tells AL and ends the interrupt; one that is
/// `watched offset, port, after` tells before and after.
macro_rules! apic_code {
    ($name:ident, $($line:literal),+ $(,)?) => {
        $crate::code!(
            $name,
            64,
            ".macro write msr, value",
            "mov ecx, \\msr",
            "mov eax, \\value",
            "xor edx, edx",
            "wrmsr",
            ".endm",
            ".macro eoi",
            "push rax; push rcx; push rdx",
            "write 0x80b, 0",
            "pop rdx; pop rcx; pop rax",
            ".endm",
            ".macro handler offset, port",
            ".org 77b + \\offset",
            "out \\port, al",
            "eoi",
            "iretq",
            ".endm",
            ".macro watched offset, port, after",
            ".org 77b + \\offset",
            "out \\port, al",
            "eoi",
            "out \\after, al",
            "iretq",
            ".endm",
            $($line,)+
            ".purgem write",
            ".purgem eoi",
            ".purgem handler",
            ".purgem watched",
        )
    };
}
pub(super) use apic_code;

/// The same, which first switches to x2APIC mode: IA32_APIC_BASE with both enable bits.
macro_rules! x2apic_code {
    ($name:ident, $($line:literal),+ $(,)?) => {
        $crate::guests::x2apic::apic_code!(
            $name,
            "mov ecx, 0x1b",
            "rdmsr",
            "or eax, 0xc00",
            "wrmsr",
            $($line,)+
        )
    };
}
pub(super) use x2apic_code;
