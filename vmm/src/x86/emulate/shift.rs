// SPDX-License-Identifier: MIT OR Apache-2.0
//! Shifts and rotates as pure functions (APM volume 3, chapter 3).

use super::alu::{result_flags, top_bit, when};
use super::state::mask;
use super::state::rflags::{AF, CF, OF, PF, SF, ZF};

/// Which shift.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shift {
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    Sar,
}

/// A shifted value, and those flags the shift writes (`written`) with their values (`flags`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shifted {
    pub(super) value: u64,
    pub(super) written: u64,
    pub(super) flags: u64,
}

/// The count as the processor takes it: modulo 64 for 8-byte operands, else modulo 32.
pub(super) fn masked_count(count: u64, width: usize) -> u32 {
    (count & if width == 8 { 63 } else { 31 }) as u32
}

/// Shifts `value` of `width` bytes by `count` (already masked); `carry` is CF before. A count of 0 changes nothing.
pub(super) fn shift(kind: Shift, value: u64, count: u32, carry: bool, width: usize) -> Shifted {
    let value = value & mask(width);
    if count == 0 {
        return Shifted { value, written: 0, flags: 0 };
    }
    let (result, carry_out) = match kind {
        Shift::Rol | Shift::Ror => rotate(kind, value, count, width),
        Shift::Rcl | Shift::Rcr => rotate_through_carry(kind, value, count, carry, width),
        Shift::Shl => shift_left(value, count, width),
        Shift::Shr => (wide_right(value.into(), count) as u64, wide_right(value.into(), count - 1) & 1 != 0),
        Shift::Sar => {
            let signed = if top_bit(value, width) { i128::from(value) - (1 << (8 * width)) } else { value.into() };
            (((signed >> count) as u64) & mask(width), (signed >> (count - 1)) & 1 != 0)
        }
    };
    // OF is defined for counts of 1 only; processors compute it the same way for the others.
    let overflow = match kind {
        Shift::Rol | Shift::Rcl | Shift::Shl => top_bit(result, width) != carry_out,
        Shift::Ror | Shift::Rcr => top_bit(result, width) != top_bit(result << 1, width),
        Shift::Shr => top_bit(value, width),
        Shift::Sar => false,
    };
    let outcome = when(carry_out, CF) | when(overflow, OF);
    match kind {
        Shift::Rol | Shift::Ror | Shift::Rcl | Shift::Rcr => {
            Shifted { value: result, written: CF | OF, flags: outcome }
        }
        Shift::Shl | Shift::Shr | Shift::Sar => Shifted {
            value: result,
            written: CF | OF | PF | AF | ZF | SF,
            flags: outcome | result_flags(result, width),
        },
    }
}

/// SHLD (`left`) and SHRD: shifts `value`, filling from `filler`.
pub(super) fn double(left: bool, value: u64, filler: u64, count: u32, width: usize) -> Shifted {
    let bits = 8 * width as u32;
    let (value, filler) = (value & mask(width), filler & mask(width));
    if count == 0 {
        return Shifted { value, written: 0, flags: 0 };
    }
    // A 16-bit shift by more than 16 bits is undefined; processors go on with the first operand after the second.
    let (first, second, count) = if count > bits { (filler, value, count - bits) } else { (value, filler, count) };
    let (result, carry) = if left {
        let joined = u128::from(first) << bits | u128::from(second);
        (wide_right(joined, bits - count), wide_right(joined, 2 * bits - count))
    } else {
        let joined = u128::from(second) << bits | u128::from(first);
        (wide_right(joined, count), wide_right(joined, count - 1))
    };
    let (result, carry) = (result as u64 & mask(width), carry & 1 != 0);
    let overflow = top_bit(result, width) != top_bit(value, width);
    Shifted {
        value: result,
        written: CF | OF | PF | AF | ZF | SF,
        flags: result_flags(result, width) | when(carry, CF) | when(overflow, OF),
    }
}

fn wide_right(value: u128, count: u32) -> u128 {
    value.checked_shr(count).unwrap_or(0)
}

fn shift_left(value: u64, count: u32, width: usize) -> (u64, bool) {
    let wide = u128::from(value) << count;
    (wide as u64 & mask(width), wide >> (8 * width) & 1 != 0)
}

fn rotate(kind: Shift, value: u64, count: u32, width: usize) -> (u64, bool) {
    let bits = 8 * width as u32;
    let left = if kind == Shift::Rol { count % bits } else { (bits - count % bits) % bits };
    let doubled = u128::from(value) << bits | u128::from(value);
    let result = wide_right(doubled, bits - left) as u64 & mask(width);
    let carry = if kind == Shift::Rol { result & 1 != 0 } else { top_bit(result, width) };
    (result, carry)
}

/// Rotation of the bits + 1 wide register CF:value.
fn rotate_through_carry(kind: Shift, value: u64, count: u32, carry: bool, width: usize) -> (u64, bool) {
    let bits = 8 * width as u32;
    let register = u128::from(carry) << bits | u128::from(value);
    let count = count % (bits + 1);
    let left = if kind == Shift::Rcl { count } else { (bits + 1 - count) % (bits + 1) };
    let all = (1u128 << (bits + 1)) - 1;
    let result = if left == 0 { register } else { (register << left | register >> (bits + 1 - left)) & all };
    (result as u64 & mask(width), result >> bits & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_of_zero_leaves_value_and_flags() {
        for kind in [Shift::Rol, Shift::Ror, Shift::Rcl, Shift::Rcr, Shift::Shl, Shift::Shr, Shift::Sar] {
            assert_eq!(shift(kind, 0x81, 0, true, 1), Shifted { value: 0x81, written: 0, flags: 0 });
        }
        assert_eq!(masked_count(0x40, 8), 0);
        assert_eq!(masked_count(0x3f, 4), 31);
    }

    #[test]
    fn shifts_by_one() {
        let by_one = |kind, value, carry| {
            let out = shift(kind, value, 1, carry, 1);
            (out.value, out.flags & (CF | OF))
        };
        assert_eq!(by_one(Shift::Shl, 0x81, false), (0x02, CF | OF));
        assert_eq!(by_one(Shift::Shr, 0x81, false), (0x40, CF | OF));
        assert_eq!(by_one(Shift::Sar, 0x81, false), (0xc0, CF));
        assert_eq!(by_one(Shift::Rol, 0x81, false), (0x03, CF | OF));
        assert_eq!(by_one(Shift::Ror, 0x81, false), (0xc0, CF));
        assert_eq!(by_one(Shift::Rcl, 0x01, true), (0x03, 0));
        assert_eq!(by_one(Shift::Rcr, 0x01, true), (0x80, CF | OF));
    }

    #[test]
    fn double_shifts_fill_from_the_other_operand() {
        assert_eq!(double(true, 0x1234, 0xabcd, 4, 2).value, 0x234a);
        assert_eq!(double(false, 0x1234, 0xabcd, 4, 2).value, 0xd123);
        assert_eq!(double(true, 1 << 63, u64::MAX, 1, 8).value, 1);
        assert_eq!(double(true, 1 << 63, u64::MAX, 1, 8).flags & (CF | OF), CF | OF);
    }
}
