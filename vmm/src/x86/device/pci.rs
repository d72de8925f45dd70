// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ports 0xcf8 to 0xcff: PCI configuration mechanism 1 (PCI Local Bus Specification 3.0, section 3.2.2.3.2) of a bus with
//! nothing on it but its host bridge, without which Linux complains. In between lies the reset control register, 0xcf9,
//! which byte accesses reach (Intel ICH data sheets).

use std::sync::Arc;

use crate::control::{Control, Stop};
use crate::device::Device;

/// Offset of the reset control register.
const RESET: u64 = 1;
/// Reset control: reset the CPU.
const RESET_CPU: u8 = 1 << 2;
/// Offset of the data port.
const DATA: u64 = 4;

/// Address register: accesses of the data port go to configuration space.
const ENABLE: u32 = 1 << 31;
/// Address register: bits that exist; bus 23:16, device 15:11, function 10:8, register 7:2.
const ADDRESS: u32 = ENABLE | 0x00ff_fffc;

/// Configuration space of the host bridge: vendor and device (Intel, 440FX, which every guest knows), class (bridge, host).
const BRIDGE: [(u32, u32); 2] = [(0x00, 0x1237_8086), (0x08, 0x0600_0002)];

/// The ports on the bus.
pub struct PciPorts {
    control: Arc<Control>,
    address: u32,
}

impl PciPorts {
    /// After reset.
    #[must_use]
    pub fn new(control: &Arc<Control>) -> Self {
        Self { control: Arc::clone(control), address: 0 }
    }

    /// The doubleword that the address register points at.
    fn data(&self) -> u32 {
        let register = self.address & 0xfc;
        if self.address & !0xfc != ENABLE {
            return u32::MAX; // another device than 00:00.0
        }
        BRIDGE.iter().find(|(at, _)| *at == register).map_or(0, |(_, value)| *value)
    }
}

impl Device for PciPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= DATA {
            let value = self.data().to_le_bytes();
            for (byte, value) in data.iter_mut().zip(value.iter().skip((offset - DATA) as usize)) {
                *byte = *value;
            }
        } else if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.to_le_bytes());
        } else if offset == RESET && data.len() == 1 {
            data[0] = 0;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.address = u32::from_le_bytes([a, b, c, d]) & ADDRESS,
            (RESET, [value]) if value & RESET_CPU != 0 => self.control.stop(Stop::Reset("reset control register")),
            // The bridge has nothing to configure.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::device::power::RESET_VALUE;

    fn ports() -> PciPorts {
        PciPorts::new(&Arc::new(Control::new().unwrap()))
    }

    fn read<const N: usize>(ports: &mut PciPorts, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        ports.read(offset, &mut data);
        data
    }

    fn select(ports: &mut PciPorts, bus: u32, device: u32, register: u32) {
        ports.write(0, &(ENABLE | bus << 16 | device << 11 | register).to_le_bytes());
    }

    #[test]
    fn the_mechanism_is_found_as_linux_looks_for_it() {
        let mut ports = ports();
        ports.write(3, &[1]);
        assert_eq!(u32::from_le_bytes(read(&mut ports, 0)), 0, "byte writes do not reach the address");
        ports.write(0, &ENABLE.to_le_bytes());
        assert_eq!(u32::from_le_bytes(read(&mut ports, 0)), ENABLE);
        select(&mut ports, 0, 0, 8);
        assert_eq!(u16::from_le_bytes(read(&mut ports, 6)), 0x0600, "class: host bridge");
    }

    #[test]
    fn the_bus_is_empty_but_for_the_bridge() {
        let mut ports = ports();
        select(&mut ports, 0, 0, 0);
        assert_eq!(read(&mut ports, 4), [0x86, 0x80, 0x37, 0x12]);
        select(&mut ports, 0, 0, 0x10);
        assert_eq!(read(&mut ports, 4), [0; 4]);
        ports.write(4, &[0xff; 4]);
        assert_eq!(read(&mut ports, 4), [0; 4]);
        for (bus, device) in [(0, 1), (0, 31), (1, 0), (255, 31)] {
            select(&mut ports, bus, device, 0);
            assert_eq!(read(&mut ports, 4), [0xff; 4]);
        }
        ports.write(0, &0u32.to_le_bytes());
        assert_eq!(read(&mut ports, 4), [0xff; 4], "not enabled");
        assert!(!ports.control.is_stopping());
    }

    #[test]
    fn the_value_that_acpi_tells_resets() {
        let mut ports = ports();
        ports.write(RESET, &[2]);
        assert!(!ports.control.is_stopping());
        assert_eq!(read(&mut ports, RESET), [0]);
        ports.write(RESET, &[RESET_VALUE]);
        assert!(matches!(ports.control.take_reason(), Some(Stop::Reset(_))));
    }
}
