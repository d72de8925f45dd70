// SPDX-License-Identifier: MIT OR Apache-2.0
//! CMOS RAM and real-time clock (Motorola MC146818 data sheet): date and time in UTC, and the memory size where firmware
//! leaves it. The clock raises no interrupt; guests are told so by ACPI (no interrupt in `_CRS`).

use crate::config::MemoryRegion;
use crate::device::{read_bytes, Device};

/// Time registers: seconds, minutes, hours, day of the week, day, month, year.
const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
/// Status registers.
const A: u8 = 0x0a;
const B: u8 = 0x0b;
const C: u8 = 0x0c;
const D: u8 = 0x0d;
/// The century, as ACPI and most firmware have it.
const CENTURY: u8 = 0x32;

/// Register A: update in progress.
const A_UPDATING: u8 = 1 << 7;
/// Register A after reset: 32.768 kHz, 1024 Hz.
const A_RESET: u8 = 0x26;
/// Register B: the clock is stopped, to be set.
const B_SET: u8 = 1 << 7;
/// Register B: binary instead of BCD.
const B_BINARY: u8 = 1 << 2;
/// Register B: 24 hours instead of 12.
const B_24H: u8 = 1 << 1;
/// Register D: RAM and time are valid.
const D_VALID: u8 = 1 << 7;
/// Hour register, 12-hour mode: afternoon.
const PM: u8 = 1 << 7;

/// How long before the change of second the update bit is set, in nanoseconds (data sheet, t_BUC).
const UPDATE_NS: u32 = 244_000;

/// Date and time, in the Gregorian calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DateTime {
    year: i64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl DateTime {
    /// From seconds since 1970. Days are counted from March on, so that the leap day comes last.
    fn from_unix(seconds: i64) -> Self {
        let (days, time) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let days = days + 719_468; // days from 1 March of year 0 to 1970
        let era = days.div_euclid(146_097); // days in 400 years
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        Self {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month: month as u8,
            day: day as u8,
            hour: (time / 3600) as u8,
            minute: (time / 60 % 60) as u8,
            second: (time % 60) as u8,
        }
    }

    fn to_unix(self) -> i64 {
        let year = self.year - i64::from(self.month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let month_from_march = (i64::from(self.month) + 9) % 12;
        let day_of_year = (153 * month_from_march + 2) / 5 + i64::from(self.day) - 1;
        let days = era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468;
        days * 86_400 + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }
}

/// The clock's source: seconds since 1970, and nanoseconds within the second.
pub type Now = Box<dyn Fn() -> (i64, u32) + Send>;

/// The time of the host.
#[must_use]
pub fn host_time() -> Now {
    Box::new(|| {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        (i64::try_from(since.as_secs()).unwrap_or(i64::MAX), since.subsec_nanos())
    })
}

/// CMOS RAM and clock.
pub struct Cmos {
    index: u8,
    ram: [u8; 128],
    now: Now,
    /// What the guest's clock is ahead of the host's, in seconds.
    offset: i64,
    /// The time at which the guest stopped the clock, until it lets it run again.
    stopped: Option<DateTime>,
}

impl Cmos {
    /// A clock that starts at the host's time, with the size of `memory`.
    #[must_use]
    pub fn new(memory: &[MemoryRegion], now: Now) -> Self {
        let mut ram = [0; 128];
        ram[usize::from(A)] = A_RESET;
        ram[usize::from(B)] = B_24H;
        let low = memory.iter().find(|region| region.base == 0).map_or(0, MemoryRegion::end);
        let high: u64 = memory.iter().filter(|region| region.base >= 1 << 32).map(|region| region.size).sum();
        let mut put = |at: usize, value: u64, limit: u64, bytes: usize| {
            ram[at..at + bytes].copy_from_slice(&value.min(limit).to_le_bytes()[..bytes]);
        };
        put(0x15, 640, 0xffff, 2); // conventional memory in KiB
        for at in [0x17, 0x30] {
            put(at, low.saturating_sub(1 << 20) >> 10, 0xffff, 2); // from 1 MiB up, in KiB
        }
        put(0x34, low.saturating_sub(16 << 20) >> 16, 0xffff, 2); // from 16 MiB up, in 64 KiB
        put(0x5b, high >> 16, 0xff_ffff, 3); // from 4 GiB up, in 64 KiB
        Self { index: 0, ram, now, offset: 0, stopped: None }
    }

    fn time(&self) -> DateTime {
        self.stopped.unwrap_or_else(|| DateTime::from_unix((self.now)().0.saturating_add(self.offset)))
    }

    fn is_set(&self, flag: u8) -> bool {
        self.ram[usize::from(B)] & flag != 0
    }

    fn encode(&self, value: u8) -> u8 {
        if self.is_set(B_BINARY) {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.is_set(B_BINARY) {
            value
        } else {
            (value >> 4) * 10 + (value & 15)
        }
    }

    fn read_register(&mut self) -> u8 {
        let time = self.time();
        match self.index {
            SECONDS => self.encode(time.second),
            MINUTES => self.encode(time.minute),
            HOURS if self.is_set(B_24H) => self.encode(time.hour),
            HOURS => {
                let hour = if time.hour % 12 == 0 { 12 } else { time.hour % 12 };
                self.encode(hour) | if time.hour >= 12 { PM } else { 0 }
            }
            // 1970-01-01 was a Thursday, the 5th day counted from Sunday as 1.
            WEEKDAY => self.encode((time.to_unix().div_euclid(86_400) + 4).rem_euclid(7) as u8 + 1),
            DAY => self.encode(time.day),
            MONTH => self.encode(time.month),
            YEAR => self.encode(time.year.rem_euclid(100) as u8),
            CENTURY => self.encode((time.year / 100).rem_euclid(100) as u8),
            A => {
                let updating = self.stopped.is_none() && (self.now)().1 >= 1_000_000_000 - UPDATE_NS;
                self.ram[usize::from(A)] | if updating { A_UPDATING } else { 0 }
            }
            C => 0,
            D => D_VALID,
            index => self.ram[usize::from(index)],
        }
    }

    fn write_register(&mut self, value: u8) {
        let mut time = self.time();
        match self.index {
            SECONDS => time.second = self.decode(value).min(59),
            MINUTES => time.minute = self.decode(value).min(59),
            HOURS if self.is_set(B_24H) => time.hour = self.decode(value).min(23),
            HOURS => time.hour = self.decode(value & !PM) % 12 + if value & PM != 0 { 12 } else { 0 },
            DAY => time.day = self.decode(value).clamp(1, 31),
            MONTH => time.month = self.decode(value).clamp(1, 12),
            YEAR => time.year = time.year / 100 * 100 + i64::from(self.decode(value).min(99)),
            CENTURY => time.year = i64::from(self.decode(value).min(99)) * 100 + time.year % 100,
            // The weekday follows from the date.
            WEEKDAY | C | D => return,
            A => {
                self.ram[usize::from(A)] = value & !A_UPDATING;
                return;
            }
            B => {
                self.ram[usize::from(B)] = value;
                if value & B_SET != 0 {
                    self.stopped = Some(time);
                } else if let Some(time) = self.stopped.take() {
                    self.offset = time.to_unix() - (self.now)().0;
                }
                return;
            }
            index => {
                self.ram[usize::from(index)] = value;
                return;
            }
        }
        if self.stopped.is_some() {
            self.stopped = Some(time);
        } else {
            self.offset = time.to_unix() - (self.now)().0;
        }
    }
}

impl Device for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |port| if port == 1 { self.read_register() } else { 0xff });
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        for (port, value) in (offset..).zip(data) {
            match port {
                // Bit 7 of the index port masks NMIs in a PC.
                0 => self.index = value & 0x7f,
                _ => self.write_register(*value),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicI64, Ordering};
    use std::sync::Arc;

    /// 2024-02-29 23:59:58 UTC, a Thursday.
    const LEAP_DAY: i64 = 1_709_251_198;

    fn cmos(now: i64) -> (Cmos, Arc<AtomicI64>) {
        let clock = Arc::new(AtomicI64::new(now));
        let source = Arc::clone(&clock);
        let memory = crate::x86::layout::default_regions(5 << 30);
        (Cmos::new(&memory, Box::new(move || (source.load(Ordering::Relaxed), 0))), clock)
    }

    fn read(cmos: &mut Cmos, index: u8) -> u8 {
        let mut byte = [0];
        cmos.write(0, &[index | 0x80]);
        cmos.read(1, &mut byte);
        byte[0]
    }

    fn write(cmos: &mut Cmos, index: u8, value: u8) {
        cmos.write(0, &[index]);
        cmos.write(1, &[value]);
    }

    #[test]
    fn calendar_agrees_with_known_dates() {
        let known = [
            (0, (1970, 1, 1, 0, 0, 0)),
            (951_782_400, (2000, 2, 29, 0, 0, 0)),
            (LEAP_DAY, (2024, 2, 29, 23, 59, 58)),
            (4_107_542_399, (2100, 2, 28, 23, 59, 59)),
            (4_107_542_400, (2100, 3, 1, 0, 0, 0)),
            (-1, (1969, 12, 31, 23, 59, 59)),
        ];
        for (seconds, (year, month, day, hour, minute, second)) in known {
            let time = DateTime { year, month, day, hour, minute, second };
            assert_eq!(DateTime::from_unix(seconds), time);
            assert_eq!(time.to_unix(), seconds);
        }
        for days in (0..80_000).map(|n| n * 86_400) {
            assert_eq!(DateTime::from_unix(days).to_unix(), days);
        }
    }

    #[test]
    fn time_in_every_format() {
        let (mut cmos, clock) = cmos(LEAP_DAY);
        let registers = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];
        let all = |cmos: &mut Cmos| registers.map(|index| read(cmos, index));
        assert_eq!(all(&mut cmos), [0x58, 0x59, 0x23, 5, 0x29, 2, 0x24, 0x20]);
        write(&mut cmos, B, B_24H | B_BINARY);
        assert_eq!(all(&mut cmos), [58, 59, 23, 5, 29, 2, 24, 20]);
        write(&mut cmos, B, 0);
        assert_eq!(read(&mut cmos, HOURS), 0x11 | PM);
        clock.fetch_add(2, Ordering::Relaxed);
        assert_eq!(all(&mut cmos), [0, 0, 0x12, 6, 1, 3, 0x24, 0x20]);
        assert_eq!((read(&mut cmos, C), read(&mut cmos, D)), (0, D_VALID));
    }

    #[test]
    fn a_guest_can_set_its_clock() {
        let (mut cmos, clock) = cmos(LEAP_DAY);
        write(&mut cmos, B, B_SET | B_24H);
        let new =
            [(SECONDS, 0x30), (MINUTES, 0x15), (HOURS, 8), (DAY, 0x31), (MONTH, 0x12), (YEAR, 0x99), (CENTURY, 0x19)];
        for (index, value) in new {
            write(&mut cmos, index, value);
        }
        clock.fetch_add(100, Ordering::Relaxed);
        assert_eq!(read(&mut cmos, SECONDS), 0x30, "stopped");
        write(&mut cmos, B, B_24H);
        clock.fetch_add(5, Ordering::Relaxed);
        for (index, value) in new.into_iter().skip(1) {
            assert_eq!(read(&mut cmos, index), value, "register {index:#x}");
        }
        assert_eq!(read(&mut cmos, SECONDS), 0x35);
        assert_eq!(clock.load(Ordering::Relaxed), LEAP_DAY + 105, "the host's clock is its own");
    }

    #[test]
    fn bad_values_do_no_harm() {
        let (mut cmos, _) = cmos(LEAP_DAY);
        for index in 0..128 {
            for value in [0, 0xff, 0x80, 0x7f, 0x99] {
                write(&mut cmos, index, value);
                for index in 0..128 {
                    read(&mut cmos, index);
                }
            }
        }
    }

    #[test]
    fn memory_size_is_where_firmware_leaves_it() {
        let (mut cmos, _) = cmos(0);
        let mut word = |at: u8| u16::from_le_bytes([read(&mut cmos, at), read(&mut cmos, at + 1)]);
        assert_eq!((word(0x15), word(0x17), word(0x30)), (640, 0xffff, 0xffff));
        assert_eq!(u64::from(word(0x34)) << 16, (3 << 30) - (16 << 20));
        assert_eq!(u64::from(word(0x5b)) << 16, 2 << 30);
    }

    #[test]
    fn update_flag_is_up_just_before_the_change() {
        for (ns, flag) in [(0, 0), (999_700_000, 0), (999_800_000, A_UPDATING)] {
            let mut cmos = Cmos::new(&[], Box::new(move || (0, ns)));
            assert_eq!(read(&mut cmos, A) & A_UPDATING, flag);
        }
    }
}
