// SPDX-License-Identifier: MIT OR Apache-2.0
//! Builds a VM from its configuration, and runs it to its end.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sched::{sched_setaffinity, CpuSet};
use nix::unistd::Pid;

use crate::acpi;
use crate::boot;
use crate::config::{SerialConfig, VmConfig};
use crate::control::{Control, Stop};
use crate::cpuid;
use crate::device::irq::Interrupts;
use crate::error::Error;
use crate::events::{EventLoop, HostTimer, Signals};
use crate::hypervisor::{axvcpu, Vcpu, Vm};
use crate::image::{self, Loaded};
use crate::layout;
use crate::machine::{Machine, Parts};
use crate::memory::Ram;
use crate::sandbox;
use crate::stats::{vcpu_report, vm_report, Counters};
use crate::terminal::{Output, RawTerminal};
use crate::vcpu::{Halted, Runner};

/// How long a vCPU's thread may take to end when a signal or the user ends the VM.
const PATIENCE: Duration = Duration::from_secs(1);

/// How to run a VM, apart from its configuration.
#[derive(Clone, Debug)]
pub struct Options {
    /// The device node.
    pub device: PathBuf,
    /// Whether to gather statistics for [`Ended::stats`].
    pub stats: bool,
    /// Whether the program gives up rights that it does not need while the guest runs.
    pub sandbox: bool,
}

/// How a VM ended.
#[derive(Debug)]
pub struct Ended {
    /// Why.
    pub reason: Stop,
    /// Statistics, if they were asked for.
    pub stats: Option<String>,
}

/// Allocates guest memory and loads everything into it: all that can be checked without the device.
///
/// # Errors
/// [`Error::Memory`] or [`Error::Image`].
pub fn prepare(config: &VmConfig) -> Result<(Ram, Loaded), Error> {
    let ram = Ram::new(&config.memory)?;
    let machine = acpi::Machine { cpus: config.vcpus.len() as u32, serial: config.devices.serial != SerialConfig::Off };
    let tables = acpi::Tables::new(&machine);
    let loaded = image::load(&config.kernel, &ram, &layout::memory_map(&config.memory), tables.rsdp())?;
    tables.write(&ram).map_err(|error| Error::host("write the ACPI tables", error))?;
    boot::write_reset_vector(&ram).map_err(|error| Error::host("write the reset vector", error))?;
    Ok((ram, loaded))
}

/// A built VM. Fields drop in this order: vCPUs before the memory they run on.
struct Built<M: Vm> {
    vcpus: Vec<M::Vcpu>,
    vm: M,
    paging: (u8, bool),
}

fn build<M: Vm>(config: &VmConfig, device: &Path, ram: &Ram, loaded: &Loaded) -> Result<Built<M>, Error> {
    let mut vm = M::create(device)?;
    let limits = vm.limits();
    let top = config.memory.iter().map(|region| region.end()).max().unwrap_or(0);
    if limits.guest_phys_bits < 64 && top > 1 << limits.guest_phys_bits {
        return Err(Error::Unsuitable(format!(
            "the guest's memory ends at {top:#x}, beyond the {} address bits of this CPU\nGive the guest less memory.",
            limits.guest_phys_bits
        )));
    }
    let count = config.vcpus.len() as u32;
    if count > limits.vcpus {
        return Err(Error::Unsuitable(format!("the hypervisor runs {} vCPUs at most", limits.vcpus)));
    }
    let supported = vm.supported_cpuid()?;
    vm.map(ram)?;
    let mut vcpus = Vec::new();
    for id in 0..count {
        let mut vcpu = vm.create_vcpu(id, loaded.start.reset_entry(), &cpuid::for_vcpu(&supported, id, count))?;
        if id == 0 {
            loaded.start.apply(&mut vcpu)?;
        }
        vcpus.push(vcpu);
    }
    Ok(Built { vcpus, vm, paging: cpuid::paging_features(&supported) })
}

/// Runs the VM until it stops.
///
/// # Errors
/// What keeps it from starting. What happens later is the reason in [`Ended`].
pub fn run(config: &VmConfig, options: &Options) -> Result<Ended, Error> {
    run_on::<axvcpu::Vm>(config, options)
}

fn run_on<M: Vm>(config: &VmConfig, options: &Options) -> Result<Ended, Error> {
    let (ram, loaded) = prepare(config)?;
    tracing::info!(vm = config.id, name = config.name, format = loaded.format, entry = %loaded.start.entry, "kernel loaded");
    let stdout = Output::stdout()?;
    let serial = match &config.devices.serial {
        SerialConfig::Stdio => Some(stdout.clone()),
        SerialConfig::File(path) => Some(Output::file(path)?),
        SerialConfig::Off => None,
    };
    let Built::<M> { vcpus, vm, paging } = build(config, &options.device, &ram, &loaded)?;

    let control = Arc::new(Control::new()?);
    control.set_kickers(vcpus.iter().map(Vcpu::kicker).collect());
    let kick = {
        let control = Arc::clone(&control);
        move || control.kick(0)
    };
    let timer = HostTimer::new()?;
    let (machine, served) = Machine::new(Parts {
        ram,
        memory: &config.memory,
        devices: &config.devices,
        serial,
        console: stdout,
        clock: Box::new(timer.clone()),
        interrupts: Interrupts::new(vm.messages(), Box::new(kick)),
        control: Arc::clone(&control),
    });
    let machine = Arc::new(machine);

    let signals = Signals::block()?;
    if options.sandbox {
        sandbox::enter()?;
    }
    // After everything that may fail with a message of its own.
    let interactive = config.devices.serial == SerialConfig::Stdio;
    let terminal = if interactive { RawTerminal::enter()? } else { None };
    let input = interactive && (terminal.is_some() || !std::io::stdin().is_terminal());

    let counters: Vec<Arc<Counters>> = vcpus.iter().map(|_| Arc::default()).collect();
    let halted = Halted::new(vcpus.len() as u32);
    let mut threads = Vec::new();
    for ((id, vcpu), (counters, cpus)) in (0..).zip(vcpus).zip(counters.iter().zip(&config.vcpus)) {
        let runner = Runner::new(vcpu, id, &machine, paging, counters, &halted);
        threads.push(spawn(id, runner, *cpus, &control)?);
    }
    let events = EventLoop { control: &control, served, timer, signals, terminal, input, typed: Vec::new() };
    if let Err(error) = events.run() {
        control.stop(Stop::Failed(error));
    }

    let reason = control.take_reason();
    let hurry = matches!(reason, Some(Stop::Signal(_) | Stop::Quit));
    let vcpus: Vec<Option<M::Vcpu>> = threads.into_iter().map(|thread| join(thread, hurry)).collect();
    let stats = options.stats.then(|| {
        let mut text = String::new();
        for ((id, vcpu), counters) in (0..).zip(&vcpus).zip(&counters) {
            let kernel = vcpu.as_ref().and_then(Vcpu::stats);
            text += &vcpu_report(id, kernel.as_ref(), counters);
        }
        text + &vm_report(vm.stats().as_ref(), machine.ports.unclaimed(), machine.mmio.unclaimed())
    });
    let nothing = || Stop::Failed(Error::host("find out why the VM stopped", "no reason was given"));
    Ok(Ended { reason: reason.unwrap_or_else(nothing), stats })
}

/// Starts a vCPU's thread.
fn spawn<V: Vcpu>(
    id: u32,
    runner: Runner<V>,
    cpus: Option<u64>,
    control: &Arc<Control>,
) -> Result<JoinHandle<V>, Error> {
    /// Stops the VM if the thread panics, so that the others do not wait for it.
    struct Watch(Arc<Control>);
    impl Drop for Watch {
        fn drop(&mut self) {
            if thread::panicking() {
                self.0.stop(Stop::Failed(Error::host("go on", "a vCPU's thread panicked; this is a bug in axvmm")));
            }
        }
    }
    let watch = Watch(Arc::clone(control));
    let body = move || {
        let watch = watch;
        if let Some(cpus) = cpus {
            if let Err(error) = restrict_to(cpus) {
                watch.0.stop(Stop::Failed(error));
            }
        }
        runner.run()
    };
    let thread = thread::Builder::new().name(format!("vcpu{id}")).spawn(body).map_err(|error| {
        control.stop(Stop::Quit);
        Error::host(format!("start a thread for vCPU {id}"), crate::error::describe_io(&error))
    });
    thread
}

/// Waits for a vCPU's thread to end. In a hurry only for a moment: it may be stuck writing to a pipe that nobody reads, and
/// the end of the process ends it, too.
fn join<V>(thread: JoinHandle<V>, hurry: bool) -> Option<V> {
    let deadline = Instant::now() + PATIENCE;
    while hurry && !thread.is_finished() {
        if Instant::now() > deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
    thread.join().ok()
}

/// Restricts the calling thread to the host CPUs in a bit mask.
fn restrict_to(cpus: u64) -> Result<(), Error> {
    let mut set = CpuSet::new();
    for cpu in (0..64).filter(|cpu| cpus >> cpu & 1 != 0) {
        let _ = set.set(cpu);
    }
    sched_setaffinity(Pid::from_raw(0), &set)
        .map_err(|errno| Error::host(format!("run a vCPU on the host CPUs {cpus:#x} of phys_cpu_sets"), errno.desc()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn affinity_of_an_absent_cpu_is_an_error_of_its_own() {
        let error = thread::spawn(|| restrict_to(1 << 63)).join().unwrap().unwrap_err();
        assert!(error.to_string().contains("phys_cpu_sets"), "{error}");
    }
}
