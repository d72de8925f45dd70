// SPDX-License-Identifier: MIT OR Apache-2.0
//! A pair of 8259A interrupt controllers, cascaded as in a PC (Intel 8259A data sheet, order number 231468).
//!
//! Pure logic. The second chip's output is input 2 of the first. Inputs are edge-triggered unless the edge/level control
//! register says otherwise; an edge stays latched until it is acknowledged.

/// Input of the first chip that the second one drives.
const CASCADE: u8 = 2;

/// ICW1: an ICW4 follows.
const ICW1_ICW4: u8 = 1 << 0;
/// ICW1: this is one.
const ICW1: u8 = 1 << 4;
/// OCW3: this is one (with ICW1 clear).
const OCW3: u8 = 1 << 3;
/// ICW4: automatic end of interrupt.
const ICW4_AUTO_EOI: u8 = 1 << 1;
/// ICW4: special fully nested mode.
const ICW4_NESTED: u8 = 1 << 4;

/// The initialisation command word expected next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    /// None: the data port is the mask.
    Nothing,
    Icw2,
    Icw3,
    Icw4,
}

/// One chip.
#[derive(Debug)]
struct Chip {
    /// Requests latched.
    irr: u8,
    /// Requests in service.
    isr: u8,
    /// Masked requests.
    imr: u8,
    /// Levels of the inputs.
    lines: u8,
    /// Level-triggered inputs.
    elcr: u8,
    /// The input of lowest priority; the next one has the highest.
    lowest: u8,
    /// Vector of input 0.
    base: u8,
    expect: Expect,
    needs_icw4: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    nested: bool,
    /// The next read of the command port polls.
    poll: bool,
    /// Reads of the command port give the ISR instead of the IRR.
    read_isr: bool,
}

impl Chip {
    const fn new() -> Self {
        Self {
            irr: 0,
            isr: 0,
            imr: 0xff,
            lines: 0,
            elcr: 0,
            lowest: 7,
            base: 0,
            expect: Expect::Nothing,
            needs_icw4: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            nested: false,
            poll: false,
            read_isr: false,
        }
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        let rises = level && self.lines & bit == 0;
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        if self.elcr & bit != 0 {
            self.irr = if level { self.irr | bit } else { self.irr & !bit };
        } else if rises {
            self.irr |= bit;
        }
    }

    /// How far `set`'s most urgent input is behind the highest priority: 0 to 7, or 8 if it is empty.
    fn priority(&self, set: u8) -> u8 {
        let highest = self.lowest.wrapping_add(1) & 7;
        set.rotate_right(highest.into()).trailing_zeros() as u8
    }

    /// The input to be served now. `cascade` inputs may interrupt themselves in special fully nested mode.
    fn pending(&self, cascade: u8) -> Option<u8> {
        let request = self.priority(self.irr & !self.imr);
        // In special mask mode, masked inputs in service bar nobody.
        let mut barring = self.isr;
        if self.special_mask {
            barring &= !self.imr;
        }
        if self.nested {
            barring &= !cascade;
        }
        (request < self.priority(barring)).then(|| (request + self.lowest + 1) & 7)
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.lowest = input;
            }
        } else {
            self.isr |= bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & ICW1 != 0 {
            // The edge detectors are cleared; the mask, and the lines of level-triggered inputs, too (datasheet, ICW1).
            let elcr = self.elcr;
            let lines = self.lines;
            *self = Self { elcr, lines, irr: lines & elcr, imr: 0, expect: Expect::Icw2, ..Self::new() };
            self.needs_icw4 = value & ICW1_ICW4 != 0;
        } else if value & OCW3 != 0 {
            self.poll = value & 1 << 2 != 0;
            if value & 1 << 1 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 1 << 6 != 0 {
                self.special_mask = value & 1 << 5 != 0;
            }
        } else {
            self.end_of_interrupt(value >> 5, value & 7);
        }
    }

    /// OCW2: rotate, specific, end of interrupt.
    fn end_of_interrupt(&mut self, command: u8, input: u8) {
        let in_service = match self.priority(self.isr) {
            8 => None,
            priority => Some((priority + self.lowest + 1) & 7),
        };
        match command {
            0 => self.rotate_on_auto_eoi = false,
            4 => self.rotate_on_auto_eoi = true,
            1 | 5 => {
                if let Some(input) = in_service {
                    self.isr &= !(1 << input);
                    if command == 5 {
                        self.lowest = input;
                    }
                }
            }
            3 => self.isr &= !(1 << input),
            6 => self.lowest = input,
            7 => {
                self.isr &= !(1 << input);
                self.lowest = input;
            }
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        self.expect = match self.expect {
            Expect::Nothing => {
                self.imr = value;
                Expect::Nothing
            }
            Expect::Icw2 => {
                self.base = value & 0xf8;
                // In a PC the chips are always cascaded, so an ICW3 follows.
                Expect::Icw3
            }
            Expect::Icw3 if self.needs_icw4 => Expect::Icw4,
            Expect::Icw3 => Expect::Nothing,
            Expect::Icw4 => {
                self.auto_eoi = value & ICW4_AUTO_EOI != 0;
                self.nested = value & ICW4_NESTED != 0;
                Expect::Nothing
            }
        };
    }
}

/// The pair.
#[derive(Debug)]
pub struct Pics {
    chips: [Chip; 2],
}

impl Default for Pics {
    fn default() -> Self {
        Self::new()
    }
}

impl Pics {
    /// The state after reset: everything masked, so that nothing happens before the guest programs them.
    #[must_use]
    pub fn new() -> Self {
        Self { chips: [Chip::new(), Chip::new()] }
    }

    /// Sets the level of `irq`, 0 to 15. Says whether the pair now wants to interrupt and did not before.
    pub fn set_line(&mut self, irq: u8, level: bool) -> bool {
        let before = self.is_pending();
        match irq {
            CASCADE => {}
            0..=7 => self.chips[0].set_line(irq, level),
            8..=15 => self.chips[1].set_line(irq - 8, level),
            _ => {}
        }
        self.update() && !before
    }

    /// Connects the second chip's output to the first; says whether the first one's is up.
    fn update(&mut self) -> bool {
        let [first, second] = &mut self.chips;
        let output = second.pending(0).is_some();
        first.set_line(CASCADE, output);
        if !output {
            // The line is combinational: without request behind it no edge stays latched.
            first.irr &= !(1 << CASCADE);
        }
        self.is_pending()
    }

    /// Whether the pair wants to interrupt the CPU.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.chips[0].pending(1 << CASCADE).is_some()
    }

    /// The CPU takes the interrupt: its vector. Without one pending it is a spurious one, input 7.
    pub fn acknowledge(&mut self) -> u8 {
        let [first, second] = &mut self.chips;
        let Some(input) = first.pending(1 << CASCADE) else { return first.base + 7 };
        first.acknowledge(input);
        let vector = if input == CASCADE {
            match second.pending(0) {
                Some(input) => {
                    second.acknowledge(input);
                    second.base + input
                }
                None => second.base + 7,
            }
        } else {
            first.base + input
        };
        // The cascade has to rise again for further requests of the second chip.
        first.lines &= !(1 << CASCADE);
        self.update();
        vector
    }

    /// Reads a port: of the second chip or the first, data or command.
    pub fn read(&mut self, second: bool, data: bool) -> u8 {
        let chip = &mut self.chips[usize::from(second)];
        if chip.poll {
            chip.poll = false;
            let Some(input) = chip.pending(0) else { return 0 };
            chip.acknowledge(input);
            self.update();
            return 1 << 7 | input;
        }
        match (data, chip.read_isr) {
            (true, _) => chip.imr,
            (false, true) => chip.isr,
            (false, false) => chip.irr,
        }
    }

    /// Writes a port. Says whether the pair now wants to interrupt and did not before.
    pub fn write(&mut self, second: bool, data: bool, value: u8) -> bool {
        let before = self.is_pending();
        let chip = &mut self.chips[usize::from(second)];
        if data {
            chip.write_data(value);
        } else {
            chip.write_command(value);
        }
        self.update() && !before
    }

    /// The edge/level control register of the second chip or the first.
    #[must_use]
    pub fn level_triggered(&self, second: bool) -> u8 {
        self.chips[usize::from(second)].elcr
    }

    /// Sets the edge/level control register. Timer, keyboard, cascade, clock and coprocessor stay edge-triggered.
    pub fn set_level_triggered(&mut self, second: bool, value: u8) {
        self.chips[usize::from(second)].elcr = value & if second { 0xde } else { 0xf8 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Initialised as Linux does: vectors 0x30 and 0x38, all unmasked.
    fn pics(icw4: u8) -> Pics {
        let mut pics = Pics::new();
        for (second, base, icw3) in [(false, 0x30, 4), (true, 0x38, 2)] {
            pics.write(second, false, 0x11);
            for value in [base, icw3, icw4, 0] {
                pics.write(second, true, value);
            }
        }
        pics
    }

    fn pulse(pics: &mut Pics, irq: u8) -> bool {
        let rises = pics.set_line(irq, true);
        pics.set_line(irq, false);
        rises
    }

    #[test]
    fn nothing_happens_before_initialisation() {
        let mut pics = Pics::new();
        for irq in 0..16 {
            assert!(!pulse(&mut pics, irq));
        }
        assert_eq!((pics.read(false, true), pics.read(true, true)), (0xff, 0xff));
    }

    #[test]
    fn an_edge_is_latched_and_taken_once() {
        let mut pics = pics(1);
        assert!(pulse(&mut pics, 4));
        assert!(!pulse(&mut pics, 4), "already pending");
        assert_eq!(pics.read(false, false), 0x10, "IRR");
        assert_eq!(pics.acknowledge(), 0x34);
        assert!(!pics.is_pending());
        pics.write(false, false, 0x0b);
        assert_eq!(pics.read(false, false), 0x10, "ISR");
        assert!(!pulse(&mut pics, 4), "in service");
        assert!(pics.write(false, false, 0x20), "after its end the second one comes");
        assert_eq!(pics.acknowledge(), 0x34);
    }

    #[test]
    fn priorities_nest() {
        let mut pics = pics(1);
        pulse(&mut pics, 5);
        assert_eq!(pics.acknowledge(), 0x35);
        assert!(!pulse(&mut pics, 6), "lower priority waits");
        assert!(pulse(&mut pics, 1), "higher priority interrupts");
        assert_eq!(pics.acknowledge(), 0x31);
        assert!(!pics.write(false, false, 0x20), "5 still bars 6");
        assert!(pics.write(false, false, 0x65), "specific end of 5");
        assert_eq!(pics.acknowledge(), 0x36);
    }

    #[test]
    fn the_second_chip_comes_through_the_first() {
        let mut pics = pics(1);
        assert!(pulse(&mut pics, 12));
        assert_eq!(pics.acknowledge(), 0x3c);
        assert!(!pulse(&mut pics, 14), "cascade in service");
        pics.write(true, false, 0x20);
        assert!(pics.write(false, false, 0x20));
        assert_eq!(pics.acknowledge(), 0x3e);
        pics.write(true, false, 0x20);
        assert!(!pics.write(false, false, 0x20));
        pics.write(false, true, 1 << CASCADE);
        assert!(!pulse(&mut pics, 9), "the cascade is masked");
        assert!(pics.write(false, true, 0));
        assert_eq!(pics.acknowledge(), 0x39);
    }

    #[test]
    fn masks_hold_requests_back() {
        let mut pics = pics(1);
        pics.write(false, true, 0xef);
        assert!(!pulse(&mut pics, 3));
        assert!(pulse(&mut pics, 4));
        assert_eq!(pics.acknowledge(), 0x34);
        pics.write(false, false, 0x20);
        assert!(pics.write(false, true, 0));
        assert_eq!(pics.acknowledge(), 0x33);
    }

    #[test]
    fn level_triggered_inputs_repeat_while_up() {
        let mut pics = pics(1);
        pics.set_level_triggered(true, 0xff);
        assert_eq!(pics.level_triggered(true), 0xde);
        assert!(pics.set_line(10, true));
        assert_eq!(pics.acknowledge(), 0x3a);
        pics.write(true, false, 0x20);
        assert!(pics.write(false, false, 0x20), "still up");
        pics.set_line(10, false);
        assert!(!pics.is_pending());
    }

    #[test]
    fn automatic_end_and_rotation() {
        let mut pics = pics(3);
        pulse(&mut pics, 4);
        assert_eq!(pics.acknowledge(), 0x34);
        assert!(pulse(&mut pics, 4), "not in service any more");
        assert_eq!(pics.acknowledge(), 0x34);
        pics.write(false, false, 0xc3);
        pulse(&mut pics, 3);
        assert!(pics.is_pending());
        pulse(&mut pics, 4);
        assert_eq!(pics.acknowledge(), 0x34, "3 is now of lowest priority");
    }

    #[test]
    fn spurious_and_poll() {
        let mut pics = pics(1);
        assert_eq!(pics.acknowledge(), 0x37);
        pulse(&mut pics, 6);
        pics.write(false, false, 0x0c);
        assert_eq!(pics.read(false, false), 0x86);
        assert!(!pics.is_pending());
        pics.write(false, false, 0x0c);
        assert_eq!(pics.read(false, false), 0);
    }
}
