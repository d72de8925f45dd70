// SPDX-License-Identifier: MIT OR Apache-2.0
//! The I/O APIC (Intel 82093AA data sheet, and the EOI register of later ones): turns interrupt lines into messages.
//!
//! Pure logic: it returns messages and knows neither locks nor the kernel.

/// Interrupt inputs.
pub const PINS: usize = 24;
/// Version register: 0x20, the first with an EOI register; bits 23:16 the number of the last pin.
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

/// Redirection entry bits 14 (remote IRR) and 12 (delivery status): read-only.
const REMOTE_IRR: u64 = 1 << 14;
const READ_ONLY: u64 = REMOTE_IRR | 1 << 12;
/// Redirection entry bit 15: level-triggered.
const LEVEL: u64 = 1 << 15;
/// Redirection entry bit 16: masked.
const MASKED: u64 = 1 << 16;
/// Redirection entry bits that exist: destination, and 16:0.
const WRITABLE: u64 = 0xff00_0000_0001_ffff & !READ_ONLY;

/// Register select.
const SELECT: u64 = 0x00;
/// Register window.
const WINDOW: u64 = 0x10;
/// End of interrupt.
const EOI: u64 = 0x40;

/// An interrupt message, in the format of MSI (SDM volume 3A, section 12.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Address.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// The I/O APIC.
#[derive(Debug)]
pub struct Ioapic {
    id: u32,
    select: u8,
    entries: [u64; PINS],
    /// Levels of the lines, one bit a pin.
    lines: u32,
}

impl Default for Ioapic {
    fn default() -> Self {
        Self::new()
    }
}

impl Ioapic {
    /// The state after reset: all pins masked.
    #[must_use]
    pub fn new() -> Self {
        Self { id: 0, select: 0, entries: [MASKED; PINS], lines: 0 }
    }

    /// Sets the level of a line. Returns the message that results. Pins that do not exist are ignored.
    pub fn set_line(&mut self, pin: u8, level: bool) -> Option<Message> {
        let entry = *self.entries.get(usize::from(pin))?;
        let mask = 1 << pin;
        let rises = level && self.lines & mask == 0;
        self.lines = if level { self.lines | mask } else { self.lines & !mask };
        if entry & LEVEL != 0 {
            return self.deliver_level(pin.into());
        }
        // The data sheet has edges on a masked pin ignored.
        (rises && entry & MASKED == 0).then(|| message(entry))
    }

    /// A level-triggered pin interrupts while its line is up, unless an earlier interrupt waits for its end.
    fn deliver_level(&mut self, pin: usize) -> Option<Message> {
        let entry = self.entries.get_mut(pin)?;
        if self.lines & 1 << pin == 0 || *entry & (MASKED | REMOTE_IRR) != 0 {
            return None;
        }
        *entry |= REMOTE_IRR;
        Some(message(*entry))
    }

    /// A CPU finished handling `vector`: pins with it may interrupt again, and do if their line is still up.
    pub fn end_of_interrupt(&mut self, vector: u8, mut send: impl FnMut(Message)) {
        for pin in 0..PINS {
            let entry = &mut self.entries[pin];
            if *entry & LEVEL != 0 && *entry & 0xff == u64::from(vector) && *entry & REMOTE_IRR != 0 {
                *entry &= !REMOTE_IRR;
                self.deliver_level(pin).map(&mut send);
            }
        }
    }

    /// The messages of the pins that are level-triggered, masked or not: those whose end it has to hear of.
    #[must_use]
    pub fn level_triggered(&self) -> [Option<Message>; PINS] {
        self.entries.map(|entry| (entry & LEVEL != 0).then(|| message(entry)))
    }

    /// Reads the register at `offset` of the page.
    #[must_use]
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            SELECT => self.select.into(),
            WINDOW => match self.select {
                0 | 2 => self.id,
                1 => VERSION,
                index => match self.entries.get(usize::from(index.wrapping_sub(0x10) / 2)) {
                    Some(entry) if index & 1 == 0 => *entry as u32,
                    Some(entry) => (*entry >> 32) as u32,
                    None => 0,
                },
            },
            _ => 0,
        }
    }

    /// Writes the register at `offset` of the page.
    pub fn write(&mut self, offset: u64, value: u32, mut send: impl FnMut(Message)) {
        match offset {
            SELECT => self.select = value as u8,
            WINDOW if self.select == 0 => self.id = value & 0x0f00_0000,
            WINDOW => {
                let pin = usize::from(self.select.wrapping_sub(0x10) / 2);
                let Some(entry) = self.entries.get_mut(pin) else { return };
                let half = 32 * u32::from(self.select & 1);
                let merged = (*entry & !(0xffff_ffff << half)) | u64::from(value) << half;
                *entry = (merged & WRITABLE) | (*entry & READ_ONLY);
                if *entry & LEVEL == 0 {
                    // Guests clear a stuck remote IRR by switching a pin to edge for a moment.
                    *entry &= !REMOTE_IRR;
                } else {
                    self.deliver_level(pin).map(&mut send);
                }
            }
            EOI => self.end_of_interrupt(value as u8, send),
            _ => {}
        }
    }
}

/// The message of a redirection entry: vector, delivery mode and trigger have the same places in both.
fn message(entry: u64) -> Message {
    const ASSERT: u32 = 1 << 14;
    let destination = entry >> 56 << 12;
    let logical = (entry >> 11 & 1) << 2;
    // Delivery mode 1, lowest priority, wants the redirection hint.
    let hint = u64::from(entry >> 8 & 7 == 1) << 3;
    Message { address: 0xfee0_0000 | destination | hint | logical, data: (entry & (LEVEL | 0x7ff)) as u32 | ASSERT }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ioapic(pin: u8, low: u32, high: u32) -> Ioapic {
        let mut ioapic = Ioapic::new();
        write(&mut ioapic, 0x11 + 2 * pin, high);
        write(&mut ioapic, 0x10 + 2 * pin, low);
        ioapic
    }

    fn write(ioapic: &mut Ioapic, index: u8, value: u32) -> Vec<Message> {
        let mut sent = Vec::new();
        ioapic.write(SELECT, index.into(), |m| sent.push(m));
        ioapic.write(WINDOW, value, |m| sent.push(m));
        sent
    }

    fn read(ioapic: &mut Ioapic, index: u8) -> u32 {
        ioapic.write(SELECT, index.into(), |_| ());
        ioapic.read(WINDOW)
    }

    #[test]
    fn registers() {
        let mut ioapic = Ioapic::new();
        assert_eq!(read(&mut ioapic, 1), 0x0017_0020);
        for index in (0x10..0x40).step_by(2) {
            assert_eq!((read(&mut ioapic, index), read(&mut ioapic, index + 1)), (0x1_0000, 0));
        }
        write(&mut ioapic, 0, 0xffff_ffff);
        assert_eq!(read(&mut ioapic, 0), 0x0f00_0000);
        write(&mut ioapic, 0x3e, 0xffff_ffff);
        write(&mut ioapic, 0x3f, 0xffff_ffff);
        assert_eq!(read(&mut ioapic, 0x3e), 0x0001_afff, "read-only bits stay clear");
        assert_eq!(read(&mut ioapic, 0x3f), 0xff00_0000);
        for index in [3, 0x0f, 0x40, 0xff] {
            write(&mut ioapic, index, 0xffff_ffff);
            assert_eq!(read(&mut ioapic, index), 0, "register {index:#x}");
        }
    }

    #[test]
    fn an_edge_is_one_message() {
        let mut ioapic = ioapic(4, 0x0000_0931, 0x0300_0000);
        let expected = Message { address: 0xfee0_300c, data: 0x4131 };
        assert_eq!(ioapic.set_line(4, true), Some(expected));
        assert_eq!(ioapic.set_line(4, true), None);
        assert_eq!(ioapic.set_line(4, false), None);
        assert_eq!(ioapic.set_line(4, true), Some(expected));
        assert_eq!(ioapic.set_line(24, true), None);
        assert_eq!(ioapic.set_line(255, true), None);
    }

    #[test]
    fn masked_edges_are_lost_and_masked_levels_wait() {
        let mut edge = ioapic(4, 0x1_0031, 0);
        assert_eq!(edge.set_line(4, true), None);
        assert_eq!(write(&mut edge, 0x18, 0x31), []);
        let mut level = ioapic(4, 0x1_8031, 0);
        assert_eq!(level.set_line(4, true), None);
        assert_eq!(write(&mut level, 0x18, 0x8031), [Message { address: 0xfee0_0000, data: 0xc031 }]);
    }

    #[test]
    fn a_level_interrupts_again_after_its_end_only() {
        let mut ioapic = ioapic(9, 0x8055, 0);
        let message = Message { address: 0xfee0_0000, data: 0xc055 };
        assert_eq!(ioapic.set_line(9, true), Some(message));
        assert_eq!(read(&mut ioapic, 0x22), 0xc055, "remote IRR");
        assert_eq!(ioapic.set_line(9, false), None);
        assert_eq!(ioapic.set_line(9, true), None, "not before the end of the first");
        let mut sent = Vec::new();
        ioapic.end_of_interrupt(0x54, |m| sent.push(m));
        assert_eq!(sent, [], "another vector");
        ioapic.end_of_interrupt(0x55, |m| sent.push(m));
        assert_eq!(sent, [message], "the line is still up");
        ioapic.set_line(9, false);
        ioapic.write(EOI, 0x55, |m| sent.push(m));
        assert_eq!(sent.len(), 1);
        assert_eq!(read(&mut ioapic, 0x22), 0x8055);
    }

    #[test]
    fn switching_to_edge_clears_remote_irr() {
        let mut ioapic = ioapic(9, 0x8055, 0);
        ioapic.set_line(9, true);
        write(&mut ioapic, 0x22, 0x55);
        assert_eq!(read(&mut ioapic, 0x22), 0x55);
    }
}
