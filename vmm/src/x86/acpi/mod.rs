// SPDX-License-Identifier: MIT OR Apache-2.0
//! ACPI tables: what tells a guest of its CPUs, interrupt controllers, serial port and clock, and how to switch off or
//! reset. A hardware-reduced platform (ACPI 6.5, section 4.1): no fixed hardware but sleep and reset registers.

mod aml;

use axvcpu_uapi::addr::GuestPhysAddr;

use crate::memory::{OutOfRam, Ram};
use crate::x86::device::irq::{IRQ_COM1, ISA_TIMER_GSI};
use crate::x86::device::power;
use crate::x86::layout::{self, port};

/// FADT flags (ACPI 6.5, table 5.10): WBINVD works; power and sleep button are no fixed hardware; there is a reset register;
/// headless; hardware-reduced.
const FADT_FLAGS: u32 = 1 << 0 | 1 << 4 | 1 << 5 | 1 << 10 | 1 << 12 | 1 << 20;
/// FADT profile: a server.
const PROFILE_SERVER: u8 = 4;
/// FADT boot flag: ISA devices are there.
const LEGACY_DEVICES: u16 = 1 << 0;
/// FADT boot flag: do not probe for VGA.
const VGA_NOT_PRESENT: u16 = 1 << 2;
/// FADT boot flag: do not use PCIe ASPM.
const NO_ASPM: u16 = 1 << 4;
/// MADT flag: there is a pair of 8259s.
const PCAT_COMPAT: u32 = 1 << 0;

/// What the tables describe, apart from what never changes.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// CPUs, with APIC ids from 0.
    pub cpus: u32,
    /// Whether there is a COM1.
    pub serial: bool,
}

/// The tables, with the addresses they refer to each other by.
#[derive(Debug)]
pub struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Builds the tables for [`layout::ACPI`].
    ///
    /// # Panics
    /// If they do not fit there: only with thousands of CPUs, which the ABI does not allow.
    #[must_use]
    pub fn new(machine: &Machine) -> Self {
        let mut bytes = vec![0; RSDP_SIZE];
        let mut add = |table: Vec<u8>| -> u64 {
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            let at = layout::ACPI.start + bytes.len() as u64;
            bytes.extend_from_slice(&table);
            at
        };
        let dsdt = add(dsdt(machine));
        let fadt = add(fadt(dsdt));
        let madt = add(madt(machine));
        let xsdt = add(table(b"XSDT", 1, &[fadt.to_le_bytes(), madt.to_le_bytes()].concat()));
        bytes[..RSDP_SIZE].copy_from_slice(&rsdp(xsdt));
        assert!(bytes.len() as u64 <= layout::RESET_VECTOR - layout::ACPI.start, "ACPI tables need more room");
        Self { bytes }
    }

    /// Where the root pointer (RSDP) lies: at a paragraph in the BIOS area, where guests that are not told look for it.
    #[must_use]
    pub fn rsdp(&self) -> GuestPhysAddr {
        GuestPhysAddr::new(layout::ACPI.start)
    }

    /// Writes the tables to guest memory.
    ///
    /// # Errors
    /// [`OutOfRam`].
    pub fn write(&self, ram: &Ram) -> Result<(), OutOfRam> {
        ram.write(self.rsdp(), &self.bytes)
    }
}

/// Size of the root pointer of revision 2.
const RSDP_SIZE: usize = 36;
/// Size of the header that all tables but the root pointer begin with.
const HEADER_SIZE: usize = 36;
/// Offset of the checksum in that header.
const HEADER_CHECKSUM: usize = 9;

/// What makes the bytes add up to 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// Root system description pointer (ACPI 6.5, section 5.2.5.3): signature, checksum, OEM, revision, RSDT, length, XSDT,
/// checksum of all.
fn rsdp(xsdt: u64) -> [u8; RSDP_SIZE] {
    let mut rsdp = [0; RSDP_SIZE];
    rsdp[..8].copy_from_slice(b"RSD PTR ");
    rsdp[9..15].copy_from_slice(b"AXVCPU");
    rsdp[15] = 2;
    rsdp[20] = RSDP_SIZE as u8;
    rsdp[24..32].copy_from_slice(&xsdt.to_le_bytes());
    // The first checksum covers what revision 0 had.
    rsdp[8] = checksum(&rsdp[..20]);
    rsdp[32] = checksum(&rsdp);
    rsdp
}

/// A table: header (ACPI 6.5, section 5.2.6) and body.
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Vec::with_capacity(HEADER_SIZE + body.len());
    table.extend_from_slice(signature);
    table.extend_from_slice(&((HEADER_SIZE + body.len()) as u32).to_le_bytes());
    table.extend_from_slice(&[revision, 0]);
    // OEM, OEM's table, its revision; creator, its revision.
    table.extend_from_slice(b"AXVCPUAXVMM   \x01\0\0\0AXVM\x01\0\0\0");
    table.extend_from_slice(body);
    table[HEADER_CHECKSUM] = checksum(&table);
    table
}

/// Generic address structure of an 8-bit I/O port.
fn io_register(port: u16) -> [u8; 12] {
    let mut register = [0; 12];
    register[..4].copy_from_slice(&[1, 8, 0, 1]);
    register[4..].copy_from_slice(&u64::from(port).to_le_bytes());
    register
}

/// Fixed ACPI description table (ACPI 6.5, section 5.2.9), version 6.5. Offsets are those of the specification.
fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = [0; 276];
    let mut put = |offset: usize, bytes: &[u8]| fadt[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(45, &[PROFILE_SERVER]);
    put(109, &(LEGACY_DEVICES | VGA_NOT_PRESENT | NO_ASPM).to_le_bytes());
    put(112, &FADT_FLAGS.to_le_bytes());
    put(116, &io_register(port::RESET));
    put(128, &[power::RESET_VALUE]);
    put(131, &[5]); // minor version
    put(140, &dsdt.to_le_bytes());
    put(244, &io_register(*port::ACPI_SLEEP.start()));
    put(256, &io_register(*port::ACPI_SLEEP.end()));
    put(268, b"AXVCPU\0\0");
    table(b"FACP", 6, &fadt[HEADER_SIZE..])
}

/// Multiple APIC description table (ACPI 6.5, section 5.2.12).
fn madt(machine: &Machine) -> Vec<u8> {
    let mut body = Vec::new();
    let mut put = |bytes: &[u8]| body.extend_from_slice(bytes);
    put(&(layout::LOCAL_APIC.start as u32).to_le_bytes());
    put(&PCAT_COMPAT.to_le_bytes());
    for id in 0..machine.cpus {
        match u8::try_from(id) {
            // Processor local APIC: UID, APIC id, enabled.
            Ok(id) if id < 0xff => put(&[0, 8, id, id, 1, 0, 0, 0]),
            // Processor local x2APIC: id, enabled, UID.
            _ => {
                put(&[9, 16, 0, 0]);
                for word in [id, 1, id] {
                    put(&word.to_le_bytes());
                }
            }
        }
    }
    // I/O APIC: id, address, first interrupt.
    put(&[1, 12, 0, 0]);
    put(&(layout::IOAPIC.start as u32).to_le_bytes());
    put(&[0; 4]);
    // Interrupt source override: ISA bus, IRQ 0, GSI, polarity and trigger as the bus has them.
    put(&[2, 10, 0, 0]);
    put(&ISA_TIMER_GSI.to_le_bytes());
    put(&[0, 0]);
    // Local APIC NMI: all processors, polarity and trigger as the bus has them, LINT1.
    put(&[4, 6, 0xff, 0, 0, 1]);
    table(b"APIC", 5, &body)
}

/// Differentiated system description table: the devices.
fn dsdt(machine: &Machine) -> Vec<u8> {
    let mut devices = Vec::new();
    if machine.serial {
        let resources = [aml::edge_interrupt(IRQ_COM1.into()), aml::io(*port::COM1.start(), 8)];
        devices.push(aml::device(
            b"COM1",
            &[
                aml::name(b"_HID", &aml::integer(aml::eisa_id(b"PNP0501"))),
                aml::name(b"_UID", &aml::integer(1)),
                // Present, enabled, shown, working.
                aml::name(b"_STA", &aml::integer(0xf)),
                aml::name(b"_CRS", &aml::resources(&resources)),
            ],
        ));
    }
    devices.push(aml::device(
        b"RTC0",
        &[
            aml::name(b"_HID", &aml::integer(aml::eisa_id(b"PNP0B00"))),
            aml::name(b"_CRS", &aml::resources(&[aml::io(*port::CMOS.start(), 2)])),
        ],
    ));
    // Soft off: the sleep type, and three fields that a hardware-reduced platform has no use for.
    let soft_off = [aml::integer(power::SLEEP_TYPE_S5.into()), aml::integer(0), aml::integer(0), aml::integer(0)];
    table(b"DSDT", 2, &[aml::scope(b"_SB_", &devices), aml::name(b"_S5_", &aml::array(&soft_off))].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryRegion;

    /// Finds tables the way a guest does.
    struct Guest(Vec<u8>);

    impl Guest {
        fn new(machine: &Machine) -> Self {
            let ram = Ram::new(&[MemoryRegion { base: 0, size: 2 << 20 }]).unwrap();
            Tables::new(machine).write(&ram).unwrap();
            let mut bytes = vec![0; 1 << 20];
            ram.read(GuestPhysAddr::new(0), &mut bytes).unwrap();
            Self(bytes)
        }
        fn at(&self, address: u64, size: usize) -> &[u8] {
            let start = usize::try_from(address).unwrap();
            &self.0[start..start + size]
        }
        fn u32(&self, address: u64) -> u32 {
            u32::from_le_bytes(self.at(address, 4).try_into().unwrap())
        }
        fn u64(&self, address: u64) -> u64 {
            u64::from_le_bytes(self.at(address, 8).try_into().unwrap())
        }
        fn sum(&self, address: u64, size: usize) -> u8 {
            self.at(address, size).iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
        }
        fn rsdp(&self) -> u64 {
            (0xe_0000..0x10_0000).step_by(16).find(|at| self.at(*at, 8) == b"RSD PTR ").unwrap()
        }
        /// A table by its signature, its checksum verified.
        fn table(&self, signature: &[u8; 4]) -> &[u8] {
            let xsdt = self.u64(self.rsdp() + 24);
            let count = (self.u32(xsdt + 4) - 36) / 8;
            let entries = (0..u64::from(count)).map(|i| self.u64(xsdt + 36 + 8 * i));
            let fadt = entries.clone().find(|at| self.at(*at, 4) == b"FACP").unwrap();
            let mut all = entries.chain([xsdt, self.u64(fadt + 140)]);
            let at = all.find(|at| self.at(*at, 4) == signature).unwrap();
            let size = self.u32(at + 4) as usize;
            assert_eq!(self.sum(at, size), 0, "checksum of {signature:?}");
            self.at(at, size)
        }
    }

    fn machine() -> Machine {
        Machine { cpus: 2, serial: true }
    }

    #[test]
    fn root_pointer_is_found_and_sound() {
        let guest = Guest::new(&machine());
        let rsdp = guest.rsdp();
        assert_eq!(guest.sum(rsdp, 20), 0);
        assert_eq!(guest.sum(rsdp, 36), 0);
        assert_eq!(guest.at(rsdp + 15, 1), [2]);
        assert_eq!(guest.table(b"XSDT").len(), 36 + 16);
    }

    #[test]
    fn fadt_tells_how_to_switch_off_and_reset() {
        let guest = Guest::new(&machine());
        let fadt = guest.table(b"FACP");
        assert_eq!(fadt.len(), 276);
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags >> 20 & 1, 1, "hardware-reduced");
        assert_eq!(flags >> 10 & 1, 1, "reset register");
        assert_eq!(flags >> 4 & 3, 3, "no fixed power or sleep button");
        let gas = |port: u16| [&[1, 8, 0, 1][..], &u64::from(port).to_le_bytes()].concat();
        assert_eq!(fadt[116..128], gas(0xcf9));
        assert_eq!(fadt[128], 6);
        assert_eq!(fadt[244..256], gas(0x600));
        assert_eq!(fadt[256..268], gas(0x601));
        assert_eq!(fadt[109..111], [0x15, 0], "boot flags: no 8042 to probe, clock present");
    }

    #[test]
    fn madt_lists_cpus_and_interrupt_wiring() {
        let guest = Guest::new(&machine());
        let madt = guest.table(b"APIC");
        assert_eq!(madt[36..44], [0, 0, 0xe0, 0xfe, 1, 0, 0, 0]);
        let mut rest = &madt[44..];
        let mut found = Vec::new();
        while !rest.is_empty() {
            let (entry, tail) = rest.split_at(rest[1].into());
            found.push(entry);
            rest = tail;
        }
        let expected: [&[u8]; 5] = [
            &[0, 8, 0, 0, 1, 0, 0, 0],
            &[0, 8, 1, 1, 1, 0, 0, 0],
            &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
            &[2, 10, 0, 0, 2, 0, 0, 0, 0, 0],
            &[4, 6, 0xff, 0, 0, 1],
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn many_cpus_get_x2apic_entries() {
        let guest = Guest::new(&Machine { cpus: 257, serial: true });
        let madt = guest.table(b"APIC");
        let last = 44 + 255 * 8 + 16;
        assert_eq!(madt[last..last + 16], [9, 16, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]);
    }

    #[test]
    fn dsdt_holds_serial_port_clock_and_soft_off() {
        let guest = Guest::new(&machine());
        let find = |table: &[u8], bytes: &[u8]| table.windows(bytes.len()).any(|window| window == bytes);
        let dsdt = guest.table(b"DSDT");
        // EISA ids as 32-bit constants; an I/O port descriptor; an extended interrupt descriptor for GSI 4.
        assert!(find(dsdt, b"COM1\x08_HID\x0c\x41\xd0\x05\x01"));
        assert!(find(dsdt, &[0x47, 1, 0xf8, 3, 0xf8, 3, 0, 8]));
        assert!(find(dsdt, &[0x89, 6, 0, 0b0011, 1, 4, 0, 0, 0]));
        assert!(find(dsdt, b"RTC0\x08_HID\x0c\x41\xd0\x0b\x00"));
        assert!(find(dsdt, b"\x08_S5_\x12\x07\x04\x0a\x05\0\0\0"));
        let without = Guest::new(&Machine { cpus: 1, serial: false });
        assert!(!find(without.table(b"DSDT"), b"COM1"));
    }
}
