// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loads and stores of A64, from the instruction's word to what is moved between which registers and which bytes (Arm ARM
//! C4.1, "Loads and Stores"). Pure: it knows nothing of a guest.
//!
//! Exclusive and atomic instructions are recognised and refused: no device does what they promise.

/// A load or store, as far as its word tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// Whether it writes memory.
    pub store: bool,
    /// Whether it has the rights of EL0 at EL1, too.
    pub unprivileged: bool,
    /// What its address begins with.
    pub base: Base,
    /// What is added to that.
    pub offset: Offset,
    /// What the base register becomes more by, if it changes.
    pub writeback: Option<Offset>,
    /// What is moved, in the order in which memory is accessed.
    pub pieces: Vec<Piece>,
    /// Of a load: vector registers, as bits, that are zero but for what is loaded.
    pub clears: u32,
}

/// What an address begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// A general register; 31 is the stack pointer.
    Register(u8),
    /// The instruction's own address.
    Pc,
    /// A general register's value, 31 being zero, rounded down to a multiple of this power of two.
    Block(u8, u64),
}

/// A distance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offset {
    /// This many bytes.
    Fixed(i64),
    /// A general register, 31 being zero, extended and shifted to the left.
    Register {
        /// Its number.
        reg: u8,
        /// How many of its low bits count: 32 or 64.
        bits: u8,
        /// Whether they have a sign.
        signed: bool,
        /// The shift.
        shift: u8,
    },
}

/// A part of a load or store, of 1, 2, 4 or 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it is, from the address on.
    pub offset: u64,
    /// Its bytes.
    pub size: u8,
    /// What is loaded from there, or stored.
    pub place: Place,
}

/// Where a piece goes to or comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Zeros, for a store.
    Zero,
    /// A general register, 31 being zero.
    General(u8, Extend),
    /// A vector register.
    Vector {
        /// Its number.
        reg: u8,
        /// The first of its bytes, a multiple of the piece's size.
        byte: u8,
        /// How many copies a load makes, one behind the other.
        copies: u8,
    },
}

/// What becomes of the rest of a general register that is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extend {
    /// Zero.
    Zero,
    /// The sign up to bit 31, and zero above.
    Sign32,
    /// The sign.
    Sign64,
}

/// Why an instruction is not decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is one of a pair by which CPUs agree.
    #[error("it is a load or store exclusive, which needs memory")]
    Exclusive,
    /// It reads and writes at once.
    #[error("it is an atomic read and write, which needs memory")]
    Atomic,
    /// Constrained unpredictable.
    #[error("it loads or changes the same register twice, with an unpredictable result")]
    Unpredictable,
    /// No load or store of the base architecture or its SIMD extension.
    #[error("it is no load or store that is emulated")]
    Unknown,
}

/// What a decoder of one form makes of a word.
type Decoder = fn(Fields) -> Result<Access, Refused>;

/// Encodings by pattern, the first that fits decides. Arm ARM C4.1 has them in this order.
const FORMS: &[(Pattern, Decoder)] = &[
    (pattern("0.00 1100 0.00 0000 .... .... .... ...."), structures),
    (pattern("0.00 1100 1.0. .... .... .... .... ...."), structures),
    (pattern("0.00 1101 0..0 0000 .... .... .... ...."), lanes),
    (pattern("0.00 1101 1... .... .... .... .... ...."), lanes),
    // LDAR, STLR and those of limited order.
    (pattern("..00 1000 1.01 1111 .111 11.. .... ...."), ordered),
    (pattern("..00 1000 1.1. .... .111 11.. .... ...."), |_| Err(Refused::Atomic)),
    (pattern("0.00 1000 0.1. .... .111 11.. .... ...."), |_| Err(Refused::Atomic)),
    (pattern("..00 1000 0... .... .... .... .... ...."), |_| Err(Refused::Exclusive)),
    (pattern("..01 1.00 .... .... .... .... .... ...."), literal),
    // LDAPUR and STLUR.
    (pattern("..01 1001 ..0. .... .... 00.. .... ...."), unscaled),
    (pattern("..10 1.0. .... .... .... .... .... ...."), pair),
    (pattern("..11 1.00 ..0. .... .... 00.. .... ...."), unscaled),
    (pattern("..11 1.00 ..0. .... .... 01.. .... ...."), post_indexed),
    // LDTR and STTR.
    (pattern("..11 1000 ..0. .... .... 10.. .... ...."), unprivileged),
    (pattern("..11 1.00 ..0. .... .... 11.. .... ...."), pre_indexed),
    // LDAPR.
    (pattern("..11 1000 1011 1111 1100 00.. .... ...."), ordered),
    (pattern("..11 1000 ..1. .... .... 00.. .... ...."), |_| Err(Refused::Atomic)),
    (pattern("..11 1.00 ..1. .... .... 10.. .... ...."), register_offset),
    (pattern("..11 1.01 .... .... .... .... .... ...."), unsigned_offset),
];
/// DC ZVA, which is a system instruction (Arm ARM C5.3).
const DC_ZVA: Pattern = pattern("1101 0101 0000 1011 0111 0100 001. ....");

/// What an instruction's word means. `zero_block` is the size of the block that DC ZVA zeroes, in bytes, if it may.
///
/// # Errors
/// Why it is not decoded.
pub fn decode(word: u32, zero_block: Option<u64>) -> Result<Access, Refused> {
    let fields = Fields(word);
    if let (true, Some(size)) = (DC_ZVA.fits(word), zero_block) {
        let pieces = (0..size / 8).map(|i| Piece { offset: 8 * i, size: 8, place: Place::Zero }).collect();
        let base = Base::Block(fields.rt(), size);
        let offset = Offset::Fixed(0);
        return Ok(Access { store: true, unprivileged: false, base, offset, writeback: None, pieces, clears: 0 });
    }
    let form = FORMS.iter().find(|(pattern, _)| pattern.fits(word));
    form.map_or(Err(Refused::Unknown), |(_, decoder)| decoder(fields))
}

/// Bits that an encoding fixes.
#[derive(Clone, Copy)]
struct Pattern {
    mask: u32,
    value: u32,
}

impl Pattern {
    const fn fits(self, word: u32) -> bool {
        word & self.mask == self.value
    }
}

/// A pattern of 32 bits, the highest first: `0`, `1`, or `.` for either; spaces mean nothing.
const fn pattern(text: &str) -> Pattern {
    let (text, mut i, mut bits) = (text.as_bytes(), 0, 0);
    let (mut mask, mut value) = (0u32, 0u32);
    while i < text.len() {
        if text[i] != b' ' {
            assert!(matches!(text[i], b'0' | b'1' | b'.'), "a pattern is made of 0, 1 and .");
            mask = mask << 1 | (text[i] != b'.') as u32;
            value = value << 1 | (text[i] == b'1') as u32;
            bits += 1;
        }
        i += 1;
    }
    assert!(bits == 32, "a pattern has 32 bits");
    Pattern { mask, value }
}

/// An instruction's word.
#[derive(Clone, Copy)]
struct Fields(u32);

impl Fields {
    /// `count` bits from bit `low` on.
    const fn bits(self, low: u32, count: u32) -> u32 {
        self.0 >> low & ((1 << count) - 1)
    }

    const fn bit(self, at: u32) -> bool {
        self.bits(at, 1) != 0
    }

    /// The same, with a sign.
    const fn signed(self, low: u32, count: u32) -> i64 {
        let unused = 64 - count;
        (self.bits(low, count) as i64) << unused >> unused
    }

    const fn rt(self) -> u8 {
        self.bits(0, 5) as u8
    }

    const fn rn(self) -> u8 {
        self.bits(5, 5) as u8
    }

    /// The base register.
    const fn base(self) -> Base {
        Base::Register(self.rn())
    }

    /// Of most loads and stores: whether they are of vector registers.
    const fn is_vector(self) -> bool {
        self.bit(26)
    }
}

/// Registers that are moved to or from consecutive bytes.
struct Transfer {
    store: bool,
    /// Bytes of each register.
    size: u8,
    /// How general registers are extended; `None` of vector registers.
    extend: Option<Extend>,
}

impl Transfer {
    /// Of one register: by the fields `size` in bits 31:30, V in bit 26, and `opc` in bits 23:22.
    fn single(fields: Fields) -> Result<Self, Refused> {
        let (size, opc) = (fields.bits(30, 2), fields.bits(22, 2));
        let bytes = 1u8 << size;
        Ok(match (fields.is_vector(), opc) {
            (true, 0 | 1) => Self { store: opc == 0, size: bytes, extend: None },
            (true, _) if size == 0 => Self { store: opc == 2, size: 16, extend: None },
            (false, 0 | 1) => Self { store: opc == 0, size: bytes, extend: Some(Extend::Zero) },
            (false, 2) if size < 3 => Self { store: false, size: bytes, extend: Some(Extend::Sign64) },
            (false, 3) if size < 2 => Self { store: false, size: bytes, extend: Some(Extend::Sign32) },
            // Prefetches, which never fault, and what is not allocated.
            _ => return Err(Refused::Unknown),
        })
    }

    fn access(
        &self,
        base: Base,
        offset: Offset,
        writeback: Option<Offset>,
        registers: &[u8],
    ) -> Result<Access, Refused> {
        // Arm ARM K1.2: with writeback, a general base register must be none of those that are moved; a pair that is loaded must
        // be two registers.
        let same = |reg: &u8| self.extend.is_some() && *reg != 31 && base == Base::Register(*reg);
        let twice = !self.store && matches!(registers, [a, b] if a == b);
        if twice || writeback.is_some() && registers.iter().any(same) {
            return Err(Refused::Unpredictable);
        }
        let (mut pieces, mut clears) = (Vec::new(), 0);
        for (i, reg) in (0..).zip(registers.iter().copied()) {
            let start = i * u64::from(self.size);
            match self.extend {
                Some(extend) => {
                    pieces.push(Piece { offset: start, size: self.size, place: Place::General(reg, extend) });
                }
                None => {
                    let size = self.size.min(8);
                    pieces.extend((0..self.size / size).map(|half| Piece {
                        offset: start + u64::from(half * size),
                        size,
                        place: Place::Vector { reg, byte: half * size, copies: 1 },
                    }));
                    clears |= 1 << reg;
                }
            }
        }
        let (store, clears) = (self.store, if self.store { 0 } else { clears });
        Ok(Access { store, unprivileged: false, base, offset, writeback, pieces, clears })
    }
}

/// One register, at an address that does not change.
fn at(fields: Fields, offset: Offset) -> Result<Access, Refused> {
    Transfer::single(fields)?.access(fields.base(), offset, None, &[fields.rt()])
}

/// Bits 20:12, in bytes.
fn imm9(fields: Fields) -> Offset {
    Offset::Fixed(fields.signed(12, 9))
}

fn unscaled(fields: Fields) -> Result<Access, Refused> {
    at(fields, imm9(fields))
}

fn unprivileged(fields: Fields) -> Result<Access, Refused> {
    Ok(Access { unprivileged: true, ..unscaled(fields)? })
}

fn post_indexed(fields: Fields) -> Result<Access, Refused> {
    let transfer = Transfer::single(fields)?;
    transfer.access(fields.base(), Offset::Fixed(0), Some(imm9(fields)), &[fields.rt()])
}

fn pre_indexed(fields: Fields) -> Result<Access, Refused> {
    let transfer = Transfer::single(fields)?;
    transfer.access(fields.base(), imm9(fields), Some(imm9(fields)), &[fields.rt()])
}

fn unsigned_offset(fields: Fields) -> Result<Access, Refused> {
    let size = Transfer::single(fields)?.size;
    at(fields, Offset::Fixed(i64::from(fields.bits(10, 12)) * i64::from(size)))
}

fn register_offset(fields: Fields) -> Result<Access, Refused> {
    let size = Transfer::single(fields)?.size;
    let (bits, signed) = match fields.bits(13, 3) {
        0b010 => (32, false),
        0b011 | 0b111 => (64, false),
        0b110 => (32, true),
        _ => return Err(Refused::Unknown),
    };
    let shift = if fields.bit(12) { size.trailing_zeros() as u8 } else { 0 };
    at(fields, Offset::Register { reg: fields.bits(16, 5) as u8, bits, signed, shift })
}

/// One general register of `size` in bits 31:30, to be accessed before or after others. (This CPU accesses devices one at a
/// time, and memory by atomic words.)
fn ordered(fields: Fields) -> Result<Access, Refused> {
    // LDAPR, among the atomic instructions, has no such bit.
    let load = fields.bit(22) || fields.bit(28) && fields.bit(29);
    let transfer = Transfer { store: !load, size: 1 << fields.bits(30, 2), extend: Some(Extend::Zero) };
    transfer.access(fields.base(), Offset::Fixed(0), None, &[fields.rt()])
}

fn literal(fields: Fields) -> Result<Access, Refused> {
    let (size, extend) = match (fields.is_vector(), fields.bits(30, 2)) {
        (true, opc @ 0..=2) => (4 << opc, None),
        (false, opc @ 0..=1) => (4 << opc, Some(Extend::Zero)),
        (false, 2) => (4, Some(Extend::Sign64)),
        _ => return Err(Refused::Unknown),
    };
    let offset = Offset::Fixed(fields.signed(5, 19) * 4);
    Transfer { store: false, size, extend }.access(Base::Pc, offset, None, &[fields.rt()])
}

fn pair(fields: Fields) -> Result<Access, Refused> {
    let (load, mode) = (fields.bit(22), fields.bits(23, 2));
    let (size, extend) = match (fields.is_vector(), fields.bits(30, 2)) {
        (true, opc @ 0..=2) => (4 << opc, None),
        (false, 0) => (4, Some(Extend::Zero)),
        // LDPSW, which has no form without a hint of its reuse.
        (false, 1) if load && mode != 0 => (4, Some(Extend::Sign64)),
        (false, 2) => (8, Some(Extend::Zero)),
        _ => return Err(Refused::Unknown),
    };
    let distance = Offset::Fixed(fields.signed(15, 7) * i64::from(size));
    let (offset, writeback) = match mode {
        0b01 => (Offset::Fixed(0), Some(distance)),
        0b11 => (distance, Some(distance)),
        _ => (distance, None),
    };
    let registers = [fields.rt(), fields.bits(10, 5) as u8];
    Transfer { store: !load, size, extend }.access(fields.base(), offset, writeback, &registers)
}

/// The access of SIMD structures with these pieces: bit 23 says whether the base register changes, by their size or by a
/// register.
fn structure(fields: Fields, pieces: Vec<Piece>, clears: u32) -> Access {
    let size = pieces.iter().map(|piece| i64::from(piece.size)).sum();
    let writeback = fields.bit(23).then(|| match fields.bits(16, 5) as u8 {
        31 => Offset::Fixed(size),
        reg => Offset::Register { reg, bits: 64, signed: false, shift: 0 },
    });
    let store = !fields.bit(22);
    let clears = if store { 0 } else { clears };
    let (base, offset) = (fields.base(), Offset::Fixed(0));
    Access { store, unprivileged: false, base, offset, writeback, pieces, clears }
}

/// LD1 to LD4 and ST1 to ST4 of whole registers.
fn structures(fields: Fields) -> Result<Access, Refused> {
    // How often; and of how many registers each structure has an element.
    let (repeats, elements) = match fields.bits(12, 4) {
        0b0000 => (1, 4),
        0b0010 => (4, 1),
        0b0100 => (1, 3),
        0b0110 => (3, 1),
        0b0111 => (1, 1),
        0b1000 => (1, 2),
        0b1010 => (2, 1),
        _ => return Err(Refused::Unknown),
    };
    let (scale, whole) = (fields.bits(10, 2), fields.bit(30));
    if scale == 3 && !whole && elements > 1 {
        return Err(Refused::Unknown);
    }
    let size = 1u8 << scale;
    let lanes = if whole { 16 } else { 8 } / size;
    let (mut pieces, mut clears) = (Vec::new(), 0);
    for repeat in 0..repeats {
        for lane in 0..lanes {
            for element in 0..elements {
                let reg = (fields.rt() + repeat + element) % 32;
                let offset = pieces.len() as u64 * u64::from(size);
                pieces.push(Piece { offset, size, place: Place::Vector { reg, byte: lane * size, copies: 1 } });
                clears |= 1 << reg;
            }
        }
    }
    Ok(structure(fields, pieces, clears))
}

/// LD1 to LD4 and ST1 to ST4 of one lane, and LD1R to LD4R to all lanes.
fn lanes(fields: Fields) -> Result<Access, Refused> {
    let load = fields.bit(22);
    // `opcode`, S and `size` (Arm ARM C7.2, "LD1 (single structure)"): which lane, and of which size.
    let (s, low, whole) = (fields.bit(12), fields.bits(10, 2), fields.bit(30));
    let number = u32::from(whole) << 3 | u32::from(s) << 2 | low;
    let (scale, lane, all) = match (fields.bits(14, 2), low) {
        (0, _) => (0, number, false),
        (1, 0 | 2) => (1, number >> 1, false),
        (2, 0) => (2, number >> 2, false),
        (2, 1) if !s => (3, number >> 3, false),
        (3, _) if load && !s => (low, 0, true),
        _ => return Err(Refused::Unknown),
    };
    let size = 1u8 << scale;
    let copies = match (all, whole) {
        (false, _) => 1,
        (true, false) => 8 / size,
        (true, true) => 16 / size,
    };
    let elements = (fields.bits(13, 1) << 1 | fields.bits(21, 1)) as u8 + 1;
    let (mut pieces, mut clears) = (Vec::new(), 0);
    for element in 0..elements {
        let reg = (fields.rt() + element) % 32;
        let offset = u64::from(element * size);
        pieces.push(Piece { offset, size, place: Place::Vector { reg, byte: lane as u8 * size, copies } });
        clears |= if all { 1 << reg } else { 0 };
    }
    Ok(structure(fields, pieces, clears))
}
