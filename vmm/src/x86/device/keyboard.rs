// SPDX-License-Identifier: MIT OR Apache-2.0
//! The i8042 keyboard controller, of which there is only what resets the machine. No keyboard is attached.

use std::convert::Infallible;
use std::sync::Arc;

use vm_superio::{I8042Device, Trigger};

use crate::control::{Control, Stop};
use crate::device::Device;

/// Command that pulses the CPU's reset line.
struct ResetLine(Arc<Control>);

impl Trigger for ResetLine {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        self.0.stop(Stop::Reset("keyboard controller"));
        Ok(())
    }
}

/// One of its two ports on the bus.
pub struct Keyboard {
    device: I8042Device<ResetLine>,
    /// What the device calls the port: its distance from 0x60.
    port: u8,
}

impl Keyboard {
    /// For the port at 0x60 + `port`.
    #[must_use]
    pub fn new(control: &Arc<Control>, port: u8) -> Self {
        Self { device: I8042Device::new(ResetLine(Arc::clone(control))), port }
    }
}

impl Device for Keyboard {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data[0] = self.device.read(self.port);
    }
    fn write(&mut self, _offset: u64, data: &[u8]) {
        let Ok(()) = self.device.write(self.port, data[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let control = Arc::new(Control::new().unwrap());
        Keyboard::new(&control, 0).write(0, &[0xfe]);
        let mut commands = Keyboard::new(&control, 4);
        commands.write(0, &[0xd1]);
        assert!(!control.is_stopping());
        let mut status = [0xff];
        commands.read(0, &mut status);
        assert_eq!(status, [0], "ready for commands");
        commands.write(0, &[0xfe]);
        assert!(matches!(control.take_reason(), Some(Stop::Reset(_))));
    }
}
