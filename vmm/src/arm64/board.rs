// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a board's parts come together: what is loaded into its memory, and its CPUs.

use std::fs::File;
use std::io::Read;

use super::fdt;
use super::hypervisor::Arm64Vm;
use super::image::{self, Loaded};
use super::vcpu::Local;
use crate::config::{SerialConfig, VmConfig};
use crate::error::{describe_io, Error};
use crate::hypervisor::Result;
use crate::memory::Ram;

/// Its name in messages.
pub const NAME: &str = "arm64";

/// Whether there are I/O ports, and with them the debug devices.
pub const HAS_PORTS: bool = false;

/// Whether the CPU may start in other modes than one.
pub const HAS_MODES: bool = false;

/// Loads the kernel, and everything that describes the machine to it.
///
/// # Errors
/// [`Error::Image`], or [`Error::Host`] if there is no randomness to be had.
pub fn load(config: &VmConfig, ram: &Ram) -> std::result::Result<Loaded, Error> {
    let machine = fdt::Machine {
        cpus: config.vcpus.len() as u32,
        memory: &config.memory,
        serial: config.devices.serial != SerialConfig::Off,
        seeds: seeds()?,
    };
    Ok(image::load(&config.kernel, ram, &machine)?)
}

fn seeds() -> std::result::Result<fdt::Seeds, Error> {
    let (mut rng, mut kaslr) = ([0; 64], [0; 8]);
    let read = File::open("/dev/urandom").and_then(|mut file| {
        file.read_exact(&mut rng)?;
        file.read_exact(&mut kaslr)
    });
    read.map_err(|error| Error::host("read /dev/urandom", describe_io(&error)))?;
    Ok(fdt::Seeds { rng, kaslr: u64::from_ne_bytes(kaslr) })
}

/// Creates the vCPUs of a VM that has its memory, and what each thread keeps.
///
/// # Errors
/// What the hypervisor reports.
pub fn create_vcpus<M: Arm64Vm>(vm: &mut M, count: u32, loaded: &Loaded) -> Result<(Vec<M::Vcpu>, Vec<Local>)> {
    let vcpus = vm.create_vcpus(count, &loaded.start)?;
    let locals =
        if M::STARTS_VCPUS { vcpus.iter().map(|_| Local::default()).collect() } else { Local::for_all(&vcpus)? };
    Ok((vcpus, locals))
}
