// SPDX-License-Identifier: MIT OR Apache-2.0
//! What all vCPUs of a VM share: memory and devices; and how they are put together. The interrupt controller is the
//! hypervisor's.

use std::sync::{Arc, Mutex};

use super::device::clock::Clock;
use super::hypervisor::Arm64Vm;
use super::layout::{CLOCK, DEVICE_SIZE, SERIAL, SERIAL_INTID};
use crate::control::Control;
use crate::device::line::Line;
use crate::device::serial::SerialPort;
use crate::device::Bus;
use crate::error::Error;
use crate::events::Served;
use crate::memory::Ram;
use crate::vm::Parts;

/// A machine, ready for CPUs.
pub struct Machine {
    /// Guest RAM.
    pub ram: Ram,
    /// Device registers by physical address.
    pub mmio: Bus,
    /// How to stop.
    pub control: Arc<Control>,
}

impl Machine {
    /// Puts the devices of `vm` on their bus.
    ///
    /// # Errors
    /// None.
    pub fn new(vm: &impl Arm64Vm, parts: Parts<'_>) -> Result<(Self, Served), Error> {
        let Parts { ram, serial, control, .. } = parts;
        let mut mmio = Bus::new();
        let registers = |at: u64| at..=at + DEVICE_SIZE - 1;
        mmio.attach(&registers(CLOCK), Arc::new(Mutex::new(Clock::new())));
        let serial = serial.map(|output| {
            let line = Line::new(&vm.lines(), SERIAL_INTID);
            let device = Arc::new(Mutex::new(SerialPort::new(line, output, &control)));
            // The registers of a 16550; the rest of the page is empty.
            mmio.attach(&(SERIAL..=SERIAL + 7), device.clone());
            device
        });
        Ok((Self { ram, mmio, control }, Served { serial, timer: None }))
    }

    /// How many accesses no device answered, for people.
    #[must_use]
    pub fn unclaimed(&self) -> String {
        self.mmio.unclaimed().to_string()
    }
}
