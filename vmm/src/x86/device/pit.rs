// SPDX-License-Identifier: MIT OR Apache-2.0
//! The 8254 timer (Intel data sheet, order number 231164): three counters at 1.193182 MHz. Counter 0 interrupts, counter 2
//! is gated and watched through port 0x61, which guests use to calibrate other clocks.
//!
//! Nothing counts in the background: a counter is its start time, and its value is worked out when somebody looks. Ticks
//! that the host was too late for are lost, not made up for.

use std::sync::{Arc, Mutex};

use crate::device::clock::{Clock, Timed};
use crate::device::line::Line;
use crate::device::{lock, read_bytes, Device};

/// Counts per second.
const FREQUENCY: u64 = 1_193_182;
const NS_PER_S: u64 = 1_000_000_000;
/// The shortest time between interrupts of counter 0 that the host bears, in nanoseconds.
const MIN_PERIOD_NS: u64 = 100_000;

/// How the bytes of a counter are accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low,
    High,
    /// Low, then high.
    Both,
}

#[derive(Debug)]
struct Counter {
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
    const fn new(gate: bool) -> Self {
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

    fn elapsed(&self, now: u64) -> u64 {
        self.held.unwrap_or_else(|| ns_to_counts(now.saturating_sub(self.start)))
    }

    /// Whether the mode begins a count at a rising edge of the gate (and not when the count is written).
    fn is_triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    fn value(&self, now: u64) -> u16 {
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

    fn output(&self, now: u64) -> bool {
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

    fn set_gate(&mut self, gate: bool, now: u64) {
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

    fn restart(&mut self, now: u64) {
        self.start = now;
        self.held = None;
    }

    fn load(&mut self, value: u16, now: u64) {
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

    fn write(&mut self, value: u8, now: u64) {
        match (self.access, self.low_written.take()) {
            (Access::Low, _) => self.load(value.into(), now),
            (Access::High, _) => self.load(u16::from(value) << 8, now),
            (Access::Both, Some(low)) => self.load(u16::from_le_bytes([low, value]), now),
            (Access::Both, None) => self.low_written = Some(value),
        }
    }

    fn read(&mut self, now: u64) -> u8 {
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

    fn latch(&mut self, now: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.value(now));
        }
    }

    fn latch_status(&mut self, now: u64) {
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
    fn next_edge(&self, now: u64) -> Option<u64> {
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
fn counts_to_ns(counts: u64) -> u64 {
    (u128::from(counts) * u128::from(NS_PER_S)).div_ceil(u128::from(FREQUENCY)) as u64
}

fn to_bcd(value: u16) -> u16 {
    (value / 1000 % 10) << 12 | (value / 100 % 10) << 8 | (value / 10 % 10) << 4 | (value % 10)
}

fn from_bcd(value: u16) -> u16 {
    (value >> 12) * 1000 + (value >> 8 & 15) * 100 + (value >> 4 & 15) * 10 + (value & 15)
}

/// The timer.
pub struct Pit {
    counters: [Counter; 3],
    clock: Box<dyn Clock>,
    line: Line,
    /// Port 0x61: the speaker is on.
    speaker: bool,
    /// Port 0x61: toggles with every read, as the memory refresh of old did with time.
    refresh: bool,
}

impl Pit {
    /// A timer after reset, whose counter 0 drives `line`.
    #[must_use]
    pub fn new(clock: Box<dyn Clock>, line: Line) -> Self {
        let counters = [Counter::new(true), Counter::new(true), Counter::new(false)];
        Self { counters, clock, line, speaker: false, refresh: false }
    }

    fn arm(&self) {
        self.clock.arm(self.counters[0].next_edge(self.clock.now()));
    }

    fn command(&mut self, value: u8) {
        let now = self.clock.now();
        if value >> 6 == 3 {
            // Read-back: latch count (bit 5 clear) and status (bit 4 clear) of the counters in bits 3:1.
            for (i, counter) in self.counters.iter_mut().enumerate() {
                if value >> (i + 1) & 1 != 0 {
                    if value & 1 << 5 == 0 {
                        counter.latch(now);
                    }
                    if value & 1 << 4 == 0 {
                        counter.latch_status(now);
                    }
                }
            }
            return;
        }
        let Some(counter) = self.counters.get_mut(usize::from(value >> 6)) else { return };
        let access = match value >> 4 & 3 {
            0 => return counter.latch(now),
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        // Modes 6 and 7 are other names of 2 and 3.
        let mode = match value >> 1 & 7 {
            mode @ 6.. => mode - 4,
            mode => mode,
        };
        *counter = Counter { mode, bcd: value & 1 != 0, access, ..Counter::new(counter.gate) };
        if value >> 6 == 0 {
            self.arm();
        }
    }
}

impl Timed for Pit {
    fn expire(&mut self) {
        self.line.pulse();
        self.arm();
    }
}

impl Device for Pit {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let now = self.clock.now();
        read_bytes(offset, data, |port| match self.counters.get_mut(port as usize) {
            Some(counter) => counter.read(now),
            None => 0xff,
        });
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        for (port, value) in (offset..).zip(data) {
            match self.counters.get_mut(port as usize) {
                Some(counter) => {
                    counter.write(*value, self.clock.now());
                    if port == 0 {
                        self.arm();
                    }
                }
                None => self.command(*value),
            }
        }
    }
}

/// Port 0x61 on the bus.
pub struct SystemControlB(pub Arc<Mutex<Pit>>);

impl Device for SystemControlB {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        let mut pit = lock(&self.0);
        pit.refresh = !pit.refresh;
        let now = pit.clock.now();
        let value = u8::from(pit.counters[2].gate)
            | u8::from(pit.speaker) << 1
            | u8::from(pit.refresh) << 4
            | u8::from(pit.counters[2].output(now)) << 5;
        data[0] = value;
    }
    fn write(&mut self, _offset: u64, data: &[u8]) {
        let mut pit = lock(&self.0);
        let now = pit.clock.now();
        pit.speaker = data[0] & 2 != 0;
        pit.counters[2].set_gate(data[0] & 1 != 0, now);
    }
}

#[cfg(test)]
mod tests {
    use super::super::irq::{tests::interrupts, PicPorts};
    use super::*;
    use crate::x86::device::irq::{Interrupts, IRQ_TIMER};

    #[derive(Clone, Default)]
    struct TestClock(Arc<Mutex<(u64, Option<u64>)>>);
    impl Clock for TestClock {
        fn now(&self) -> u64 {
            lock(&self.0).0
        }
        fn arm(&self, deadline: Option<u64>) {
            lock(&self.0).1 = deadline;
        }
    }

    struct Bench {
        pit: Arc<Mutex<Pit>>,
        clock: TestClock,
        interrupts: Arc<Interrupts>,
    }

    impl Bench {
        fn new() -> Self {
            let clock = TestClock::default();
            let interrupts = interrupts().0;
            let mut first = PicPorts::new(&interrupts, false);
            for (port, value) in [(0, 0x11), (1, 0x20), (1, 4), (1, 3), (1, 0)] {
                first.write(port, &[value]);
            }
            let line = Line::new(&interrupts, IRQ_TIMER);
            let pit = Arc::new(Mutex::new(Pit::new(Box::new(clock.clone()), line)));
            Self { pit, clock, interrupts }
        }
        fn write(&self, port: u64, values: &[u8]) {
            for value in values {
                lock(&self.pit).write(port, &[*value]);
            }
        }
        fn read(&self, port: u64) -> u8 {
            let mut byte = [0];
            lock(&self.pit).read(port, &mut byte);
            byte[0]
        }
        fn count(&self, port: u64) -> u16 {
            self.write(3, &[(port as u8) << 6]);
            u16::from_le_bytes([self.read(port), self.read(port)])
        }
        fn port_b(&self) -> u8 {
            let mut byte = [0];
            SystemControlB(Arc::clone(&self.pit)).read(0, &mut byte);
            byte[0]
        }
        fn set_port_b(&self, value: u8) {
            SystemControlB(Arc::clone(&self.pit)).write(0, &[value]);
        }
        fn set_counts(&self, counts: u64) {
            lock(&self.clock.0).0 = counts_to_ns(counts);
        }
        fn deadline(&self) -> Option<u64> {
            lock(&self.clock.0).1
        }
        fn interrupted(&self) -> bool {
            self.interrupts.acknowledge().is_some()
        }
    }

    #[test]
    fn rate_generator_interrupts_every_round() {
        let bench = Bench::new();
        bench.write(3, &[0x34]);
        assert_eq!(bench.deadline(), None, "no count yet");
        bench.write(0, &[0x9c, 0x2e]); // 11932: 100 Hz
        for round in 1..4 {
            let deadline = bench.deadline().unwrap();
            assert_eq!(deadline, counts_to_ns(round * 11932));
            assert!(!bench.interrupted());
            lock(&bench.clock.0).0 = deadline;
            lock(&bench.pit).expire();
            assert!(bench.interrupted());
        }
        bench.set_counts(10 * 11932 + 5);
        lock(&bench.pit).expire();
        assert_eq!(bench.deadline(), Some(counts_to_ns(11 * 11932)), "lost ticks are not made up for");
    }

    #[test]
    fn one_shot_interrupts_once() {
        let bench = Bench::new();
        bench.write(3, &[0x30]);
        bench.write(0, &[0xe8, 0x03]);
        assert_eq!(bench.deadline(), Some(counts_to_ns(1000)));
        bench.set_counts(1000);
        lock(&bench.pit).expire();
        assert!(bench.interrupted());
        assert_eq!(bench.deadline(), None);
    }

    #[test]
    fn a_guest_cannot_ask_for_an_interrupt_storm() {
        let bench = Bench::new();
        bench.write(3, &[0x14]);
        bench.write(0, &[1]);
        assert_eq!(bench.deadline(), Some(MIN_PERIOD_NS));
    }

    #[test]
    fn counters_count_down() {
        let bench = Bench::new();
        bench.write(3, &[0x34]);
        bench.write(0, &[0, 0]);
        for (at, value) in [(0, 0), (1, 0xffff), (0x8000, 0x8000), (0x1_0001, 0xffff)] {
            bench.set_counts(at);
            assert_eq!(bench.count(0), value, "after {at:#x}");
        }
        let square = Bench::new();
        square.write(3, &[0x36]);
        square.write(0, &[0x10, 0]);
        square.set_counts(3);
        assert_eq!(square.count(0), 0x10 - 6, "square wave: by twos");
        let decimal = Bench::new();
        decimal.write(3, &[0x31]);
        decimal.write(0, &[0x00, 0x20]);
        decimal.set_counts(1);
        assert_eq!(decimal.count(0), 0x1999, "BCD");
    }

    #[test]
    fn a_latched_count_stays() {
        let bench = Bench::new();
        bench.write(3, &[0x34]);
        bench.write(0, &[0x00, 0x10]);
        bench.set_counts(0x10);
        bench.write(3, &[0x00]);
        bench.set_counts(0x20);
        bench.write(3, &[0x00]);
        assert_eq!((bench.read(0), bench.read(0)), (0xf0, 0x0f));
        assert_eq!((bench.read(0), bench.read(0)), (0xe0, 0x0f));
        bench.write(3, &[0xc2]);
        assert_eq!(bench.read(0), 0b1011_0100, "status first: output, both bytes, mode 2");
        assert_eq!((bench.read(0), bench.read(0)), (0xe0, 0x0f));
    }

    #[test]
    fn counter_2_calibrates_as_linux_does_it() {
        let bench = Bench::new();
        // pit_calibrate_tsc in arch/x86/kernel/tsc.c: gate up, speaker off, mode 0, count, wait for the output.
        bench.set_port_b((bench.port_b() & !2) | 1);
        bench.write(3, &[0xb0]);
        bench.write(2, &[0xe8, 0x03]);
        assert_eq!(bench.port_b() & 0x21, 1);
        bench.set_counts(999);
        assert_eq!(bench.port_b() & 0x20, 0);
        bench.set_counts(1000);
        assert_eq!(bench.port_b() & 0x20, 0x20);
        assert_ne!(bench.port_b() & 0x10, bench.port_b() & 0x10, "refresh toggles");
    }

    #[test]
    fn the_gate_stops_counter_2() {
        let bench = Bench::new();
        bench.set_port_b(1);
        bench.write(3, &[0xb0]);
        bench.write(2, &[0xe8, 0x03]);
        bench.set_counts(400);
        bench.set_port_b(0);
        bench.set_counts(5000);
        assert_eq!(bench.count(2), 600);
        bench.set_port_b(1);
        bench.set_counts(5599);
        assert_eq!(bench.port_b() & 0x20, 0);
        bench.set_counts(5600);
        assert_eq!(bench.port_b() & 0x20, 0x20);
    }
}
