// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two devices for people who write kernels: one ends the VM with a status, the other prints bytes.

use std::sync::Arc;

use crate::control::{Control, Stop};
use crate::device::Device;
use crate::terminal::Output;

/// Ports of the debug exit device.
pub const EXIT_PORTS: u16 = 4;

/// Ends the VM: a write of `v`, of any width, ends the program with status `(v << 1) | 1`.
pub struct DebugExit(pub Arc<Control>);

impl Device for DebugExit {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        // Only the first port counts: 32-bit writes to the others reach past the device, smaller ones are mistakes.
        if offset == 0 {
            let mut value = [0; 4];
            value[..data.len()].copy_from_slice(data);
            self.0.stop(Stop::DebugExit(u32::from_le_bytes(value)));
        }
    }
}

/// Prints each byte written to it. Reads answer 0xe9, by which guests tell that it is there.
pub struct DebugConsole(pub Output);

impl Device for DebugConsole {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xe9);
    }
    fn write(&mut self, _offset: u64, data: &[u8]) {
        self.0.put(data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_ends_the_vm() {
        for (data, value) in [(&[5u8][..], 5), (&[1, 2], 0x201), (&[1, 2, 3, 4], 0x0403_0201)] {
            let control = Arc::new(Control::new().unwrap());
            let mut device = DebugExit(Arc::clone(&control));
            let mut byte = [0xff];
            device.read(0, &mut byte);
            assert_eq!(byte, [0]);
            device.write(1, &[9]);
            assert!(!control.is_stopping());
            device.write(0, data);
            let reason = control.take_reason();
            assert!(matches!(reason, Some(Stop::DebugExit(v)) if v == value), "{reason:?}");
        }
    }

    #[test]
    fn console_prints_and_identifies_itself() {
        let (output, written) = Output::memory();
        let mut console = DebugConsole(output);
        console.write(0, b"h");
        console.write(0, b"i\n");
        assert_eq!(*crate::device::lock(&written), b"hi\n");
        let mut byte = [0];
        console.read(0, &mut byte);
        assert_eq!(byte, [0xe9]);
    }
}
