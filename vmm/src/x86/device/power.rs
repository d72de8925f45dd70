// SPDX-License-Identifier: MIT OR Apache-2.0
//! Switching off: the ACPI sleep registers of a hardware-reduced platform (ACPI 6.5, section 4.8.3.7), and system control
//! port A with its fast reset.

use std::sync::Arc;

use crate::control::{Control, Stop};
use crate::device::Device;

/// Sleep type of S5, soft off; told to the guest by `\_S5` in the DSDT.
pub const SLEEP_TYPE_S5: u8 = 5;
/// What the guest writes to the reset control register; told by the FADT.
pub const RESET_VALUE: u8 = 6;

/// Sleep control register: enter the sleep state.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Sleep control register: bits 4:2 the sleep type.
const SLEEP_TYPE_SHIFT: u8 = 2;

/// The sleep control and sleep status registers on the bus.
pub struct AcpiSleep(pub Arc<Control>);

impl Device for AcpiSleep {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Never asleep, so never woken.
        data.fill(0);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        let value = data[0];
        if offset == 0 && value & SLEEP_ENABLE != 0 && value >> SLEEP_TYPE_SHIFT & 7 == SLEEP_TYPE_S5 {
            self.0.stop(Stop::Shutdown);
        }
    }
}

/// System control port A, 0x92: bit 1 opens address line 20, bit 0 resets the CPU.
pub struct SystemControlA {
    control: Arc<Control>,
    value: u8,
}

impl SystemControlA {
    /// With address line 20 open; it cannot be closed.
    #[must_use]
    pub fn new(control: &Arc<Control>) -> Self {
        Self { control: Arc::clone(control), value: A20 }
    }
}

const FAST_RESET: u8 = 1 << 0;
const A20: u8 = 1 << 1;

impl Device for SystemControlA {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data[0] = self.value;
    }
    fn write(&mut self, _offset: u64, data: &[u8]) {
        self.value = (data[0] | A20) & !FAST_RESET;
        if data[0] & FAST_RESET != 0 {
            self.control.stop(Stop::Reset("system control port A"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_soft_off_switches_off() {
        let mut sleep = AcpiSleep(Arc::new(Control::new().unwrap()));
        for (offset, value) in
            [(0, SLEEP_TYPE_S5 << 2), (0, SLEEP_ENABLE | 3 << 2), (1, SLEEP_ENABLE | 5 << 2), (1, 0x80)]
        {
            sleep.write(offset, &[value]);
            assert!(!sleep.0.is_stopping(), "{value:#x} at {offset}");
        }
        sleep.write(0, &[SLEEP_ENABLE | SLEEP_TYPE_S5 << 2]);
        assert!(matches!(sleep.0.take_reason(), Some(Stop::Shutdown)));
    }

    #[test]
    fn fast_reset_and_a20() {
        let control = Arc::new(Control::new().unwrap());
        let mut port = SystemControlA::new(&control);
        let mut value = [0];
        port.write(0, &[0]);
        port.read(0, &mut value);
        assert_eq!(value, [A20]);
        assert!(!control.is_stopping());
        port.write(0, &[A20 | FAST_RESET]);
        assert!(matches!(control.take_reason(), Some(Stop::Reset(_))));
    }
}
