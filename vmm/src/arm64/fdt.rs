// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device tree that describes the machine to the guest (Devicetree Specification 0.4; Linux
//! `Documentation/devicetree/bindings`).

use std::ops::Range;

use vm_fdt::{Error, FdtWriter, FdtWriterNode};

use super::layout::{
    self, CLOCK, DEVICE_SIZE, DISTRIBUTOR, DISTRIBUTOR_SIZE, REDISTRIBUTORS, REDISTRIBUTOR_SIZE, SERIAL,
};
use crate::config::MemoryRegion;

/// Phandle of the interrupt controller.
const GIC: u32 = 1;
/// Phandle of the clock signal of the peripherals.
const PERIPHERAL_CLOCK: u32 = 2;

/// First cell of an interrupt (`interrupt-controller/arm,gic-v3.yaml`): SPI, PPI.
const SPI: u32 = 0;
const PPI: u32 = 1;
/// Third cell: rising edge, high level.
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// The generic timer's PPIs, in the order of the binding (`timer/arm,arch_timer.yaml`): secure physical, physical, virtual,
/// hypervisor's. They are INTIDs 29, 30, 27 and 26, as the Base System Architecture has them.
const TIMER_PPIS: [u32; 4] = [13, 14, 11, 10];

/// The base clock of a PC's UART. No baud rate matters here.
const UART_HZ: u32 = 1_843_200;

/// What is random in a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seeds {
    /// For the guest's random number generator.
    pub rng: [u8; 64],
    /// For the place of its kernel.
    pub kaslr: u64,
}

/// What is to be described.
#[derive(Clone, Debug)]
pub struct Machine<'a> {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest RAM.
    pub memory: &'a [MemoryRegion],
    /// Whether there is a serial port.
    pub serial: bool,
    /// Randomness.
    pub seeds: Seeds,
}

impl Machine<'_> {
    /// The tree, for a kernel with this command line and RAM disk.
    ///
    /// # Errors
    /// vm-fdt's, for a command line with a NUL.
    pub fn tree(&self, cmdline: &str, ramdisk: Option<&Range<u64>>) -> Result<Vec<u8>, Error> {
        let mut fdt = FdtWriter::new()?;
        let root = fdt.begin_node("")?;
        fdt.property_string("compatible", "linux,dummy-virt")?;
        fdt.property_string("model", "axvmm")?;
        fdt.property_u32("#address-cells", 2)?;
        fdt.property_u32("#size-cells", 2)?;
        fdt.property_u32("interrupt-parent", GIC)?;
        self.chosen(&mut fdt, cmdline, ramdisk)?;
        for region in self.memory {
            let node = begin_at(&mut fdt, "memory", region.base)?;
            fdt.property_string("device_type", "memory")?;
            fdt.property_array_u64("reg", &[region.base, region.size])?;
            fdt.end_node(node)?;
        }
        self.processors(&mut fdt)?;
        self.interrupt_controller(&mut fdt)?;
        timer(&mut fdt)?;
        self.peripherals(&mut fdt)?;
        fdt.end_node(root)?;
        fdt.finish()
    }

    fn chosen(&self, fdt: &mut FdtWriter, cmdline: &str, ramdisk: Option<&Range<u64>>) -> Result<(), Error> {
        let node = fdt.begin_node("chosen")?;
        fdt.property_string("bootargs", cmdline)?;
        if self.serial {
            fdt.property_string("stdout-path", &format!("/serial@{SERIAL:x}"))?;
        }
        if let Some(ramdisk) = ramdisk {
            fdt.property_u64("linux,initrd-start", ramdisk.start)?;
            fdt.property_u64("linux,initrd-end", ramdisk.end)?;
        }
        fdt.property("rng-seed", &self.seeds.rng)?;
        fdt.property_u64("kaslr-seed", self.seeds.kaslr)?;
        fdt.end_node(node)
    }

    /// The CPUs, and PSCI, by which all but the first are started.
    fn processors(&self, fdt: &mut FdtWriter) -> Result<(), Error> {
        let cpus = fdt.begin_node("cpus")?;
        fdt.property_u32("#address-cells", 2)?;
        fdt.property_u32("#size-cells", 0)?;
        for id in 0..self.cpus {
            let affinity = layout::affinity(id);
            let node = begin_at(fdt, "cpu", affinity)?;
            fdt.property_string("device_type", "cpu")?;
            fdt.property_string("compatible", "arm,armv8")?;
            fdt.property_string("enable-method", "psci")?;
            fdt.property_u64("reg", affinity)?;
            fdt.end_node(node)?;
        }
        fdt.end_node(cpus)?;
        let psci = fdt.begin_node("psci")?;
        fdt.property_string_list("compatible", vec!["arm,psci-1.0".into(), "arm,psci-0.2".into()])?;
        fdt.property_string("method", "hvc")?;
        fdt.end_node(psci)
    }

    fn interrupt_controller(&self, fdt: &mut FdtWriter) -> Result<(), Error> {
        let node = begin_at(fdt, "interrupt-controller", DISTRIBUTOR)?;
        fdt.property_string("compatible", "arm,gic-v3")?;
        fdt.property_u32("#interrupt-cells", 3)?;
        fdt.property_u32("#address-cells", 2)?;
        fdt.property_u32("#size-cells", 2)?;
        fdt.property_null("interrupt-controller")?;
        let redistributors = u64::from(self.cpus) * REDISTRIBUTOR_SIZE;
        fdt.property_array_u64("reg", &[DISTRIBUTOR, DISTRIBUTOR_SIZE, REDISTRIBUTORS, redistributors])?;
        fdt.property_phandle(GIC)?;
        fdt.end_node(node)
    }

    fn peripherals(&self, fdt: &mut FdtWriter) -> Result<(), Error> {
        if self.serial {
            let node = begin_at(fdt, "serial", SERIAL)?;
            fdt.property_string("compatible", "ns16550a")?;
            fdt.property_array_u64("reg", &[SERIAL, DEVICE_SIZE])?;
            fdt.property_array_u32("interrupts", &[SPI, layout::SERIAL_INTID - layout::FIRST_SPI, EDGE_RISING])?;
            fdt.property_u32("clock-frequency", UART_HZ)?;
            fdt.end_node(node)?;
        }
        let clock = fdt.begin_node("apb-pclk")?;
        fdt.property_string("compatible", "fixed-clock")?;
        fdt.property_u32("#clock-cells", 0)?;
        fdt.property_u32("clock-frequency", 24_000_000)?;
        fdt.property_phandle(PERIPHERAL_CLOCK)?;
        fdt.end_node(clock)?;
        let node = begin_at(fdt, "rtc", CLOCK)?;
        fdt.property_string_list("compatible", vec!["arm,pl031".into(), "arm,primecell".into()])?;
        fdt.property_array_u64("reg", &[CLOCK, DEVICE_SIZE])?;
        fdt.property_u32("clocks", PERIPHERAL_CLOCK)?;
        fdt.property_string("clock-names", "apb_pclk")?;
        fdt.end_node(node)
    }
}

/// The generic timer. It goes on while a CPU sleeps.
fn timer(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    let interrupts: Vec<u32> = TIMER_PPIS.iter().flat_map(|ppi| [PPI, *ppi, LEVEL_HIGH]).collect();
    fdt.property_array_u32("interrupts", &interrupts)?;
    fdt.property_null("always-on")?;
    fdt.end_node(node)
}

/// Begins a node of something with an address.
fn begin_at(fdt: &mut FdtWriter, name: &str, address: u64) -> Result<FdtWriterNode, Error> {
    fdt.begin_node(&format!("{name}@{address:x}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fdt::node::FdtNode;
    use fdt::Fdt;

    fn machine(cpus: u32, serial: bool, memory: &[MemoryRegion]) -> Machine<'_> {
        Machine { cpus, memory, serial, seeds: Seeds { rng: [7; 64], kaslr: 0x0123_4567_89ab_cdef } }
    }

    fn cells(node: &FdtNode<'_, '_>, name: &str) -> Vec<u32> {
        let value = node.property(name).unwrap_or_else(|| panic!("no {name} in {}", node.name)).value;
        value.chunks_exact(4).map(|cell| u32::from_be_bytes(cell.try_into().unwrap())).collect()
    }

    fn words(node: &FdtNode<'_, '_>, name: &str) -> Vec<u64> {
        cells(node, name).chunks_exact(2).map(|pair| u64::from(pair[0]) << 32 | u64::from(pair[1])).collect()
    }

    #[test]
    fn everything_is_where_it_is() {
        let memory =
            [MemoryRegion { base: 0x4000_0000, size: 256 << 20 }, MemoryRegion { base: 0x1_0000_0000, size: 1 << 30 }];
        let tree = machine(17, true, &memory).tree("console=ttyS0 quiet", Some(&(0x4800_0000..0x4812_3456))).unwrap();
        let fdt = Fdt::new(&tree).unwrap();
        assert_eq!(fdt.total_size(), tree.len());

        let chosen = fdt.find_node("/chosen").unwrap();
        assert_eq!(fdt.chosen().bootargs(), Some("console=ttyS0 quiet"));
        assert_eq!(fdt.chosen().stdout().unwrap().name, "serial@9000000");
        assert_eq!(words(&chosen, "linux,initrd-start"), [0x4800_0000]);
        assert_eq!(words(&chosen, "linux,initrd-end"), [0x4812_3456]);
        assert_eq!(chosen.property("rng-seed").unwrap().value, [7; 64]);
        assert_eq!(words(&chosen, "kaslr-seed"), [0x0123_4567_89ab_cdef]);

        let found: Vec<Vec<u64>> = fdt.find_all_nodes("/memory").map(|node| words(&node, "reg")).collect();
        assert_eq!(found, [[0x4000_0000, 256 << 20], [0x1_0000_0000, 1 << 30]]);

        let cpus: Vec<FdtNode<'_, '_>> = fdt.find_node("/cpus").unwrap().children().collect();
        assert_eq!(cpus.len(), 17);
        assert_eq!((cpus[15].name, cpus[16].name), ("cpu@f", "cpu@100"));
        assert_eq!(words(&cpus[16], "reg"), [0x100]);
        assert!(cpus.iter().all(|cpu| cpu.property("enable-method").unwrap().as_str() == Some("psci")));
        let psci = fdt.find_compatible(&["arm,psci-1.0"]).unwrap();
        assert_eq!(psci.property("method").unwrap().as_str(), Some("hvc"));

        let gic = fdt.find_compatible(&["arm,gic-v3"]).unwrap();
        assert_eq!(words(&gic, "reg"), [0x0800_0000, 0x1_0000, 0x080a_0000, 17 * 0x2_0000]);
        assert_eq!(cells(&gic, "phandle"), cells(&fdt.find_node("/").unwrap(), "interrupt-parent"));

        let timer = fdt.find_compatible(&["arm,armv8-timer"]).unwrap();
        let interrupts = cells(&timer, "interrupts");
        let virtual_timer = &interrupts[6..9];
        assert_eq!(virtual_timer, [1, 27 - 16, 4], "PPIs are counted from INTID 16");

        let serial = fdt.find_compatible(&["ns16550a"]).unwrap();
        assert_eq!(words(&serial, "reg"), [0x0900_0000, 0x1000]);
        assert_eq!(cells(&serial, "interrupts"), [0, layout::SERIAL_INTID - 32, 1]);
        let rtc = fdt.find_compatible(&["arm,pl031"]).unwrap();
        let pclk = fdt.find_phandle(cells(&rtc, "clocks")[0]).unwrap();
        assert_eq!(pclk.property("compatible").unwrap().as_str(), Some("fixed-clock"));
    }

    #[test]
    fn what_is_not_there_is_not_told() {
        let memory = layout::default_regions(64 << 20);
        let tree = machine(1, false, &memory).tree("", None).unwrap();
        let fdt = Fdt::new(&tree).unwrap();
        let chosen = fdt.find_node("/chosen").unwrap();
        for absent in ["stdout-path", "linux,initrd-start", "linux,initrd-end"] {
            assert!(chosen.property(absent).is_none(), "{absent}");
        }
        assert!(fdt.find_compatible(&["ns16550a"]).is_none());
        assert_eq!(fdt.cpus().count(), 1);
    }

    #[test]
    fn the_largest_tree_stays_small() {
        // Linux maps 2 MiB of it at most, and less than that must do.
        let memory = layout::default_regions(64 << 30);
        let cmdline = "x".repeat(crate::config::MAX_CMDLINE);
        assert!(machine(64, true, &memory).tree(&cmdline, None).unwrap().len() < 64 << 10);
    }
}
