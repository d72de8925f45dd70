// SPDX-License-Identifier: MIT OR Apache-2.0
//! Integer results and their flags, as pure functions of operands of 1, 2, 4 or 8 bytes.
//!
//! Operands may have set bits above their width; results do not. Flags that the manuals leave undefined come out
//! clear (APM volume 3, appendix on instruction effects on RFLAGS).

use super::state::rflags::{AF, CF, OF, PF, SF, ZF};
use super::state::{mask, sign_extend};

/// All six arithmetic flags.
pub(super) const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;

/// A result and the arithmetic flags it sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Computed {
    pub(super) value: u64,
    pub(super) flags: u64,
}

/// PF, ZF and SF of a result.
pub(super) fn result_flags(value: u64, width: usize) -> u64 {
    let value = value & mask(width);
    let mut flags = 0;
    if (value as u8).count_ones() % 2 == 0 {
        flags |= PF;
    }
    if value == 0 {
        flags |= ZF;
    }
    if top_bit(value, width) {
        flags |= SF;
    }
    flags
}

/// The sign bit of a value of `width` bytes.
pub(super) fn top_bit(value: u64, width: usize) -> bool {
    value >> (8 * width - 1) & 1 != 0
}

/// `flag` if `condition` holds, else nothing.
pub(super) fn when(condition: bool, flag: u64) -> u64 {
    if condition {
        flag
    } else {
        0
    }
}

/// `a + b + carry`.
pub(super) fn add(a: u64, b: u64, carry: bool, width: usize) -> Computed {
    let value = a.wrapping_add(b).wrapping_add(carry.into());
    let carries = (a & b) | ((a | b) & !value);
    let overflow = (a ^ value) & (b ^ value);
    Computed { value: value & mask(width), flags: sum_flags(value, carries, overflow, width) }
}

/// `a - b - borrow`.
pub(super) fn sub(a: u64, b: u64, borrow: bool, width: usize) -> Computed {
    let value = a.wrapping_sub(b).wrapping_sub(borrow.into());
    let borrows = (!a & b) | ((!a | b) & value);
    let overflow = (a ^ b) & (a ^ value);
    Computed { value: value & mask(width), flags: sum_flags(value, borrows, overflow, width) }
}

/// Flags of a sum or difference from its carry-out and overflow vectors (bit n: out of bit n).
fn sum_flags(value: u64, carries: u64, overflow: u64, width: usize) -> u64 {
    result_flags(value, width)
        | when(top_bit(carries, width), CF)
        | when(carries & 8 != 0, AF)
        | when(top_bit(overflow, width), OF)
}

/// AND, OR, XOR and TEST: `value` is the result already.
pub(super) fn logic(value: u64, width: usize) -> Computed {
    Computed { value: value & mask(width), flags: result_flags(value, width) }
}

/// The low half of the signed product; CF and OF tell that the high half is more than its sign.
pub(super) fn imul(a: u64, b: u64, width: usize) -> Computed {
    let (low, high) = imul_wide(a, b, width);
    let sign = if top_bit(low, width) { mask(width) } else { 0 };
    Computed { value: low, flags: when(high != sign, CF | OF) }
}

/// Low and high halves of the signed product.
pub(super) fn imul_wide(a: u64, b: u64, width: usize) -> (u64, u64) {
    let product = i128::from(sign_extend(a, width) as i64) * i128::from(sign_extend(b, width) as i64);
    (product as u64 & mask(width), (product >> (8 * width)) as u64 & mask(width))
}

/// Low and high halves of the unsigned product.
pub(super) fn mul_wide(a: u64, b: u64, width: usize) -> (u64, u64) {
    let product = u128::from(a & mask(width)) * u128::from(b & mask(width));
    (product as u64 & mask(width), (product >> (8 * width)) as u64 & mask(width))
}

/// Unsigned `high:low / divisor`: quotient and remainder, or `None` for #DE.
pub(super) fn div(low: u64, high: u64, divisor: u64, width: usize) -> Option<(u64, u64)> {
    let divisor = u128::from(divisor & mask(width));
    let dividend = u128::from(high & mask(width)) << (8 * width) | u128::from(low & mask(width));
    let quotient = dividend.checked_div(divisor)?;
    (quotient <= u128::from(mask(width))).then_some((quotient as u64, (dividend % divisor) as u64))
}

/// Signed `high:low / divisor`, truncating: quotient and remainder, or `None` for #DE.
pub(super) fn idiv(low: u64, high: u64, divisor: u64, width: usize) -> Option<(u64, u64)> {
    let divisor = i128::from(sign_extend(divisor, width) as i64);
    let high = i128::from(sign_extend(high, width) as i64);
    let dividend = (high << (8 * width)) | i128::from(low & mask(width));
    let quotient = dividend.checked_div(divisor)?;
    let remainder = dividend.checked_rem(divisor)?;
    let fits = i128::from(sign_extend(quotient as u64, width) as i64) == quotient;
    fits.then_some((quotient as u64 & mask(width), remainder as u64 & mask(width)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carries_and_overflows_at_each_width() {
        for width in [1, 2, 4, 8] {
            let max = mask(width);
            let top = 1 << (8 * width - 1);
            assert_eq!(add(max, 1, false, width), Computed { value: 0, flags: CF | PF | AF | ZF });
            assert_eq!(add(max, 0, true, width), Computed { value: 0, flags: CF | PF | AF | ZF });
            assert_eq!(add(top - 1, 1, false, width).flags & (OF | SF | CF), OF | SF);
            assert_eq!(add(top, top, false, width).flags & (OF | SF | CF | ZF), OF | CF | ZF);
            assert_eq!(sub(0, 1, false, width), Computed { value: max, flags: CF | PF | AF | SF });
            assert_eq!(sub(0, max, true, width), Computed { value: 0, flags: CF | PF | AF | ZF });
            assert_eq!(sub(top, 1, false, width).flags & (OF | SF | CF), OF);
        }
    }

    #[test]
    fn division_reports_zero_and_too_large_quotients() {
        assert_eq!(div(7, 0, 2, 1), Some((3, 1)));
        assert_eq!(div(0, 1, 1, 1), None);
        assert_eq!(div(1, 0, 0, 8), None);
        assert_eq!(idiv(mask(1) - 6, mask(1), 2, 1), Some((mask(1) - 2, mask(1))));
        assert_eq!(idiv(0x80, 0xff, 0xff, 1), None);
        assert_eq!(idiv(0, 1 << 63, u64::MAX, 8), None);
    }

    #[test]
    fn products_tell_when_they_do_not_fit() {
        assert_eq!(imul(0x7f, 2, 1), Computed { value: 0xfe, flags: CF | OF });
        assert_eq!(imul(0xff, 0xff, 1), Computed { value: 1, flags: 0 });
        assert_eq!(mul_wide(u64::MAX, u64::MAX, 8), (1, u64::MAX - 1));
        assert_eq!(imul_wide(u64::MAX, 2, 8), (u64::MAX - 1, u64::MAX));
    }
}
