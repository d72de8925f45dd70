// SPDX-License-Identifier: MIT OR Apache-2.0
//! One counter of the 8254.
//!
//! Nothing counts in the background: a counter is its start time, and its value is worked out when somebody looks.

/// Counts per second.
const FREQUENCY: u64 = 1_193_182;
const NS_PER_S: u64 = 1_000_000_000;
/// The shortest time between interrupts of counter 0 that the host bears, in nanoseconds.
pub(super) const MIN_PERIOD_NS: u64 = 100_000;

/// How the bytes of a counter are accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Low,
    High,
    /// Low, then high.
    Both,
}

#[derive(Debug)]
pub(super) struct Counter {
    /// 0 to 5.
    mode: u8,
    bcd: bool,
    access: Access,
    /// Counts per round, 1 to 65536 (10000 in BCD).
    reload: u32,
    /// Set once a count was written after the mode.
    loaded: bool,
    gate: bool,
    /// Nanoseconds at which the current count began; meaningless while `held`.
    start: u64,
    /// Counts done before the gate stopped the counter.
    held: Option<u64>,
    /// Low byte written, high byte to come.
    low_written: Option<u8>,
    /// The next read gives the high byte.
    read_high: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
}

impl Counter {
    /// Sets mode, format and access, which stops it until a count is written. The gate stays.
    pub(super) fn program(&mut self, mode: u8, bcd: bool, access: Access) {
        *self = Self { mode, bcd, access, ..Self::new(self.gate) };
    }

    pub(super) fn gate(&self) -> bool {
        self.gate
    }

    pub(super) const fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bcd: false,
            access: Access::Both,
            reload: 0x1_0000,
            loaded: false,
            gate,
            start: 0,
            held: None,
            low_written: None,
            read_high: false,
            latched: None,
            latched_status: None,
        }
    }

    pub(super) fn elapsed(&self, now: u64) -> u64 {
        self.held.unwrap_or_else(|| ns_to_counts(now.saturating_sub(self.start)))
    }

    /// Whether the mode begins a count at a rising edge of the gate (and not when the count is written).
    pub(super) fn is_triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    pub(super) fn value(&self, now: u64) -> u16 {
        let (elapsed, reload) = (self.elapsed(now), u64::from(self.reload));
        let modulus = if self.bcd { 10_000 } else { 0x1_0000 };
        let count = match self.mode {
            2 => reload - elapsed % reload,
            3 => reload - elapsed * 2 % reload,
            // The others count on below zero.
            _ => (reload + modulus - elapsed % modulus) % modulus,
        };
        let count = (count % modulus) as u16;
        if self.bcd {
            to_bcd(count)
        } else {
            count
        }
    }

    pub(super) fn output(&self, now: u64) -> bool {
        if !self.loaded {
            return self.mode != 0;
        }
        let (elapsed, reload) = (self.elapsed(now), u64::from(self.reload));
        match self.mode {
            0 | 1 => elapsed >= reload,
            2 => elapsed % reload != reload - 1,
            3 => elapsed % reload < reload.div_ceil(2),
            _ => elapsed != reload,
        }
    }

    pub(super) fn set_gate(&mut self, gate: bool, now: u64) {
        let rises = gate && !self.gate;
        let falls = !gate && self.gate;
        self.gate = gate;
        match self.mode {
            0 | 4 if falls => self.held = Some(self.elapsed(now)),
            0 | 4 if rises => {
                if let Some(elapsed) = self.held.take() {
                    self.start = now.saturating_sub(counts_to_ns(elapsed));
                }
            }
            2 | 3 if falls => self.held = Some(0),
            _ if rises => self.restart(now),
            _ => {}
        }
    }

    pub(super) fn restart(&mut self, now: u64) {
        self.start = now;
        self.held = None;
    }

    pub(super) fn load(&mut self, value: u16, now: u64) {
        let (value, zero) = if self.bcd { (u32::from(from_bcd(value)), 10_000) } else { (u32::from(value), 0x1_0000) };
        self.reload = if value == 0 { zero } else { value };
        self.loaded = true;
        if !self.is_triggered() {
            self.restart(now);
            if !self.gate {
                self.held = Some(0);
            }
        }
    }

    pub(super) fn write(&mut self, value: u8, now: u64) {
        match (self.access, self.low_written.take()) {
            (Access::Low, _) => self.load(value.into(), now),
            (Access::High, _) => self.load(u16::from(value) << 8, now),
            (Access::Both, Some(low)) => self.load(u16::from_le_bytes([low, value]), now),
            (Access::Both, None) => self.low_written = Some(value),
        }
    }

    pub(super) fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched.unwrap_or_else(|| self.value(now)).to_le_bytes();
        let is_high = match self.access {
            Access::Low => false,
            Access::High => true,
            Access::Both => {
                self.read_high = !self.read_high;
                !self.read_high
            }
        };
        if self.access != Access::Both || is_high {
            self.latched = None;
        }
        if is_high {
            high
        } else {
            low
        }
    }

    pub(super) fn latch(&mut self, now: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.value(now));
        }
    }

    pub(super) fn latch_status(&mut self, now: u64) {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        };
        let status = u8::from(self.output(now)) << 7
            | u8::from(!self.loaded) << 6
            | access << 4
            | self.mode << 1
            | u8::from(self.bcd);
        self.latched_status.get_or_insert(status);
    }

    /// Nanoseconds of the next rising output after `now`.
    pub(super) fn next_edge(&self, now: u64) -> Option<u64> {
        if !self.loaded || self.held.is_some() {
            return None;
        }
        let reload = u64::from(self.reload);
        match self.mode {
            0 => Some(self.start + counts_to_ns(reload)).filter(|at| *at > now),
            4 => Some(self.start + counts_to_ns(reload + 1)).filter(|at| *at > now),
            2 | 3 => {
                let rounds = self.elapsed(now) / reload + 1;
                let earliest = now + if counts_to_ns(reload) < MIN_PERIOD_NS { MIN_PERIOD_NS } else { 0 };
                Some((self.start + counts_to_ns(rounds * reload)).max(earliest))
            }
            _ => None,
        }
    }
}

fn ns_to_counts(ns: u64) -> u64 {
    (u128::from(ns) * u128::from(FREQUENCY) / u128::from(NS_PER_S)) as u64
}

/// Rounded up, so that the count is reached at that time.
pub(super) fn counts_to_ns(counts: u64) -> u64 {
    (u128::from(counts) * u128::from(NS_PER_S)).div_ceil(u128::from(FREQUENCY)) as u64
}

fn to_bcd(value: u16) -> u16 {
    (value / 1000 % 10) << 12 | (value / 100 % 10) << 8 | (value / 10 % 10) << 4 | (value % 10)
}

fn from_bcd(value: u16) -> u16 {
    (value >> 12) * 1000 + (value >> 8 & 15) * 100 + (value >> 4 & 15) * 10 + (value & 15)
}
