// SPDX-License-Identifier: MIT OR Apache-2.0
//! The plain moves, decoded: those of 64-bit code between a general register, or a constant, and memory. They are nearly all
//! that a driver does to a device, so that a VMM whose guest does nothing else need not have the tables of the decoder for
//! everything else in memory, half a MiB. Whatever is unusual about an instruction is left to that one. What this one says is
//! what that one would: the tests compare them.

use axvcpu_uapi::client::Brief;
use axvcpu_uapi::x86::General;
use iced_x86::Register;

use super::state::{mask, read_register};

/// A move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plain {
    /// Bytes of the instruction.
    pub(super) length: usize,
    /// Where the memory is.
    pub(super) operand: Operand,
    /// Bytes of it: 1, 2, 4 or 8.
    pub(super) width: usize,
    /// What is done.
    pub(super) action: Action,
}

/// What is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// From memory to a register.
    Load {
        /// The register.
        to: Register,
        /// Whether it gets the sign in all its bits.
        sign_extends: bool,
    },
    /// From a register.
    Store(Register),
    /// A constant.
    StoreConstant(u64),
}

/// How the operand's address is put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operand {
    /// FS, GS, or `None` for those whose base is 0 in 64-bit code.
    pub(super) segment: Register,
    pub(super) base: Register,
    pub(super) index: Register,
    pub(super) scale: u64,
    /// Of an operand relative to RIP it is the target.
    pub(super) displacement: u64,
    /// Of the offset.
    pub(super) mask: u64,
}

impl Operand {
    /// The linear address.
    pub(super) fn address(&self, general: &General, brief: &Brief) -> u64 {
        let value = |register| read_register(&general.gpr, register).unwrap_or(0);
        let offset = value(self.base).wrapping_add(value(self.index).wrapping_mul(self.scale));
        let offset = offset.wrapping_add(self.displacement) & self.mask;
        match self.segment {
            Register::FS => brief.fs_base.wrapping_add(offset),
            Register::GS => brief.gs_base.wrapping_add(offset),
            _ => offset,
        }
    }
}

/// Prefixes (APM volume 3, section 1.2).
#[derive(Clone, Copy, Debug, Default)]
struct Prefixes {
    operand_size: bool,
    address_size: bool,
    segment: Register,
    /// The low four bits of REX (W, R, X, B), if there is one.
    rex: Option<u8>,
}

impl Prefixes {
    fn has(&self, bit: u8) -> bool {
        self.rex.is_some_and(|rex| rex & bit != 0)
    }

    /// What a bit of REX adds to the number of a register.
    fn high(&self, bit: u8) -> u8 {
        u8::from(self.has(bit)) << 3
    }

    /// Bytes of an operand that is not a single byte.
    fn operand_width(&self) -> usize {
        match (self.has(REX_W), self.operand_size) {
            (true, _) => 8,
            (false, true) => 2,
            (false, false) => 4,
        }
    }

    /// The general register of `width` bytes with that number. Without REX the single bytes 4 to 7 are AH to BH.
    fn register(&self, number: u8, width: usize) -> Register {
        let first = match width {
            1 if self.rex.is_none() || number < 4 => Register::AL,
            // SPL comes behind the eight that there were before 64-bit code.
            1 => return Register::SPL + u32::from(number - 4),
            2 => Register::AX,
            4 => Register::EAX,
            _ => Register::RAX,
        };
        first + u32::from(number)
    }
}

const REX_W: u8 = 8;
const REX_R: u8 = 4;
const REX_X: u8 = 2;
const REX_B: u8 = 1;

/// Bytes that are taken one after the other.
struct Bytes<'a> {
    all: &'a [u8],
    next: usize,
}

impl Bytes<'_> {
    fn byte(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let array = self.all.get(self.next..)?.first_chunk()?;
        self.next += N;
        Some(*array)
    }

    /// A displacement or constant of four bytes, with its sign.
    fn signed(&mut self) -> Option<u64> {
        self.array().map(|bytes| i64::from(i32::from_le_bytes(bytes)) as u64)
    }

    fn signed_byte(&mut self) -> Option<u64> {
        self.byte().map(|byte| i64::from(byte as i8) as u64)
    }
}

/// Decodes the instruction of 64-bit code that begins `bytes`, at `rip`, if it is a plain move and they are all of it.
pub(super) fn decode(bytes: &[u8], rip: u64) -> Option<Plain> {
    let mut bytes = Bytes { all: bytes, next: 0 };
    let (prefixes, opcode) = prefixes(&mut bytes)?;
    let wide = prefixes.operand_width();
    let (width, action) = match opcode {
        0x88 | 0x8a | 0xc6 | 0xa0 | 0xa2 => (1, opcode),
        0x89 | 0x8b | 0xc7 | 0xa1 | 0xa3 => (wide, opcode),
        // MOVSXD as compilers write it.
        0x63 if prefixes.has(REX_W) => (4, opcode),
        0x0f => match bytes.byte()? {
            second @ (0xb6 | 0xbe) => (1, second),
            second @ (0xb7 | 0xbf) => (2, second),
            _ => return None,
        },
        _ => return None,
    };
    let offset_follows = (0xa0..=0xa3).contains(&opcode);
    let (number, operand, relative) =
        if offset_follows { (0, absolute(&mut bytes, &prefixes)?, false) } else { modrm(&mut bytes, &prefixes)? };
    let action = match action {
        0x8a | 0x8b | 0xa0 | 0xa1 => Action::Load { to: prefixes.register(number, width), sign_extends: false },
        0xb6 | 0xb7 => Action::Load { to: prefixes.register(number, wide), sign_extends: false },
        0xbe | 0xbf | 0x63 => Action::Load { to: prefixes.register(number, wide), sign_extends: true },
        0x88 | 0x89 | 0xa2 | 0xa3 => Action::Store(prefixes.register(number, width)),
        // Of C6 and C7 other numbers than 0 are other instructions. REX.R is ignored.
        _ if number & 7 != 0 => return None,
        _ => Action::StoreConstant(match width {
            1 => bytes.byte()?.into(),
            2 => u16::from_le_bytes(bytes.array()?).into(),
            _ => bytes.signed()? & mask(width),
        }),
    };
    let length = bytes.next;
    let displacement = if relative {
        rip.wrapping_add(length as u64).wrapping_add(operand.displacement)
    } else {
        operand.displacement
    };
    Some(Plain { length, operand: Operand { displacement: displacement & operand.mask, ..operand }, width, action })
}

/// Prefixes, each at most once, and the opcode behind them.
fn prefixes(bytes: &mut Bytes<'_>) -> Option<(Prefixes, u8)> {
    let mut prefixes = Prefixes::default();
    loop {
        match bytes.byte()? {
            0x66 if !prefixes.operand_size => prefixes.operand_size = true,
            0x67 if !prefixes.address_size => prefixes.address_size = true,
            0x64 if prefixes.segment == Register::None => prefixes.segment = Register::FS,
            0x65 if prefixes.segment == Register::None => prefixes.segment = Register::GS,
            rex @ 0x40..=0x4f => {
                prefixes.rex = Some(rex & 0xf);
                return Some((prefixes, bytes.byte()?));
            }
            opcode => return Some((prefixes, opcode)),
        }
    }
}

/// An operand without registers: eight bytes follow, or four.
fn absolute(bytes: &mut Bytes<'_>, prefixes: &Prefixes) -> Option<Operand> {
    let displacement = if prefixes.address_size {
        u32::from_le_bytes(bytes.array()?).into()
    } else {
        u64::from_le_bytes(bytes.array()?)
    };
    Some(Operand { displacement, ..nowhere(prefixes) })
}

/// An operand at 0.
fn nowhere(prefixes: &Prefixes) -> Operand {
    Operand {
        segment: prefixes.segment,
        base: Register::None,
        index: Register::None,
        scale: 1,
        displacement: 0,
        mask: mask(if prefixes.address_size { 4 } else { 8 }),
    }
}

/// ModRM, SIB and displacement (APM volume 3, section 1.4), of an operand in memory: the number of the register, or the
/// opcode's extension; the operand; whether it is relative to the next instruction's RIP.
fn modrm(bytes: &mut Bytes<'_>, prefixes: &Prefixes) -> Option<(u8, Operand, bool)> {
    /// In `rm`: a SIB byte follows. In its index: there is none.
    const SIB: u8 = 4;
    /// In `rm` or as a base, without displacement: four bytes of displacement in place of a register.
    const DISPLACED: u8 = 5;
    let modrm = bytes.byte()?;
    let (mode, rm) = (modrm >> 6, modrm & 7);
    if mode == 3 {
        return None;
    }
    let address = |number| prefixes.register(number, if prefixes.address_size { 4 } else { 8 });
    let mut operand = nowhere(prefixes);
    let mut base = rm;
    if rm == SIB {
        let sib = bytes.byte()?;
        base = sib & 7;
        let index = sib >> 3 & 7 | prefixes.high(REX_X);
        if index != SIB {
            operand.index = address(index);
            operand.scale = 1 << (sib >> 6);
        }
    }
    let relative = mode == 0 && rm == DISPLACED;
    if mode != 0 || base != DISPLACED {
        operand.base = address(base | prefixes.high(REX_B));
    }
    operand.displacement = match mode {
        0 if base == DISPLACED => bytes.signed()?,
        1 => bytes.signed_byte()?,
        2 => bytes.signed()?,
        _ => 0,
    };
    Some((modrm >> 3 & 7 | prefixes.high(REX_R), operand, relative))
}
