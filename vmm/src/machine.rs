// SPDX-License-Identifier: MIT OR Apache-2.0
//! What all vCPUs of a VM share: memory, buses, interrupt controllers; and how the devices are put together.

use std::sync::{Arc, Mutex};

use crate::config::{DeviceConfig, MemoryRegion};
use crate::control::Control;
use crate::device::cmos::{host_time, Cmos};
use crate::device::debug::{DebugConsole, DebugExit, EXIT_PORTS};
use crate::device::irq::{ElcrPorts, Interrupts, IoapicRegisters, Line, PicPorts, IRQ_COM1, IRQ_TIMER};
use crate::device::keyboard::Keyboard;
use crate::device::pci::PciPorts;
use crate::device::pit::{Clock, Pit, SystemControlB};
use crate::device::power::{AcpiSleep, SystemControlA};
use crate::device::serial::SerialPort;
use crate::device::Bus;
use crate::layout::{self, port};
use crate::memory::Ram;
use crate::terminal::Output;

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

/// The devices that the event loop serves.
#[derive(Clone)]
pub struct Served {
    /// COM1, if there is one.
    pub serial: Option<Arc<Mutex<SerialPort>>>,
    /// The timer.
    pub pit: Arc<Mutex<Pit>>,
}

/// What a machine is made from.
pub struct Parts<'a> {
    /// Guest RAM, allocated.
    pub ram: Ram,
    /// Guest RAM, as configured.
    pub memory: &'a [MemoryRegion],
    /// Which devices.
    pub devices: &'a DeviceConfig,
    /// Where COM1 writes to; `None` if there is no COM1.
    pub serial: Option<Output>,
    /// Where the debug console writes to.
    pub console: Output,
    /// Time for the timer.
    pub clock: Box<dyn Clock>,
    /// Interrupt controllers.
    pub interrupts: Arc<Interrupts>,
    /// How to stop.
    pub control: Arc<Control>,
}

impl Machine {
    /// Puts the devices on their buses.
    #[must_use]
    pub fn new(parts: Parts<'_>) -> (Self, Served) {
        let Parts { ram, memory, devices, serial, console, clock, interrupts, control } = parts;
        let mut ports = Bus::new();
        let mut mmio = Bus::new();

        ports.attach(&port::PIC1, share(PicPorts::new(&interrupts, false)));
        ports.attach(&port::PIC2, share(PicPorts::new(&interrupts, true)));
        ports.attach(&port::ELCR, share(ElcrPorts(Arc::clone(&interrupts))));
        let ioapic = layout::IOAPIC.start..=layout::IOAPIC.end - 1;
        mmio.attach(&ioapic, share(IoapicRegisters(Arc::clone(&interrupts))));

        let pit = share(Pit::new(clock, Line::new(&interrupts, IRQ_TIMER)));
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
        (Self { ram, ports, mmio, interrupts, control }, Served { serial, pit })
    }
}

fn share<T>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}
