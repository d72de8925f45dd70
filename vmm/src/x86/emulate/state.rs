// SPDX-License-Identifier: MIT OR Apache-2.0
//! The CPU state an instruction works on, and access to its registers by decoder name.

use axvcpu_uapi::x86::{Control, General, Segment, Segments};
use iced_x86::Register;

use crate::x86::paging::bits;

/// RFLAGS bits (APM volume 2, section 3.1.6).
pub mod rflags {
    /// Carry.
    pub const CF: u64 = 1 << 0;
    /// Even parity of the low result byte.
    pub const PF: u64 = 1 << 2;
    /// Carry out of bit 3.
    pub const AF: u64 = 1 << 4;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Sign.
    pub const SF: u64 = 1 << 7;
    /// Single-step trap.
    pub const TF: u64 = 1 << 8;
    /// String instructions go downwards.
    pub const DF: u64 = 1 << 10;
    /// Overflow.
    pub const OF: u64 = 1 << 11;
    /// Resume: suppresses instruction breakpoints for one instruction.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment check, and SMAP override.
    pub const AC: u64 = 1 << 18;
}

/// Segment attribute bits, and indices into [`CpuState::segments`].
///
/// The attributes are packed as in the VMCB and in [`axvcpu_uapi::x86::Segment`] (APM volume 2, section 15.5.1): bits
/// 55:52 and 47:40 of the descriptor put together.
pub mod seg {
    /// Type bit: accessed.
    pub const ACCESSED: u16 = 1 << 0;
    /// Type bit: writable data, or readable code.
    pub const READ_WRITE: u16 = 1 << 1;
    /// Type bit: expand-down data, or conforming code.
    pub const EXPAND_DOWN: u16 = 1 << 2;
    /// Type bit: code.
    pub const CODE: u16 = 1 << 3;
    /// Code or data rather than a system segment.
    pub const NON_SYSTEM: u16 = 1 << 4;
    /// Present; clear for a null segment.
    pub const PRESENT: u16 = 1 << 7;
    /// 64-bit code.
    pub const LONG: u16 = 1 << 9;
    /// 32-bit default size (code), 32-bit stack pointer (stack), 4 GiB upper bound (expand-down).
    pub const BIG: u16 = 1 << 10;
    /// The limit was given in pages; `Segment::limit` is in bytes all the same.
    pub const GRANULAR: u16 = 1 << 11;

    /// Index of ES.
    pub const ES: usize = 0;
    /// Index of CS.
    pub const CS: usize = 1;
    /// Index of SS.
    pub const SS: usize = 2;
    /// Index of DS.
    pub const DS: usize = 3;
    /// Index of FS.
    pub const FS: usize = 4;
    /// Index of GS.
    pub const GS: usize = 5;
}

/// What an instruction can see and change, except memory and vector registers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuState {
    /// General registers in hardware order: rax rcx rdx rbx rsp rbp rsi rdi r8 to r15.
    pub gpr: [u64; 16],
    /// Instruction pointer, an offset in CS.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// Segment registers in hardware order, by the indices in [`seg`]: es cs ss ds fs gs.
    pub segments: [Segment; 6],
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// Current privilege level, 0 to 3.
    pub cpl: u8,
}

impl CpuState {
    /// The state in the register sets of `/dev/axvcpu`.
    ///
    /// The privilege level is 0 in real mode, 3 in virtual-8086 mode, else SS.DPL, to which processors keep it equal,
    /// with one exception: SYSRET on AMD leaves the DPL alone. Whoever knows better (the run page tells user mode)
    /// sets [`CpuState::cpl`] afterwards.
    #[must_use]
    pub fn from_registers(general: &General, segments: &Segments, control: &Control) -> Self {
        let cpl = if general.rflags & rflags::VM != 0 {
            3
        } else if control.cr0 & bits::CR0_PE == 0 {
            0
        } else {
            (segments.ss.attributes >> 5 & 3) as u8
        };
        CpuState {
            gpr: general.gpr,
            rip: general.rip,
            rflags: general.rflags,
            segments: [segments.es, segments.cs, segments.ss, segments.ds, segments.fs, segments.gs],
            cr0: control.cr0,
            cr3: control.cr3,
            cr4: control.cr4,
            efer: control.efer,
            cpl,
        }
    }

    /// The general registers, to be written back after an instruction. (Segment registers change only when real-mode
    /// code loads one; control registers never do.)
    #[must_use]
    pub fn general(&self) -> General {
        General { gpr: self.gpr, rip: self.rip, rflags: self.rflags }
    }

    /// Whether the CPU executes 64-bit code.
    #[must_use]
    pub fn is_64bit(&self) -> bool {
        self.efer & bits::EFER_LMA != 0 && self.segments[seg::CS].attributes & seg::LONG != 0
    }

    /// Whether segments are base and limit only: real and virtual-8086 mode.
    pub(super) fn is_real_or_v86(&self) -> bool {
        self.cr0 & bits::CR0_PE == 0 || self.rflags & rflags::VM != 0
    }

    /// Default operand and address size of the code segment in bits: 16, 32 or 64. The hidden D bit counts in real
    /// mode, too: it survives the clearing of CR0.PE until CS is loaded.
    pub(super) fn code_bits(&self) -> u32 {
        if self.is_64bit() {
            64
        } else if self.rflags & rflags::VM == 0 && self.segments[seg::CS].attributes & seg::BIG != 0 {
            32
        } else {
            16
        }
    }

    /// Width in bytes of the stack pointer: 2, 4 or 8.
    pub(super) fn stack_width(&self) -> usize {
        if self.is_64bit() {
            8
        } else if self.segments[seg::SS].attributes & seg::BIG != 0 {
            4
        } else {
            2
        }
    }

    /// The value of a general or segment register, zero-extended. `None` for any other register.
    pub(super) fn read(&self, register: Register) -> Option<u64> {
        if register.is_segment_register() {
            return self.segments.get(register.number()).map(|s| s.selector.into());
        }
        read_register(&self.gpr, register)
    }

    /// Sets a general register. Writes of 32 bits clear the upper half, narrower ones keep the rest (APM volume 1,
    /// section 3.1.2). `None` for any other register.
    pub(super) fn write(&mut self, register: Register, value: u64) -> Option<()> {
        write_register(&mut self.gpr, register, value)
    }

    /// Sets register number `index` as a register of `width` bytes (2, 4 or 8).
    pub(super) fn write_sized(&mut self, index: usize, width: usize, value: u64) {
        if let Some(full) = self.gpr.get_mut(index) {
            *full = match width {
                2 => (*full & !0xffff) | (value & 0xffff),
                4 => value & 0xffff_ffff,
                _ => value,
            };
        }
    }

    /// Sets the flags in `which` to those in `value`.
    pub(super) fn set_flags(&mut self, which: u64, value: u64) {
        self.rflags = (self.rflags & !which) | (value & which);
    }
}

/// The value of a general register in `gpr`, zero-extended. `None` for any other register.
pub(super) fn read_register(gpr: &[u64; 16], register: Register) -> Option<u64> {
    if !register.is_gpr() {
        return None;
    }
    let full = gpr.get(register.full_register().number())?;
    Some(match register {
        Register::AH | Register::CH | Register::DH | Register::BH => (full >> 8) & 0xff,
        _ => full & mask(register.size()),
    })
}

/// Sets a general register in `gpr`: see [`CpuState::write`].
pub(super) fn write_register(gpr: &mut [u64; 16], register: Register, value: u64) -> Option<()> {
    if !register.is_gpr() {
        return None;
    }
    let full = gpr.get_mut(register.full_register().number())?;
    let (field, shift) = match register {
        Register::AH | Register::CH | Register::DH | Register::BH => (0xff00, 8),
        _ if register.size() == 4 => (u64::MAX, 0),
        _ => (mask(register.size()), 0),
    };
    let value = if register.size() == 4 { value & mask(4) } else { value };
    *full = (*full & !field) | ((value << shift) & field);
    Some(())
}

/// The low `bytes` bytes set (0 to 8).
pub(super) fn mask(bytes: usize) -> u64 {
    match bytes {
        0 => 0,
        1..=7 => (1 << (8 * bytes)) - 1,
        _ => u64::MAX,
    }
}

/// Sign-extends the low `bytes` bytes of `value` to 64 bits.
pub(super) fn sign_extend(value: u64, bytes: usize) -> u64 {
    let shift = 64 - 8 * bytes.clamp(1, 8) as u32;
    (((value << shift) as i64) >> shift) as u64
}
