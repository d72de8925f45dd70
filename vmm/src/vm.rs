// SPDX-License-Identifier: MIT OR Apache-2.0
//! Builds a VM from its configuration, and runs it to its end.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::affinity;
use crate::arch::{self, Loaded, Local, Machine, VmOps};
use crate::config::{DeviceConfig, Hypervisor, MemoryRegion, SerialConfig, VmConfig};
use crate::control::{Control, Stop};
use crate::error::Error;
use crate::events::{EventLoop, Signals};
use crate::hypervisor::{axvcpu, kvm, Vcpu};
use crate::memory::Ram;
use crate::sandbox::{Sandbox, Thread};
use crate::stats::{vcpu_report, vm_report, Counters};
use crate::terminal::{Output, RawTerminal};
use crate::threads::Threads;
use crate::vcpu::Runner;

/// How to run a VM, apart from its configuration.
#[derive(Clone, Debug)]
pub struct Options {
    /// What carries the VM, whatever the configuration says.
    pub hypervisor: Option<Hypervisor>,
    /// The hypervisor's device node, if it is not the usual one.
    pub device: Option<PathBuf>,
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
/// [`Error::Affinity`], [`Error::Memory`] or [`Error::Image`].
pub fn prepare(config: &VmConfig) -> Result<(Ram, Loaded), Error> {
    affinity::check(&config.vcpus)?;
    let ram = Ram::new(&config.memory)?;
    let loaded = arch::load(config, &ram)?;
    Ok((ram, loaded))
}

/// What a machine is made from, beside its VM.
pub struct Parts<'a> {
    /// Guest RAM, allocated.
    pub ram: Ram,
    /// Guest RAM, as configured.
    pub memory: &'a [MemoryRegion],
    /// Which devices.
    pub devices: &'a DeviceConfig,
    /// Where the serial port writes to; `None` if there is none.
    pub serial: Option<Output>,
    /// Where the debug console writes to.
    pub console: Output,
    /// How to stop.
    pub control: Arc<Control>,
}

/// A built VM. Fields drop in this order: vCPUs before the memory they run on.
struct Built<M: VmOps> {
    vcpus: Vec<M::Vcpu>,
    locals: Vec<Local>,
    vm: M,
}

fn build<M: VmOps>(config: &VmConfig, device: &Path, ram: &Ram, loaded: &Loaded) -> Result<Built<M>, Error> {
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
    vm.map(ram)?;
    let (vcpus, locals) = arch::create_vcpus(&mut vm, count, loaded)?;
    Ok(Built { vcpus, locals, vm })
}

/// Runs the VM until it stops.
///
/// # Errors
/// What keeps it from starting. What happens later is the reason in [`Ended`].
pub fn run(config: &VmConfig, options: &Options) -> Result<Ended, Error> {
    match options.hypervisor.unwrap_or(config.hypervisor) {
        Hypervisor::Axvcpu => run_on::<axvcpu::Vm>(config, options, axvcpu_uapi::DEVICE_PATH),
        Hypervisor::Kvm => run_on::<kvm::Vm>(config, options, kvm::DEVICE_PATH),
    }
}

/// `device` is the hypervisor's usual device node.
fn run_on<M: VmOps>(config: &VmConfig, options: &Options, device: &str) -> Result<Ended, Error> {
    let device = options.device.as_deref().unwrap_or(Path::new(device));
    let (ram, loaded) = prepare(config)?;
    tracing::info!(vm = config.id, name = config.name, format = loaded.format, entry = %loaded.start.entry, "kernel loaded");
    let stdout = Output::stdout()?;
    let serial = match &config.devices.serial {
        SerialConfig::Stdio => Some(stdout.clone()),
        SerialConfig::File(path) => Some(Output::file(path)?),
        SerialConfig::Off => None,
    };
    let Built::<M> { vcpus, locals, vm } = build(config, device, &ram, &loaded)?;

    let control = Arc::new(Control::new()?);
    control.set_kickers(vcpus.iter().zip(&locals).map(|(vcpu, local)| local.kicker(vcpu.kicker())).collect());
    let parts = Parts {
        ram,
        memory: &config.memory,
        devices: &config.devices,
        serial,
        console: stdout,
        control: Arc::clone(&control),
    };
    let (machine, served) = Machine::new(&vm, parts)?;
    let machine = Arc::new(machine);

    let signals = Signals::block()?;
    let sandbox = Arc::new(if options.sandbox { Sandbox::close(&M::IOCTLS)? } else { Sandbox::open() });
    // After everything that may fail with a message of its own.
    let interactive = config.devices.serial == SerialConfig::Stdio;
    let terminal = if interactive { RawTerminal::enter()? } else { None };
    let input = interactive && (terminal.is_some() || !std::io::stdin().is_terminal());

    let counters: Vec<Arc<Counters>> = vcpus.iter().map(|_| Arc::default()).collect();
    let mut threads = Threads::new(&control, &sandbox);
    let threads_of = vcpus.into_iter().zip(locals).zip(counters.iter().zip(&config.vcpus));
    for (id, ((vcpu, local), (counters, cpus))) in (0..).zip(threads_of) {
        let runner = Runner::new(vcpu, id, &machine, counters, local);
        threads.start(runner, *cpus)?;
    }
    let events = EventLoop { control: &control, served, signals: &signals, terminal, input, typed: Vec::new() };
    if let Err(error) = sandbox.enter(Thread::Main).and_then(|()| events.run()) {
        control.stop(Stop::Failed(error));
    }

    let reason = control.take_reason();
    let hurry = matches!(reason, Some(Stop::Signal(_) | Stop::Quit));
    let vcpus = threads.finish(hurry, &signals);
    let stats = options.stats.then(|| {
        let mut text = String::new();
        for ((id, vcpu), counters) in (0..).zip(&vcpus).zip(&counters) {
            let kernel = vcpu.as_ref().and_then(Vcpu::stats);
            text += &vcpu_report(id, kernel.as_ref(), counters);
        }
        text + &vm_report(vm.stats().as_ref(), &machine.unclaimed())
    });
    let nothing = || Stop::Failed(Error::host("find out why the VM stopped", "no reason was given"));
    Ok(Ended { reason: reason.unwrap_or_else(nothing), stats })
}
