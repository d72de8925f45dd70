// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where interrupt lines lead: the two kinds of controller that a device reaches, 8259 pair and I/O APIC.
//!
//! As in a PC both see every line, and the guest masks the one it does not use. The I/O APIC sends messages to the
//! in-kernel local APICs; the 8259s interrupt the boot processor, whose thread is kicked to take the vector in.

use std::sync::{Arc, Mutex};

use super::ioapic::{Ioapic, Message, PINS};
use super::pic::Pics;
use crate::device::line::Lines;
use crate::device::{lock, read_bytes, Device};

/// ISA interrupt of the timer.
pub const IRQ_TIMER: u8 = 0;
/// ISA interrupt of COM1.
pub const IRQ_COM1: u8 = 4;
/// I/O APIC pin of the timer: 2, where the first 8259 cascades the second. Told by an override in the MADT.
pub const ISA_TIMER_GSI: u32 = 2;

/// Takes the I/O APIC's messages.
pub trait MessageSink: Send + Sync {
    /// Delivers a message to the local APICs.
    fn send(&self, message: Message);

    /// The messages of the I/O APIC's level-triggered pins have changed: for local APICs that have to be told whose end
    /// they shall report.
    fn level_triggered(&self, _pins: &[Option<Message>; PINS]) {}
}

/// The interrupt controllers outside of the CPUs.
pub struct Interrupts {
    ioapic: Mutex<Ioapic>,
    pics: Mutex<Pics>,
    messages: Box<dyn MessageSink>,
    /// Makes the boot processor look at the 8259s.
    kick: Box<dyn Fn() + Send + Sync>,
}

impl Interrupts {
    /// Controllers after reset. `kick` makes the boot processor's thread call [`acknowledge`](Self::acknowledge) soon.
    pub fn new(messages: Box<dyn MessageSink>, kick: Box<dyn Fn() + Send + Sync>) -> Arc<Self> {
        Arc::new(Self { ioapic: Mutex::new(Ioapic::new()), pics: Mutex::new(Pics::new()), messages, kick })
    }

    /// Sets the level of ISA interrupt `irq`, 0 to 15.
    pub fn set(&self, irq: u8, level: bool) {
        if lock(&self.pics).set_line(irq, level) {
            (self.kick)();
        }
        let pin = if irq == IRQ_TIMER { ISA_TIMER_GSI as u8 } else { irq };
        // Messages are sent under the lock, so that they arrive in the order of events.
        let mut ioapic = lock(&self.ioapic);
        if let Some(message) = ioapic.set_line(pin, level) {
            self.messages.send(message);
        }
    }

    /// A CPU finished handling level-triggered `vector`.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut ioapic = lock(&self.ioapic);
        ioapic.end_of_interrupt(vector, |message| self.messages.send(message));
    }

    /// Whether the 8259s want to interrupt the boot processor.
    pub fn is_pending(&self) -> bool {
        lock(&self.pics).is_pending()
    }

    /// The boot processor takes the interrupt of the 8259s: its vector.
    pub fn acknowledge(&self) -> Option<u8> {
        let mut pics = lock(&self.pics);
        pics.is_pending().then(|| pics.acknowledge())
    }
}

impl Lines for Interrupts {
    fn set(&self, number: u32, level: bool) {
        // Devices are given ISA interrupts.
        Self::set(self, number as u8, level);
    }
}

/// The I/O APIC's registers on the bus.
pub struct IoapicRegisters(pub Arc<Interrupts>);

impl Device for IoapicRegisters {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = lock(&self.0.ioapic).read(offset).to_le_bytes();
        for (byte, value) in data.iter_mut().zip(value) {
            *byte = value;
        }
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        for (value, byte) in value.iter_mut().zip(data) {
            *value = *byte;
        }
        let mut ioapic = lock(&self.0.ioapic);
        let before = ioapic.level_triggered();
        let mut messages = Vec::new();
        ioapic.write(offset, u32::from_le_bytes(value), |message| messages.push(message));
        let after = ioapic.level_triggered();
        if after != before {
            // Before the first message, whose end may come at once.
            self.0.messages.level_triggered(&after);
        }
        for message in messages {
            self.0.messages.send(message);
        }
    }
}

/// One chip's ports of the 8259 pair on the bus: command and data.
pub struct PicPorts {
    interrupts: Arc<Interrupts>,
    second: bool,
}

impl PicPorts {
    /// The ports of the first chip, or of the second.
    #[must_use]
    pub fn new(interrupts: &Arc<Interrupts>, second: bool) -> Self {
        Self { interrupts: Arc::clone(interrupts), second }
    }
}

impl Device for PicPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |port| lock(&self.interrupts.pics).read(self.second, port == 1));
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        for (port, value) in (offset..).zip(data) {
            if lock(&self.interrupts.pics).write(self.second, port == 1, *value) {
                (self.interrupts.kick)();
            }
        }
    }
}

/// The edge/level control registers of the 8259 pair on the bus.
pub struct ElcrPorts(pub Arc<Interrupts>);

impl Device for ElcrPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |port| lock(&self.0.pics).level_triggered(port == 1));
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        for (port, value) in (offset..).zip(data) {
            lock(&self.0.pics).set_level_triggered(port == 1, *value);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::device::line::Line;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Clone, Default)]
    pub(in crate::x86::device) struct Messages(pub(in crate::x86::device) Arc<Mutex<Vec<Message>>>);
    impl MessageSink for Messages {
        fn send(&self, message: Message) {
            lock(&self.0).push(message);
        }
    }

    pub(in crate::x86::device) fn interrupts() -> (Arc<Interrupts>, Messages, Arc<AtomicUsize>) {
        let (messages, kicks) = (Messages::default(), Arc::new(AtomicUsize::new(0)));
        let counter = Arc::clone(&kicks);
        let kick = Box::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        (Interrupts::new(Box::new(messages.clone()), kick), messages, kicks)
    }

    #[test]
    fn timer_goes_to_pin_2_and_other_lines_to_their_number() {
        let (interrupts, messages, _) = interrupts();
        let mut registers = IoapicRegisters(Arc::clone(&interrupts));
        for (pin, vector) in [(2u8, 0x30u32), (4, 0x34)] {
            registers.write(0, &[0x10 + 2 * pin, 0, 0, 0]);
            registers.write(0x10, &vector.to_le_bytes());
        }
        Line::new(&interrupts, IRQ_TIMER).pulse();
        Line::new(&interrupts, IRQ_COM1).pulse();
        let vectors: Vec<u32> = lock(&messages.0).iter().map(|message| message.data & 0xff).collect();
        assert_eq!(vectors, [0x30, 0x34]);
    }

    #[test]
    fn local_apics_learn_of_level_triggered_pins_before_the_first_message() {
        #[derive(Clone, Default)]
        struct Recorder(Arc<Mutex<Vec<String>>>);
        impl MessageSink for Recorder {
            fn send(&self, message: Message) {
                lock(&self.0).push(format!("{:#x}", message.data));
            }
            fn level_triggered(&self, pins: &[Option<Message>; PINS]) {
                let pins = (0..).zip(pins).filter_map(|(pin, message)| message.map(|m| format!("{pin}:{:#x}", m.data)));
                lock(&self.0).push(pins.collect());
            }
        }
        let recorder = Recorder::default();
        let interrupts = Interrupts::new(Box::new(recorder.clone()), Box::new(|| ()));
        let mut registers = IoapicRegisters(Arc::clone(&interrupts));
        Line::new(&interrupts, 9u8).set(true);
        // Edge, masked: nothing. Level: told before the line's message. Masked: not told again. Edge: told.
        for low in [0x1_0055u32, 0x8055, 0x1_8055, 0x55] {
            registers.write(0, &[0x10 + 2 * 9, 0, 0, 0]);
            registers.write(0x10, &low.to_le_bytes());
        }
        assert_eq!(*lock(&recorder.0), ["9:0xc055", "0xc055", ""]);
    }

    #[test]
    fn boot_cpu_is_kicked_for_the_8259s_once_they_are_unmasked() {
        let (interrupts, _, kicks) = interrupts();
        let mut first = PicPorts::new(&interrupts, false);
        for (port, value) in [(0, 0x11), (1, 0x20), (1, 4), (1, 1), (1, 0xff)] {
            first.write(port, &[value]);
        }
        Line::new(&interrupts, 4u8).pulse();
        assert_eq!((kicks.load(Ordering::Relaxed), interrupts.acknowledge()), (0, None));
        first.write(1, &[0xef]);
        assert_eq!(kicks.load(Ordering::Relaxed), 1);
        assert!(interrupts.is_pending());
        assert_eq!(interrupts.acknowledge(), Some(0x24));
        assert_eq!(interrupts.acknowledge(), None);
    }
}
