// SPDX-License-Identifier: MIT OR Apache-2.0
//! What all vCPUs of a VM share: memory, buses, interrupt controllers; and how the devices are put together.

use std::sync::{Arc, Mutex};

use super::device::cmos::{host_time, Cmos};
use super::device::debug::{DebugConsole, DebugExit, EXIT_PORTS};
use super::device::irq::{ElcrPorts, Interrupts, IoapicRegisters, PicPorts, IRQ_COM1, IRQ_TIMER};
use super::device::keyboard::Keyboard;
use super::device::pci::PciPorts;
use super::device::pit::{Pit, SystemControlB};
use super::device::power::{AcpiSleep, SystemControlA};
use super::hypervisor::X86Vm;
use super::layout::{self, port};
use crate::control::Control;
use crate::device::line::Line;
use crate::device::serial::SerialPort;
use crate::device::Bus;
use crate::error::Error;
use crate::events::{HostTimer, Served};
use crate::memory::Ram;
use crate::vm::Parts;

/// A machine, ready for CPUs.
pub struct Machine {
    /// Guest RAM.
    pub ram: Ram,
    /// I/O ports.
    pub ports: Bus,
    /// Device registers by physical address. The local APICs are not on it: each CPU has its own at the same address.
    pub mmio: Bus,
    /// Interrupt controllers.
    pub interrupts: Arc<Interrupts>,
    /// How to stop.
    pub control: Arc<Control>,
}

impl Machine {
    /// Puts the devices of `vm` on their buses.
    ///
    /// # Errors
    /// [`Error::Host`] if the host has no timer left.
    pub fn new(vm: &impl X86Vm, parts: Parts<'_>) -> Result<(Self, Served), Error> {
        let Parts { ram, memory, devices, serial, console, control } = parts;
        let boot_cpu = Arc::clone(&control);
        let interrupts = Interrupts::new(vm.messages(), Box::new(move || boot_cpu.kick(0)));
        let mut ports = Bus::new();
        let mut mmio = Bus::new();

        ports.attach(&port::PIC1, share(PicPorts::new(&interrupts, false)));
        ports.attach(&port::PIC2, share(PicPorts::new(&interrupts, true)));
        ports.attach(&port::ELCR, share(ElcrPorts(Arc::clone(&interrupts))));
        let ioapic = layout::IOAPIC.start..=layout::IOAPIC.end - 1;
        mmio.attach(&ioapic, share(IoapicRegisters(Arc::clone(&interrupts))));

        let timer = HostTimer::new()?;
        let pit = share(Pit::new(Box::new(timer.clone()), Line::new(&interrupts, IRQ_TIMER)));
        ports.attach(&port::PIT, pit.clone());
        ports.attach(&(port::SYSTEM_B..=port::SYSTEM_B), share(SystemControlB(pit.clone())));
        ports.attach(&port::CMOS, share(Cmos::new(memory, host_time())));

        let [data, command] = port::KEYBOARD;
        ports.attach(&(data..=data), share(Keyboard::new(&control, 0)));
        ports.attach(&(command..=command), share(Keyboard::new(&control, (command - data) as u8)));
        ports.attach(&(port::SYSTEM_A..=port::SYSTEM_A), share(SystemControlA::new(&control)));
        ports.attach(&port::ACPI_SLEEP, share(AcpiSleep(Arc::clone(&control))));
        ports.attach(&port::PCI, share(PciPorts::new(&control)));

        let serial = serial.map(|output| {
            let device = share(SerialPort::new(Line::new(&interrupts, IRQ_COM1), output, &control));
            ports.attach(&port::COM1, device.clone());
            device
        });
        if let Some(first) = devices.debug_exit {
            ports.attach(&(first..=first.saturating_add(EXIT_PORTS - 1)), share(DebugExit(Arc::clone(&control))));
        }
        if let Some(port) = devices.debug_console {
            ports.attach(&(port..=port), share(DebugConsole(console)));
        }
        Ok((Self { ram, ports, mmio, interrupts, control }, Served { serial, timer: Some((timer, pit)) }))
    }
}

impl Machine {
    /// How many accesses no device answered, for people.
    #[must_use]
    pub fn unclaimed(&self) -> String {
        format!("{} to ports, {} to memory", self.ports.unclaimed(), self.mmio.unclaimed())
    }
}

fn share<T>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}
