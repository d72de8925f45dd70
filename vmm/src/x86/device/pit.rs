// SPDX-License-Identifier: MIT OR Apache-2.0
//! The 8254 timer (Intel data sheet, order number 231164): three counters at 1.193182 MHz. Counter 0 interrupts, counter 2
//! is gated and watched through port 0x61, which guests use to calibrate other clocks.
//!
//! Ticks that the host was too late for are lost, not made up for.

mod counter;

use std::sync::{Arc, Mutex};

use crate::device::clock::{Clock, Timed};
use crate::device::line::Line;
use crate::device::{lock, read_bytes, Device};
use counter::{Access, Counter};

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
        counter.program(mode, value & 1 != 0, access);
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
        let value = u8::from(pit.counters[2].gate())
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
    use super::counter::{counts_to_ns, MIN_PERIOD_NS};
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
