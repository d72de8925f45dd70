// SPDX-License-Identifier: MIT OR Apache-2.0
//! ELF kernels: reading both classes, and loading segments.
//!
//! linux-loader's reader is not used: it knows no 32-bit files and no machine but x86, and forgets a PVH note that another
//! note segment follows.

use super::{ImageError, Loader};

/// The first bytes of every ELF file.
pub(crate) const MAGIC: &[u8] = b"\x7fELF";

const ET_REL: u16 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const ET_CORE: u16 = 4;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
/// Machine: x86, 32 bits.
pub(crate) const EM_386: u16 = 3;
/// Machine: x86-64.
pub(crate) const EM_X86_64: u16 = 62;
/// Machine: AArch64.
pub(crate) const EM_AARCH64: u16 = 183;

/// Machines by their numbers, for people.
const MACHINES: [(u16, &str); 10] = [
    (EM_386, "32-bit x86"),
    (8, "MIPS"),
    (20, "PowerPC"),
    (21, "PowerPC"),
    (22, "S/390"),
    (40, "32-bit Arm"),
    (EM_X86_64, "x86-64"),
    (EM_AARCH64, "arm64"),
    (243, "RISC-V"),
    (258, "LoongArch"),
];

/// A parsed ELF file.
#[derive(Debug)]
pub(crate) struct Elf<'a> {
    image: &'a [u8],
    is_64: bool,
    kind: u16,
    entry: u64,
    /// The program headers, in their order.
    pub(crate) segments: Vec<Segment>,
}

/// A program header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// `PT_*`.
    pub(crate) kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    file_size: u64,
    memory_size: u64,
}

/// Little-endian fields at offsets, `None` past the end.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    fn get<const N: usize>(self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..at.checked_add(N)?)?.try_into().ok()
    }
    fn u16(self, at: usize) -> Option<u16> {
        self.get(at).map(u16::from_le_bytes)
    }
    pub(crate) fn u32(self, at: usize) -> Option<u32> {
        self.get(at).map(u32::from_le_bytes)
    }
    pub(crate) fn u64(self, at: usize) -> Option<u64> {
        self.get(at).map(u64::from_le_bytes)
    }
    /// An address or size: 32 or 64 bits wide.
    fn word(self, at: usize, is_64: bool) -> Option<u64> {
        if is_64 {
            self.u64(at)
        } else {
            self.u32(at).map(u64::from)
        }
    }
}

impl<'a> Elf<'a> {
    /// Parses headers and program headers of a file for one of `machines`.
    ///
    /// # Errors
    /// What the file is instead, in words that follow "it is".
    pub(crate) fn parse(image: &'a [u8], machines: &[u16]) -> Result<Self, String> {
        if !image.starts_with(MAGIC) {
            return Err("no ELF file".into());
        }
        let is_64 = match image.get(4) {
            Some(1) => false,
            Some(2) => true,
            _ => return Err("a damaged ELF file (unknown class)".into()),
        };
        if image.get(5) == Some(&2) {
            return Err("an ELF file for a big-endian machine".into());
        }
        Self::parse_fields(image, is_64, machines).unwrap_or_else(|| Err("a damaged ELF file (cut off)".into()))
    }

    /// `None` if a header lies beyond the end of the file.
    fn parse_fields(image: &'a [u8], is_64: bool, machines: &[u16]) -> Option<Result<Self, String>> {
        let fields = Fields(image);
        let machine = fields.u16(18)?;
        if !machines.contains(&machine) {
            let known = MACHINES.iter().find(|(number, _)| *number == machine);
            let name = known.map_or_else(|| format!("machine number {machine}"), |(_, name)| (*name).into());
            return Some(Err(format!("an ELF file for another machine, {name}")));
        }
        let (at, entry_size, count) = if is_64 {
            (fields.u64(32)?, fields.u16(54)?, fields.u16(56)?)
        } else {
            (fields.u32(28)?.into(), fields.u16(42)?, fields.u16(44)?)
        };
        let mut segments = Vec::new();
        for i in 0..u64::from(count) {
            let at = at.checked_add(i.checked_mul(entry_size.into())?)?;
            let header = Fields(image.get(usize::try_from(at).ok()?..)?);
            let word = |index: usize| header.word(if is_64 { 8 * index } else { 4 * index }, is_64);
            // 64-bit headers have the flags behind the type, 32-bit ones nearly last; the rest is in one order.
            let segment = Segment {
                kind: header.u32(0)?,
                offset: word(1)?,
                vaddr: word(2)?,
                paddr: word(3)?,
                file_size: word(4)?,
                memory_size: word(5)?,
            };
            segments.push(segment);
        }
        Some(Ok(Self { image, is_64, kind: fields.u16(16)?, entry: fields.word(24, is_64)?, segments }))
    }

    fn loads(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|segment| segment.kind == PT_LOAD && segment.memory_size > 0)
    }

    /// A 64-bit executable that is no program for an operating system.
    pub(crate) fn is_bootable_64(&self) -> bool {
        let interpreted = self.segments.iter().any(|segment| segment.kind == PT_INTERP);
        self.is_64 && self.kind == ET_EXEC && !interpreted && self.loads().next().is_some()
    }

    /// What a file that is not bootable is, and the cure.
    pub(crate) fn describe(&self) -> (String, String) {
        let what = match self.kind {
            ET_REL => "an ELF object file (a module or an unlinked program)",
            ET_DYN => "an ELF program or library for an operating system (position-independent)",
            ET_CORE => "an ELF core dump",
            ET_EXEC if self.loads().next().is_none() => "an ELF file without anything to load",
            ET_EXEC if self.is_64 => "an ELF program for an operating system",
            ET_EXEC => "a 32-bit ELF file without PVH note or multiboot header",
            _ => "an ELF file of unknown type",
        };
        (what.into(), String::new())
    }

    /// What the file has of a segment; `None` if it is cut off.
    pub(crate) fn data(&self, segment: &Segment) -> Option<&'a [u8]> {
        let start = usize::try_from(segment.offset).ok()?;
        self.image.get(start..start.checked_add(usize::try_from(segment.file_size).ok()?)?)
    }

    /// The physical address of the entry point. Kernels linked high name a virtual address.
    pub(crate) fn physical_entry(&self) -> u64 {
        let inside = |start: u64, segment: &Segment| {
            self.entry.checked_sub(start).filter(|offset| *offset < segment.memory_size)
        };
        if self.loads().any(|segment| inside(segment.paddr, segment).is_some()) {
            return self.entry;
        }
        self.loads()
            .find_map(|segment| inside(segment.vaddr, segment).and_then(|offset| segment.paddr.checked_add(offset)))
            .unwrap_or(self.entry)
    }
}

impl<A> Loader<'_, A> {
    /// Copies the segments to their physical addresses and returns the address behind the last.
    pub(crate) fn load_segments(&mut self, elf: &Elf<'_>) -> Result<u64, ImageError> {
        let mut end = 0;
        for segment in elf.loads() {
            let Some(data) = elf.data(segment) else {
                return Err(self.malformed("ELF file", "a segment lies beyond its end; was it cut off?"));
            };
            if data.len() as u64 > segment.memory_size {
                return Err(self.malformed("ELF file", "a segment is larger in the file than in memory"));
            }
            self.claim("the kernel", segment.paddr, segment.memory_size)?;
            self.write(segment.paddr, data)?;
            end = end.max(segment.paddr + segment.memory_size);
        }
        Ok(end)
    }
}
