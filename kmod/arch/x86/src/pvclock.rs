// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The paravirtual clock that Linux guests know as kvmclock: its MSRs and the two structures in guest memory
//! (Linux `Documentation/virt/kvm/x86/msr.rst` and `arch/x86/include/asm/pvclock-abi.h`).
//!
//! A guest's system time starts at 0 with the VM and advances with the TSC alone, by one scale fixed for the VM's life. All
//! vCPUs share one [`TimeBase`], so their clocks agree to the tick and the guest may be told that they do.
#![forbid(unsafe_code)]

use axvcpu_uapi::addr::GuestPhysAddr;

use crate::fault::{GeneralProtection, GuestResult};

/// Wall clock, old number.
pub const MSR_WALL_CLOCK_OLD: u32 = 0x11;
/// System time, old number.
pub const MSR_SYSTEM_TIME_OLD: u32 = 0x12;
/// Wall clock: writing an address asks for the wall-clock structure there, once.
pub const MSR_WALL_CLOCK: u32 = 0x4b56_4d00;
/// System time: address of the vCPU's clock structure, and bit 0 to enable it.
pub const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;

/// [`MSR_SYSTEM_TIME`]: enabled.
const ENABLED: u64 = 1;
/// Flag in the clock structure: the clocks of all vCPUs agree.
const FLAG_TSC_STABLE: u8 = 1;

/// How TSC ticks become nanoseconds: `ns = (ticks << shift) * mul >> 32`, a negative shift going right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// Multiplier, in units of 2^-32.
    pub mul: u32,
    /// Shift, -12 to 20.
    pub shift: i8,
}

impl Scale {
    /// The scale of a TSC of `tsc_khz` (at least 1): the one of highest precision, with `mul` in its upper half. Its error is
    /// below 2^-32, 0.25 ns for each second.
    pub const fn from_khz(tsc_khz: u32) -> Self {
        /// Nanoseconds in a millisecond, to which kHz are ticks.
        const NS: u64 = 1_000_000;
        let khz = if tsc_khz == 0 { 1 } else { tsc_khz as u64 };
        // NS / khz = f * 2^shift. With the difference of the two bit lengths, -12 to 19, as shift, f is in (1/2, 2).
        let mut shift = khz.leading_zeros().wrapping_sub(NS.leading_zeros()) as i32;
        let mut mul = Self::fraction(NS, shift, khz);
        if mul > u32::MAX as u64 {
            // Not below 1 (rounded): half of it.
            shift = shift.wrapping_add(1);
            mul = Self::fraction(NS, shift, khz);
        }
        Self { mul: mul as u32, shift: shift as i8 }
    }

    /// `numerator / denominator * 2^(32 - shift)`, rounded. The numerator has 20 bits and 32 - shift is at most 44, so nothing
    /// overflows.
    const fn fraction(numerator: u64, shift: i32, denominator: u64) -> u64 {
        let scaled = numerator.wrapping_shl(32i32.wrapping_sub(shift) as u32);
        match scaled.wrapping_add(denominator / 2).checked_div(denominator) {
            Some(quotient) => quotient,
            None => 0,
        }
    }

    /// Nanoseconds of `ticks`, exactly as a guest computes them.
    pub const fn to_ns(self, ticks: u64) -> u64 {
        let distance = self.shift.unsigned_abs() as u32;
        let shifted = if self.shift < 0 { ticks.wrapping_shr(distance) } else { ticks.wrapping_shl(distance) };
        let mul = self.mul as u64;
        // 64 by 32 bits in two halves; the sum is below 2^64 since mul is below 2^32.
        (shifted >> 32) * mul + (((shifted & 0xffff_ffff) * mul) >> 32)
    }
}

/// Where the guest's time starts; the same for all vCPUs of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeBase {
    /// The host's TSC at system time 0.
    pub host_tsc: u64,
    /// The scale.
    pub scale: Scale,
    /// The host's TSCs are synchronous and tick at a constant rate in every power state.
    pub stable: bool,
}

impl TimeBase {
    /// A base at `host_tsc`.
    pub const fn new(host_tsc: u64, tsc_khz: u32, stable: bool) -> Self {
        Self { host_tsc, scale: Scale::from_khz(tsc_khz), stable }
    }

    /// System time when the host's TSC is `host_tsc`.
    pub const fn system_ns(&self, host_tsc: u64) -> u64 {
        self.scale.to_ns(host_tsc.wrapping_sub(self.host_tsc))
    }
}

/// A structure to be written to guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockUpdate {
    /// Where it starts.
    pub address: GuestPhysAddr,
    /// The structure, its version first.
    bytes: [u8; 32],
    /// How much of `bytes` it is: 32 for the clock, 12 for the wall clock.
    len: usize,
}

impl ClockUpdate {
    /// The structure as it is in the end.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }

    /// Writes the structure by the protocol that lets a guest read it at the same time: an odd version first, then the rest,
    /// then the even version. `write` puts bytes at a guest physical address; it must not be reordered with its other calls
    /// (on x86 that is a matter of the compiler alone).
    ///
    /// # Errors
    /// The first error of `write`, at once.
    pub fn apply<E>(&self, mut write: impl FnMut(GuestPhysAddr, &[u8]) -> Result<(), E>) -> Result<(), E> {
        let (version, rest) = self.bytes().split_at_checked(4).unwrap_or((&[], &[]));
        let odd = version.try_into().map_or(1, u32::from_le_bytes).wrapping_sub(1);
        write(self.address, &odd.to_le_bytes())?;
        write(GuestPhysAddr::new(self.address.as_u64().wrapping_add(4)), rest)?;
        write(self.address, version)
    }
}

/// The clock MSRs of one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PvClock {
    system_time: u64,
    wall_clock: u64,
    /// Version of the last update; even.
    version: u32,
    system_time_due: bool,
    wall_clock_due: bool,
}

impl PvClock {
    /// Switched off.
    pub const fn new() -> Self {
        Self { system_time: 0, wall_clock: 0, version: 0, system_time_due: false, wall_clock_due: false }
    }

    /// Whether MSR `index` is one of these.
    pub const fn owns_msr(index: u32) -> bool {
        matches!(index, MSR_WALL_CLOCK | MSR_SYSTEM_TIME | MSR_WALL_CLOCK_OLD | MSR_SYSTEM_TIME_OLD)
    }

    /// Reads a clock MSR: what was written.
    ///
    /// # Errors
    /// [`GeneralProtection`] if `index` is none.
    pub fn read(&self, index: u32) -> GuestResult<u64> {
        match index {
            MSR_WALL_CLOCK | MSR_WALL_CLOCK_OLD => Ok(self.wall_clock),
            MSR_SYSTEM_TIME | MSR_SYSTEM_TIME_OLD => Ok(self.system_time),
            _ => Err(GeneralProtection),
        }
    }

    /// Writes a clock MSR. `phys_bits` is the width of a guest physical address.
    ///
    /// # Errors
    /// [`GeneralProtection`] if `index` is none, or the address is beyond the width or not a multiple of 4.
    pub fn write(&mut self, index: u32, value: u64, phys_bits: u32) -> GuestResult {
        if value & u64::MAX.checked_shl(phys_bits).unwrap_or(0) != 0 || value & 2 != 0 {
            return Err(GeneralProtection);
        }
        match index {
            MSR_WALL_CLOCK | MSR_WALL_CLOCK_OLD if value & ENABLED == 0 => {
                self.wall_clock = value;
                self.wall_clock_due = value != 0;
            }
            MSR_SYSTEM_TIME | MSR_SYSTEM_TIME_OLD => {
                self.system_time = value;
                self.system_time_due = value & ENABLED != 0;
            }
            _ => return Err(GeneralProtection),
        }
        Ok(())
    }

    /// The guest's TSC moved against the host's: the clock structure must be written anew.
    pub fn tsc_changed(&mut self) {
        self.system_time_due = self.system_time & ENABLED != 0;
    }

    /// Whether [`take_update`](Self::take_update) has something.
    pub fn is_due(&self) -> bool {
        self.system_time_due || self.wall_clock_due
    }

    /// The next structure to be written; call it until there is none. `tsc_offset` is what the hardware adds to the host's TSC
    /// for this vCPU, `wall_ns` tells the host's real time, in nanoseconds since 1970, at which the guest's system time was 0:
    /// real time now less [`TimeBase::system_ns`] now.
    pub fn take_update(
        &mut self,
        base: &TimeBase,
        tsc_offset: u64,
        wall_ns: impl FnOnce() -> u64,
    ) -> Option<ClockUpdate> {
        if !self.is_due() {
            return None;
        }
        self.version = self.version.wrapping_add(2);
        let version = self.version;
        let mut bytes = [0u8; 32];
        let mut rest = bytes.as_mut_slice();
        let mut put = |field: &[u8]| {
            if let Some((head, tail)) = core::mem::take(&mut rest).split_at_mut_checked(field.len()) {
                head.copy_from_slice(field);
                rest = tail;
            }
        };
        put(&version.to_le_bytes());
        let (address, len) = if core::mem::take(&mut self.system_time_due) {
            put(&[0; 4]);
            put(&base.host_tsc.wrapping_add(tsc_offset).to_le_bytes());
            put(&0u64.to_le_bytes()); // System time at the base.
            put(&base.scale.mul.to_le_bytes());
            put(&base.scale.shift.to_le_bytes());
            put(&[if base.stable { FLAG_TSC_STABLE } else { 0 }]);
            (self.system_time & !ENABLED, 32)
        } else {
            self.wall_clock_due = false;
            let wall_ns = wall_ns();
            // The structure's seconds have 32 bits: they wrap in 2106, as they do for every guest of every hypervisor.
            put(&((wall_ns / 1_000_000_000) as u32).to_le_bytes());
            put(&((wall_ns % 1_000_000_000) as u32).to_le_bytes());
            (self.wall_clock, 12)
        };
        Some(ClockUpdate { address: GuestPhysAddr::new(address), bytes, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// What a guest computes: `__pvclock_read_cycles` of Linux's `arch/x86/include/asm/pvclock.h`, in wider arithmetic.
    fn guest_ns(page: &[u8], tsc: u64) -> u64 {
        let delta = u128::from(tsc.wrapping_sub(u64_at(page, 8)));
        let shift = page[28] as i8;
        let shifted = if shift < 0 { delta >> -shift } else { delta << shift };
        u64_at(page, 16) + ((shifted * u128::from(u32_at(page, 24))) >> 32) as u64
    }

    #[test]
    fn the_clock_structure_has_the_documented_layout() {
        let mut clock = PvClock::new();
        assert_eq!(clock.write(MSR_SYSTEM_TIME, 0x1234_5000 | 1, 40), Ok(()));
        let base = TimeBase::new(1000, 2_000_000, true);
        let update = clock.take_update(&base, 500, || unreachable!()).unwrap();
        assert_eq!(update.address, GuestPhysAddr::new(0x1234_5000));
        let page = update.bytes();
        assert_eq!(page.len(), 32);
        assert_eq!((u32_at(page, 0), u32_at(page, 4)), (2, 0));
        assert_eq!((u64_at(page, 8), u64_at(page, 16)), (1500, 0));
        assert_eq!((u32_at(page, 24), page[28] as i8, page[29], &page[30..]), (1 << 31, 0, 1, &[0u8, 0][..]));
        assert_eq!(clock.take_update(&base, 500, || unreachable!()), None);
        let unstable = TimeBase { stable: false, ..base };
        clock.tsc_changed();
        let update = clock.take_update(&unstable, 0, || unreachable!()).unwrap();
        assert_eq!((u32_at(update.bytes(), 0), update.bytes()[29]), (4, 0));
    }

    #[test]
    fn the_wall_clock_is_written_once() {
        let mut clock = PvClock::new();
        assert_eq!(clock.write(MSR_WALL_CLOCK_OLD, 0x7000, 40), Ok(()));
        assert_eq!(clock.read(MSR_WALL_CLOCK), Ok(0x7000));
        let base = TimeBase::new(0, 1, true);
        let update = clock.take_update(&base, 0, || 1_700_000_000_123_456_789).unwrap();
        assert_eq!(update.address, GuestPhysAddr::new(0x7000));
        let bytes = update.bytes();
        assert_eq!(bytes.len(), 12);
        assert_eq!((u32_at(bytes, 0), u32_at(bytes, 4), u32_at(bytes, 8)), (2, 1_700_000_000, 123_456_789));
        assert!(!clock.is_due());
    }

    #[test]
    fn writing_follows_the_version_protocol() {
        let mut clock = PvClock::new();
        clock.write(MSR_SYSTEM_TIME, 0x1001, 40).unwrap();
        let update = clock.take_update(&TimeBase::new(7, 2_600_000, true), 0, || 0).unwrap();
        let mut memory = vec![0xaau8; 0x1020];
        let mut versions = Vec::new();
        update
            .apply(|address, bytes| {
                let at = address.as_u64() as usize;
                memory[at..at + bytes.len()].copy_from_slice(bytes);
                versions.push((u32_at(&memory, 0x1000), u64_at(&memory, 0x1008) == 7));
                Ok::<_, ()>(())
            })
            .unwrap();
        assert_eq!(versions, [(1, false), (1, true), (2, true)], "odd while it changes");
        assert_eq!(&memory[0x1000..], update.bytes());
        let mut calls = 0;
        assert_eq!(
            update.apply(|_, _| {
                calls += 1;
                Err(5)
            }),
            Err(5)
        );
        assert_eq!(calls, 1);
    }

    #[test]
    fn msr_values_are_checked() {
        let mut clock = PvClock::new();
        for (index, value) in [
            (MSR_SYSTEM_TIME, (1 << 40) | 1),
            (MSR_SYSTEM_TIME, 0x1003),
            (MSR_WALL_CLOCK, 0x1002),
            (MSR_WALL_CLOCK, 0x1001),
            (MSR_WALL_CLOCK, 1 << 63),
            (0x13, 0),
            (0x4b56_4d02, 0),
        ] {
            assert_eq!(clock.write(index, value, 40), Err(GeneralProtection), "{index:#x} {value:#x}");
        }
        assert_eq!(clock, PvClock::new());
        assert_eq!(clock.read(0x4b56_4d02), Err(GeneralProtection));
        clock.write(MSR_SYSTEM_TIME_OLD, 0x1005, 40).unwrap();
        assert_eq!((clock.read(MSR_SYSTEM_TIME), clock.is_due()), (Ok(0x1005), true));
        clock.write(MSR_SYSTEM_TIME, 0x1004, 40).unwrap();
        assert!(!clock.is_due(), "switched off");
        clock.tsc_changed();
        assert!(!clock.is_due());
    }

    #[test]
    fn extreme_frequencies_have_a_scale() {
        for khz in [0, 1, 2, 999_999, 1_000_000, 1_000_001, u32::MAX] {
            let scale = Scale::from_khz(khz);
            assert!(scale.mul >= 1 << 31, "{khz}: {scale:?}");
            assert!((-12..=20).contains(&scale.shift), "{khz}: {scale:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(if cfg!(miri) { 16 } else { 5000 }) })]
        /// A day at any real frequency: the guest's nanoseconds are the host's to within 1 ns for four seconds, and 2 ns of
        /// rounding.
        #[test]
        fn guest_time_is_host_time(khz in 100_000u32..10_000_000, seconds in 0u64..86_400, fraction in 0u64..1_000_000, start: u64, offset: u64) {
            let base = TimeBase::new(start, khz, true);
            let mut clock = PvClock::new();
            clock.write(MSR_SYSTEM_TIME, 0x1001, 40).unwrap();
            let update = clock.take_update(&base, offset, || 0).unwrap();
            let ticks = seconds * u64::from(khz) * 1000 + fraction * u64::from(khz) / 1000;
            let exact = (u128::from(ticks) * 1_000_000 / u128::from(khz)) as u64;
            let host_tsc = start.wrapping_add(ticks);
            let guest = guest_ns(update.bytes(), host_tsc.wrapping_add(offset));
            prop_assert!(guest.abs_diff(exact) <= seconds / 4 + 2, "{} against {}", guest, exact);
            prop_assert_eq!(base.system_ns(host_tsc), guest);
        }
    }
}
