// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is x86's own of the monitor, and under the names below what the rest uses of it: a small PC.

use crate::config::{SerialConfig, VmConfig};
use crate::error::Error;
use crate::memory::Ram;

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod device;
pub mod doctor;
pub mod emulate;
pub mod hypervisor;
pub mod image;
pub mod layout;
pub mod machine;
pub mod paging;
pub mod vcpu;

pub use hypervisor::{axvcpu, kvm, X86Vcpu as VcpuOps, X86Vm as VmOps};
pub use image::Loaded;
pub use machine::Machine;
pub use vcpu::Local;

/// Its name in messages.
pub const NAME: &str = "x86-64";

/// Whether there are I/O ports, and with them the debug devices.
pub const HAS_PORTS: bool = true;

/// Whether the CPU may start in other modes than one.
pub const HAS_MODES: bool = true;

/// Loads the kernel, and everything that describes the machine to it.
///
/// # Errors
/// [`Error::Image`] or [`Error::Host`].
pub fn load(config: &VmConfig, ram: &Ram) -> Result<Loaded, Error> {
    let machine = acpi::Machine { cpus: config.vcpus.len() as u32, serial: config.devices.serial != SerialConfig::Off };
    let tables = acpi::Tables::new(&machine);
    let loaded = image::load(&config.kernel, ram, &layout::memory_map(&config.memory), tables.rsdp())?;
    tables.write(ram).map_err(|error| Error::host("write the ACPI tables", error))?;
    boot::write_reset_vector(ram).map_err(|error| Error::host("write the reset vector", error))?;
    Ok(loaded)
}

/// Creates the vCPUs of a VM that has its memory, and what each thread keeps.
///
/// # Errors
/// What the hypervisor reports.
pub fn create_vcpus<M: VmOps>(
    vm: &mut M,
    count: u32,
    loaded: &Loaded,
) -> crate::hypervisor::Result<(Vec<M::Vcpu>, Vec<Local>)> {
    let supported = vm.supported_cpuid()?;
    let mut vcpus = Vec::new();
    for id in 0..count {
        let mut vcpu = vm.create_vcpu(id, loaded.start.reset_entry(), &cpuid::for_vcpu(&supported, id, count))?;
        if id == 0 {
            loaded.start.apply(&mut vcpu)?;
        }
        vcpus.push(vcpu);
    }
    Ok((vcpus, Local::for_all(count as usize, cpuid::paging_features(&supported))))
}
