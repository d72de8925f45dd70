// SPDX-License-Identifier: MIT OR Apache-2.0
//! Linear memory: checked ranges (spans) of up to 16 bytes, and reads and writes on them.
//!
//! A span is made first, with all checks and translations, and used afterwards; using it cannot fault any more.

use super::state::{mask, rflags, seg};
use super::{Bus, Exception, Exec, Stop};
use crate::x86::paging::{bits, translate, Access, WalkError};
use axvcpu_uapi::addr::{GuestPhysAddr, GuestVirtAddr};

/// Spans are cut at multiples of this; larger pages need no distinction, since their parts are contiguous.
pub(super) const PAGE: u64 = 4096;

/// The widest operand: 128 bits.
pub(super) const MAX_OPERAND: usize = 16;

/// CR0.AM: alignment checks at CPL 3.
const CR0_AM: u64 = 1 << 18;

/// A translated operand: `length` bytes, of which the first `split` lie at `first` and the others at `second`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    first: GuestPhysAddr,
    second: GuestPhysAddr,
    split: usize,
    length: usize,
}

impl Span {
    /// Whether it starts at a multiple of `alignment`, a power of two of at most a page.
    pub(super) fn is_aligned(&self, alignment: usize) -> bool {
        self.first.as_u64() % alignment as u64 == 0
    }
}

impl<B: Bus> Exec<'_, B> {
    /// `address` if it is canonical for the current paging depth (APM volume 2, section 5.3.1).
    pub(super) fn canonical(&self, address: u64) -> Option<GuestVirtAddr> {
        let unused = if self.cpu.cr4 & bits::CR4_LA57 != 0 { 64 - 57 } else { 64 - 48 };
        (((address << unused) as i64 >> unused) as u64 == address).then_some(GuestVirtAddr::new(address))
    }

    /// Linear addresses outside 64-bit mode have 32 bits.
    pub(super) fn wrap(&self, address: u64) -> GuestVirtAddr {
        GuestVirtAddr::new(if self.cpu.is_64bit() { address } else { address & mask(4) })
    }

    /// Translates one address, turning a failed walk into the guest's #PF.
    pub(super) fn translate(&mut self, linear: GuestVirtAddr, access: Access) -> Result<GuestPhysAddr, Stop<B::Error>> {
        let state = self.paging();
        match translate(&state, self.bus, linear, access) {
            Ok(translation) => Ok(translation.gpa),
            Err(WalkError::PageFault { code }) => Err(Exception::PageFault { address: linear, code }.into()),
            Err(WalkError::Memory(error)) => Err(Stop::Bus(error)),
        }
    }

    /// Checks `length` bytes at `offset` in segment `segment` for `access`, and translates them.
    pub(super) fn span(
        &mut self,
        segment: usize,
        offset: u64,
        length: usize,
        access: Access,
    ) -> Result<Span, Stop<B::Error>> {
        let linear = self.check_segment(segment, offset, length, access)?;
        let checks_alignment = self.cpu.cpl == 3 && self.cpu.cr0 & CR0_AM != 0 && self.cpu.rflags & rflags::AC != 0;
        if checks_alignment && matches!(length, 2 | 4 | 8) && linear.as_u64() % length as u64 != 0 {
            return Err(Exception::Alignment.into());
        }
        let split = length.min((PAGE - linear.as_u64() % PAGE) as usize);
        let first = self.translate(linear, access)?;
        let second = if split < length {
            let next = self.wrap(linear.as_u64().wrapping_add(split as u64));
            self.translate(next, access)?
        } else {
            first
        };
        Ok(Span { first, second, split, length })
    }

    /// Segment rules (APM volume 2, sections 4.7 and 4.12), giving the linear address.
    fn check_segment(
        &self,
        index: usize,
        offset: u64,
        length: usize,
        access: Access,
    ) -> Result<GuestVirtAddr, Exception> {
        let violation = if index == seg::SS { Exception::Stack } else { Exception::GeneralProtection };
        let segment = self.cpu.segments.get(index).ok_or(violation)?;
        let reach = length as u64 - 1;
        if self.cpu.is_64bit() {
            let base = if matches!(index, seg::FS | seg::GS) { segment.base } else { 0 };
            let linear = base.wrapping_add(offset);
            self.canonical(linear.wrapping_add(reach)).ok_or(violation)?;
            return self.canonical(linear).ok_or(violation);
        }

        let attributes = segment.attributes;
        let code = attributes & seg::CODE != 0;
        if !self.cpu.is_real_or_v86() {
            if attributes & seg::PRESENT == 0 {
                return Err(violation);
            }
            let allowed = match access {
                Access::Write => !code && attributes & seg::READ_WRITE != 0,
                Access::Read => !code || attributes & seg::READ_WRITE != 0,
                Access::Execute => code,
            };
            if !allowed {
                return Err(Exception::GeneralProtection);
            }
        }
        let last = offset + reach;
        let limit = u64::from(segment.limit);
        let inside = if !code && attributes & seg::EXPAND_DOWN != 0 {
            let top = if attributes & seg::BIG != 0 { mask(4) } else { mask(2) };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        if !inside {
            return Err(violation);
        }
        Ok(self.wrap(segment.base.wrapping_add(offset)))
    }

    /// Reads the span into the first bytes of `data`, which is at least as long.
    pub(super) fn read(&mut self, span: &Span, data: &mut [u8; MAX_OPERAND]) -> Result<(), Stop<B::Error>> {
        let (low, high) = data[..span.length].split_at_mut(span.split);
        let whole = high.is_empty();
        self.read_part(span.first, low, whole)?;
        if !whole {
            self.read_part(span.second, high, false)?;
        }
        Ok(())
    }

    /// Writes the first bytes of `data` to the span.
    pub(super) fn write(&mut self, span: &Span, data: &[u8; MAX_OPERAND]) -> Result<(), Stop<B::Error>> {
        let (low, high) = data[..span.length].split_at(span.split);
        let whole = high.is_empty();
        self.write_part(span.first, low, whole)?;
        if !whole {
            self.write_part(span.second, high, false)?;
        }
        Ok(())
    }

    /// Reads a span of at most 8 bytes as a number.
    pub(super) fn read_value(&mut self, span: &Span) -> Result<u64, Stop<B::Error>> {
        let mut data = [0; MAX_OPERAND];
        self.read(span, &mut data)?;
        Ok(low_half(&data))
    }

    /// Writes the low bytes of `value` to a span of at most 8 bytes.
    pub(super) fn write_value(&mut self, span: &Span, value: u64) -> Result<(), Stop<B::Error>> {
        let mut data = [0; MAX_OPERAND];
        data[..8].copy_from_slice(&value.to_le_bytes());
        self.write(span, &data)
    }

    /// Replaces `old` by `new` in a span of at most 8 bytes on behalf of a locked instruction: atomically in RAM if
    /// it is aligned, and only if `old` is still there.
    pub(super) fn exchange(&mut self, span: &Span, old: u64, new: u64) -> Result<(), Stop<B::Error>> {
        let atomic = matches!(span.length, 1 | 2 | 4 | 8) && span.first.as_u64() % span.length as u64 == 0;
        if !atomic || !self.bus.is_ram(span.first, true) {
            return self.write_value(span, new);
        }
        let keep = mask(span.length);
        if self.bus.compare_exchange(span.first, span.length, old & keep, new & keep).map_err(Stop::Bus)? {
            Ok(())
        } else {
            Err(Stop::Raced)
        }
    }

    fn read_part(&mut self, at: GuestPhysAddr, data: &mut [u8], whole: bool) -> Result<(), Stop<B::Error>> {
        if self.bus.is_ram(at, false) {
            return self.bus.read(at, data).map_err(Stop::Bus);
        }
        let mut done = 0;
        while done < data.len() {
            let here = GuestPhysAddr::new(at.as_u64() + done as u64);
            let end = done + device_piece(here, data.len() - done, whole);
            self.bus.mmio_read(here, &mut data[done..end]).map_err(Stop::Bus)?;
            done = end;
        }
        Ok(())
    }

    fn write_part(&mut self, at: GuestPhysAddr, data: &[u8], whole: bool) -> Result<(), Stop<B::Error>> {
        if self.bus.is_ram(at, true) {
            return self.bus.write(at, data).map_err(Stop::Bus);
        }
        let mut done = 0;
        while done < data.len() {
            let here = GuestPhysAddr::new(at.as_u64() + done as u64);
            let end = done + device_piece(here, data.len() - done, whole);
            self.bus.mmio_write(here, &data[done..end]).map_err(Stop::Bus)?;
            done = end;
        }
        Ok(())
    }
}

/// The low 8 bytes as a number.
pub(super) fn low_half(data: &[u8; MAX_OPERAND]) -> u64 {
    u128::from_le_bytes(*data) as u64
}

/// The size of the next device access of `left` bytes at `at`: all of it, at most 8, for an operand that stays in its
/// page (`whole`); else the largest naturally aligned one.
fn device_piece(at: GuestPhysAddr, left: usize, whole: bool) -> usize {
    if whole {
        return left.min(8);
    }
    [8, 4, 2].into_iter().find(|&size| size <= left && at.as_u64() % size as u64 == 0).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_pieces_of_a_crossing_access_are_naturally_aligned() {
        let cut = |mut at: u64, mut left: usize| {
            let mut sizes = Vec::new();
            while left > 0 {
                let size = device_piece(GuestPhysAddr::new(at), left, false);
                sizes.push(size);
                at += size as u64;
                left -= size;
            }
            sizes
        };
        assert_eq!(cut(0xffd, 3), [1, 2]);
        assert_eq!(cut(0x1000, 7), [4, 2, 1]);
        assert_eq!(cut(0xff1, 15), [1, 2, 4, 8]);
    }

    #[test]
    fn device_pieces_of_a_contained_access_are_the_operand() {
        assert_eq!(device_piece(GuestPhysAddr::new(0x1003), 4, true), 4);
        assert_eq!(device_piece(GuestPhysAddr::new(0x1003), 16, true), 8);
    }
}
