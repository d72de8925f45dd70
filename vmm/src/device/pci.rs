// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ports 0xcf8 to 0xcff of a machine without PCI: configuration reads as all ones, so guests find neither a mechanism
//! nor a device. In between lies the reset control register, 0xcf9, which byte accesses reach (Intel ICH data sheets).

use std::sync::Arc;

use super::Device;
use crate::control::{Control, Stop};

/// Offset of the reset control register.
const RESET: u64 = 1;
/// Reset control: reset the CPU.
const RESET_CPU: u8 = 1 << 2;

/// The ports on the bus.
pub struct PciPorts(pub Arc<Control>);

impl Device for PciPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset == RESET && data.len() == 1 {
            data[0] = 0;
        }
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == RESET && data.len() == 1 && data[0] & RESET_CPU != 0 {
            self.0.stop(Stop::Reset("reset control register"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::power::RESET_VALUE;

    #[test]
    fn there_is_no_pci() {
        let mut ports = PciPorts(Arc::new(Control::new().unwrap()));
        ports.write(0, &0x8000_0000u32.to_le_bytes());
        for (offset, size) in [(0, 4), (4, 4), (4, 1), (6, 2)] {
            let mut data = vec![0xff; size];
            ports.read(offset, &mut data);
            assert_eq!(data, vec![0xff; size]);
        }
        assert!(!ports.0.is_stopping());
    }

    #[test]
    fn the_value_that_acpi_tells_resets() {
        let ports = &mut PciPorts(Arc::new(Control::new().unwrap()));
        ports.write(RESET, &[2]);
        assert!(!ports.0.is_stopping());
        ports.write(RESET, &[RESET_VALUE]);
        assert!(matches!(ports.0.take_reason(), Some(Stop::Reset(_))));
    }
}
