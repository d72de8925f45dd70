// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Bits of the registers that the crate has to do with one by one; [`Limits`] says which of them a vCPU can have.

mod limits;

pub(crate) use limits::{check_debug, Limits};

/// Bits of CR0.
pub(crate) mod cr0 {
    pub(crate) const PE: u64 = 1 << 0;
    pub(crate) const MP: u64 = 1 << 1;
    pub(crate) const EM: u64 = 1 << 2;
    pub(crate) const TS: u64 = 1 << 3;
    pub(crate) const ET: u64 = 1 << 4;
    pub(crate) const NE: u64 = 1 << 5;
    pub(crate) const WP: u64 = 1 << 16;
    pub(crate) const AM: u64 = 1 << 18;
    pub(crate) const NW: u64 = 1 << 29;
    pub(crate) const CD: u64 = 1 << 30;
    pub(crate) const PG: u64 = 1 << 31;
    /// Bits whose change makes cached translations wrong.
    pub(crate) const TRANSLATION: u64 = PE | WP | PG;
    /// Every bit that has a meaning.
    pub(crate) const DEFINED: u64 = PE | MP | EM | TS | ET | NE | WP | AM | NW | CD | PG;
}

/// Bits of CR4 that the crate has to do with one by one; which of them a guest can have is a matter of its CPUID.
pub(crate) mod cr4 {
    pub(crate) const PSE: u64 = 1 << 4;
    pub(crate) const PAE: u64 = 1 << 5;
    pub(crate) const PGE: u64 = 1 << 7;
    pub(crate) const LA57: u64 = 1 << 12;
    pub(crate) const PCIDE: u64 = 1 << 17;
    pub(crate) const OSXSAVE: u64 = 1 << 18;
    pub(crate) const SMEP: u64 = 1 << 20;
    pub(crate) const SMAP: u64 = 1 << 21;
    pub(crate) const PKE: u64 = 1 << 22;
    /// Bits whose change makes cached translations wrong (APM vol. 2 section 5.5.2).
    pub(crate) const TRANSLATION: u64 = PSE | PAE | PGE | LA57 | PCIDE | SMEP | SMAP | PKE;
}

/// Bits of EFER.
pub(crate) mod efer {
    pub(crate) const SCE: u64 = 1 << 0;
    pub(crate) const LME: u64 = 1 << 8;
    pub(crate) const LMA: u64 = 1 << 10;
    #[cfg(test)]
    pub(crate) const NXE: u64 = 1 << 11;
    /// Set for the hardware, hidden from the guest.
    pub(crate) const SVME: u64 = 1 << 12;
}

/// Bits of RFLAGS.
pub(crate) mod rflags {
    pub(crate) const FIXED: u64 = 1 << 1;
    pub(crate) const TF: u64 = 1 << 8;
    pub(crate) const IF: u64 = 1 << 9;
    pub(crate) const RF: u64 = 1 << 16;
    pub(crate) const VM: u64 = 1 << 17;
    /// Every bit that has a meaning: 1, CF, PF, AF, ZF, SF, TF, IF, DF, OF, IOPL, NT, RF, VM, AC, VIF, VIP, ID.
    pub(crate) const DEFINED: u64 = 0x3f_7fd7;
}

/// Virtual-8086 mode does not exist in long mode (APM vol. 2 section 3.1.6); VM entry of other CPUs refuses it.
pub(crate) const fn virtual_8086_in_long_mode(flags: u64, efer: u64) -> bool {
    flags & rflags::VM != 0 && efer & efer::LMA != 0
}

/// Bits of a segment's attributes.
pub(crate) mod segment {
    pub(crate) const TYPE: u16 = 0xf;
    pub(crate) const S: u16 = 1 << 4;
    pub(crate) const DPL_SHIFT: u32 = 5;
    pub(crate) const P: u16 = 1 << 7;
    pub(crate) const L: u16 = 1 << 9;
    pub(crate) const DB: u16 = 1 << 10;
    pub(crate) const G: u16 = 1 << 11;
    /// Every bit that has a meaning.
    pub(crate) const DEFINED: u16 = 0xfff;
}

/// Bits of DR6 that read as one (APM vol. 2 section 13.1.1.3).
pub(crate) const DR6_FIXED: u64 = 0xffff_0ff0;
/// DR6.BS: single step.
pub(crate) const DR6_BS: u64 = 1 << 14;
/// Bits of DR6 that can be set or clear: B0-B3, BD, BS, BT.
pub(crate) const DR6_VOLATILE: u64 = 0xe00f;
/// The bit of DR7 that reads as one.
pub(crate) const DR7_FIXED: u64 = 1 << 10;
/// DR7.GD: accesses to debug registers raise #DB.
pub(crate) const DR7_GD: u64 = 1 << 13;
/// Enable bits of the four breakpoints in DR7.
pub(crate) const DR7_ENABLES: u64 = 0xff;

/// Bits of XCR0.
pub(crate) mod xcr0 {
    pub(crate) const X87: u64 = 1 << 0;
    pub(crate) const SSE: u64 = 1 << 1;
    pub(crate) const AVX: u64 = 1 << 2;
    /// Opmask, ZMM_Hi256, Hi16_ZMM: all or none.
    pub(crate) const AVX512: u64 = 7 << 5;
    pub(crate) const PKRU: u64 = 1 << 9;
    /// What guests can be given: user state that is saved and loaded by XSAVE alone.
    pub(crate) const OFFERED: u64 = X87 | SSE | AVX | AVX512 | PKRU;
}

/// The CPL that goes with these attributes of SS: their DPL, which the hardware keeps equal to it.
pub(crate) fn privilege(stack: u16) -> u8 {
    (stack >> segment::DPL_SHIFT & 3) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn privilege_is_that_of_the_stack() {
        assert_eq!(privilege(0xc93), 0);
        assert_eq!(privilege(0xc93 | 3 << segment::DPL_SHIFT), 3);
    }
}
