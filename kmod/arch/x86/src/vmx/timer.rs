// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The preemption timer (SDM vol. 3 section 26.5.1): it ends the guest's turn when the guest's TSC reaches the deadline of its
//! local APIC's timer, so the host needs a timer of its own for that only while the vCPU sleeps.

/// The field's value when there is nothing to wait for. Should it expire after all, the exit is one for nothing.
pub(super) const UNUSED: u32 = u32::MAX;

/// CPUID signatures of CPUs whose preemption timer counts at another rate than IA32_VMX_MISC says: specification updates of
/// Xeon 3500 (AAM126), Xeon 5500 (AAK139) and Core i7-900 (AAJ124), Xeon 3400 (AAO95), Core i7-800 (AAN92), Core i7-600 and
/// its kin (AAT59, AAU65), Xeon L3406 (AAX65), Xeon 7500 (BA86), and Xeon E3-1220 v2 before its last stepping. The same as Linux
/// knows (arch/x86/kvm/vmx/vmx.c, `cpu_has_broken_vmx_preemption_timer`).
const WRONG_RATE: [u32; 9] = [0x106a0, 0x106a1, 0x106a4, 0x106a5, 0x106e5, 0x2_0652, 0x2_0655, 0x2_06e6, 0x3_06a8];

/// Bits of the signature that are reserved (SDM vol. 2A, CPUID, "Version Information Returned by CPUID in EAX").
const RESERVED: u32 = 0xf << 28 | 3 << 14;

/// Whether a CPU with this signature (CPUID 1 EAX) has a timer that can be relied on, if it has one.
pub(super) fn reliable(signature: u32) -> bool {
    !WRONG_RATE.contains(&(signature & !RESERVED))
}

/// The field's value with which the timer expires when `ticks` of the TSC have passed since it read `now`: not earlier, and
/// less than one count late. A count is whenever bit `shift` of the TSC changes. Too far away is [`UNUSED`].
pub(super) fn value(now: u64, ticks: u64, shift: u32) -> u32 {
    let count = |tsc: u64| tsc.checked_shr(shift).unwrap_or(0);
    // What the target is short of a whole count is rounded up.
    let partial = 1u64.checked_shl(shift).unwrap_or(0).wrapping_sub(1);
    let Some(target) = now.checked_add(ticks).and_then(|target| target.checked_add(partial)) else { return UNUSED };
    u32::try_from(count(target).wrapping_sub(count(now))).unwrap_or(UNUSED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn counts_are_rounded_up() {
        for (now, ticks, shift, counts) in [
            (0, 0, 5, 0),
            (0, 1, 5, 1),
            (0, 32, 5, 1),
            (0, 33, 5, 2),
            (31, 1, 5, 1),
            (31, 2, 5, 2),
            (32, 0, 5, 0),
            (33, 0, 5, 1), // The count that is under way: bit 5 changes at 64.
            (1000, 1000, 0, 1000),
            (5, 1, 31, 1),
        ] {
            assert_eq!(value(now, ticks, shift), counts, "{now} + {ticks} by {shift}");
        }
    }

    #[test]
    fn what_32_bits_do_not_hold_is_as_far_away_as_they_reach() {
        assert_eq!(value(0, u64::from(u32::MAX - 1), 0), u32::MAX - 1);
        assert_eq!(value(0, 1 << 32, 0), UNUSED);
        assert_eq!(value(0, u64::MAX, 5), UNUSED);
        assert_eq!(value(u64::MAX - 5, 10, 0), UNUSED, "the host's TSC does not live to see it");
        assert_eq!(value(u64::MAX - 5, 1, 5), UNUSED);
    }

    proptest! {
        #[test]
        fn it_expires_on_time(now in 0u64..1 << 62, ticks in 0u64..1 << 36, shift in 0u32..32) {
            let counts = value(now, ticks, shift);
            // The TSC when bit `shift` has changed that often; with none to wait for, at once.
            let expiry = if counts == 0 { now } else { ((now >> shift) + u64::from(counts)) << shift };
            if counts != UNUSED {
                prop_assert!(expiry >= now + ticks, "early");
                prop_assert!(expiry - (now + ticks) < 1 << shift, "late");
            } else {
                prop_assert!(ticks >> shift >= u64::from(UNUSED) - 1);
            }
        }
    }

    #[test]
    fn cpus_with_the_erratum_are_known() {
        assert!(!reliable(0x106a5) && !reliable(0x306a8) && !reliable(0x106a5 | 1 << 31 | 1 << 14));
        assert!(reliable(0x306a9) && reliable(0x706e5));
    }
}
