// SPDX-License-Identifier: MIT OR Apache-2.0
//! ACPI tables: what tells a guest of its CPUs, interrupt controllers, serial port and clock, and how to switch off or
//! reset. A hardware-reduced platform (ACPI 6.5, section 4.1): no fixed hardware but sleep and reset registers.

use acpi_tables::aml::{self, Device, EISAName, Interrupt, Name, Package, ResourceTemplate, Scope, IO};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use axvcpu_uapi::addr::GuestPhysAddr;

use crate::device::irq::{IRQ_COM1, ISA_TIMER_GSI};
use crate::device::power;
use crate::layout::{self, port};
use crate::memory::{OutOfRam, Ram};

const OEM: [u8; 6] = *b"AXVCPU";
const TABLE: [u8; 8] = *b"AXVMM   ";
const REVISION: u32 = 1;

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
        let mut bytes = vec![0; size_of::<Rsdp>()];
        let mut add = |table: &dyn Aml| -> u64 {
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            let at = layout::ACPI.start + bytes.len() as u64;
            table.to_aml_bytes(&mut bytes);
            at
        };
        let dsdt = add(&dsdt(machine));
        let fadt = add(&fadt(dsdt));
        let madt = add(&madt(machine));
        let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
        xsdt.add_entry(fadt);
        xsdt.add_entry(madt);
        let xsdt = add(&xsdt);
        let mut rsdp = Vec::new();
        Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
        bytes[..rsdp.len()].copy_from_slice(&rsdp);
        assert!(bytes.len() as u64 <= layout::ACPI.end - layout::ACPI.start, "ACPI tables need more room");
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

fn io_register(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT | NO_ASPM).into();
    fadt.reset_reg = io_register(port::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = io_register(*port::ACPI_SLEEP.start());
    fadt.sleep_status_reg = io_register(*port::ACPI_SLEEP.end());
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"AXVCPU\0\0").into();
    fadt.finalize()
}

/// Multiple APIC description table (ACPI 6.5, section 5.2.12). acpi_tables knows too few of its structures, so the
/// others are laid out here.
fn madt(machine: &Machine) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM, TABLE, REVISION);
    madt.write_u32(36, layout::LOCAL_APIC.start as u32);
    madt.write_u32(40, PCAT_COMPAT);
    let mut body = Vec::new();
    for id in 0..machine.cpus {
        match u8::try_from(id) {
            Ok(id) if id < 0xff => {
                ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
            }
            // Processor local x2APIC: type 9, length 16, reserved, id, enabled, UID.
            _ => {
                body.vec(&[9, 16, 0, 0]);
                body.dword(id);
                body.dword(1);
                body.dword(id);
            }
        }
    }
    IoApic::new(0, layout::IOAPIC.start as u32, 0).to_aml_bytes(&mut body);
    // Interrupt source override: type 2, length 10, ISA bus, IRQ 0, GSI, polarity and trigger as the bus has them.
    body.vec(&[2, 10, 0, 0]);
    body.dword(ISA_TIMER_GSI);
    body.word(0);
    // Local APIC NMI: type 4, length 6, all processors, polarity and trigger as the bus has them, LINT1.
    body.vec(&[4, 6, 0xff, 0, 0, 1]);
    madt.append_slice(&body);
    madt
}

fn dsdt(machine: &Machine) -> Sdt {
    let mut body = Vec::new();
    if machine.serial {
        let (com1, irq) = (*port::COM1.start(), u32::from(IRQ_COM1));
        Scope::new(
            "_SB_".into(),
            vec![&Device::new(
                "COM1".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                    &Name::new("_UID".into(), &aml::ONE),
                    &Name::new("_STA".into(), &0x0fu8),
                    &Name::new(
                        "_CRS".into(),
                        // An interrupt that the device consumes: edge-triggered, active high, not shared.
                        &ResourceTemplate::new(vec![
                            &Interrupt::new(true, true, false, false, irq),
                            &IO::new(com1, com1, 0, 8),
                        ]),
                    ),
                ],
            )],
        )
        .to_aml_bytes(&mut body);
    }
    let cmos = *port::CMOS.start();
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "RTC0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(cmos, cmos, 0, 2)])),
            ],
        )],
    )
    .to_aml_bytes(&mut body);
    // Soft off: the sleep type for both halves of a PM1 register that a hardware-reduced platform has one of.
    Name::new("_S5_".into(), &Package::new(vec![&power::SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]))
        .to_aml_bytes(&mut body);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    dsdt.append_slice(&body);
    dsdt
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
        assert!(
            find(dsdt, b"\x08_S5_\x12\x08\x04\x0a\x05\x00\x00\x00")
                || find(dsdt, b"\x08_S5_\x12\x07\x04\x0a\x05\x00\x00\x00")
        );
        let without = Guest::new(&Machine { cpus: 1, serial: false });
        assert!(!find(without.table(b"DSDT"), b"COM1"));
    }
}
