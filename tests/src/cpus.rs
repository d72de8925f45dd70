// SPDX-License-Identifier: MIT OR Apache-2.0
//! Several vCPUs of one machine with in-kernel APICs, for messages between them.
//!
//! The first one is the machine's own. The others are put straight into long mode, each with a stack of its own, and stand
//! before the code at [`IDLE`]. Nobody runs unless told so; what a vCPU has been sent is asked for by a kick, after which its
//! register sets show it ([`Cpus::state`]).

use crate::ensure_eq;
use crate::harness::{self, CaseResult, Stop};
use crate::hypervisor::Vcpu;
use crate::machine::{Machine, Mode, CODE, HIGH};
use axvcpu_uapi::client::Apic;
use axvcpu_uapi::exit::AxVCpuExitReason;
use axvcpu_uapi::x86::{Control, Events, General, LocalApic, Segments, ACTIVITY_RUNNING, EVENTS_NMI_PENDING, RSP};
use std::thread;

/// Where the other vCPUs stand.
pub const IDLE: u64 = CODE + 0x400;

/// IA32_APIC_BASE: x2APIC mode.
const BASE_X2APIC: u64 = 1 << 10;
/// Local APIC: spurious-interrupt vector register.
const SVR: usize = 0xf0;

/// What a vCPU has been sent and has not taken yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Requested interrupts, ascending.
    pub vectors: Vec<u8>,
    /// An NMI waits.
    pub nmi: bool,
    /// `ACTIVITY_*`.
    pub activity: u32,
}

/// The vCPUs.
pub struct Cpus {
    /// The machine with the first.
    pub machine: Machine,
    /// The others, by ascending number.
    pub others: Vec<Vcpu>,
    /// The numbers of all of them, which are their APIC ids.
    pub ids: Vec<u32>,
}

impl Cpus {
    /// vCPU 0 about to run `code` in long mode, and others with the numbers in `others`. All APICs are in x2APIC mode, or else in
    /// xAPIC mode, and enabled.
    ///
    /// # Errors
    /// What the module refuses.
    pub fn new(code: &[u8], others: &[u32], x2apic: bool) -> Result<Self, Stop> {
        let mut machine = Machine::with(Mode::Long, code, Apic::InKernel)?;
        let stack = |id: u32| HIGH + u64::from(id + 1) * 0x1000;
        let cpuid = machine.system.supported_cpuid()?;
        let (control, segments) = (machine.vcpu.get::<Control>()?, machine.vcpu.get::<Segments>()?);
        let mut vcpus = Vec::new();
        for id in others {
            let mut vcpu = machine.create_vcpu(*id, Apic::InKernel, &cpuid)?;
            let apic_base = vcpu.get::<Control>()?.apic_base;
            vcpu.set(&Control { apic_base, ..control })?;
            vcpu.set(&segments)?;
            let mut general: General = vcpu.get()?;
            general.rip = IDLE;
            general.gpr[RSP] = stack(*id);
            vcpu.set(&general)?;
            vcpu.set(&Events { activity: ACTIVITY_RUNNING, ..vcpu.get()? })?;
            vcpus.push(vcpu);
        }
        for vcpu in std::iter::once(&mut machine.vcpu).chain(&mut vcpus) {
            let mut control: Control = vcpu.get()?;
            if x2apic {
                control.apic_base |= BASE_X2APIC;
                vcpu.set(&control)?;
            }
            let mut apic: LocalApic = vcpu.get()?;
            apic.regs[SVR / 16] = 0x1ff;
            vcpu.set(&apic)?;
        }
        let ids = std::iter::once(0).chain(others.iter().copied()).collect();
        let mut cpus = Self { machine, others: vcpus, ids };
        cpus.publish()?;
        Ok(cpus)
    }

    /// The vCPU at `place` in the list of all of them.
    pub fn vcpu(&mut self, place: usize) -> &mut Vcpu {
        match place.checked_sub(1) {
            None => &mut self.machine.vcpu,
            Some(place) => &mut self.others[place],
        }
    }

    /// Has every vCPU tell the module's interrupt network who it is, and take what it has been sent.
    ///
    /// # Errors
    /// What `RUN` reports.
    pub fn publish(&mut self) -> CaseResult {
        for place in 0..self.ids.len() {
            let vcpu = self.vcpu(place);
            vcpu.kicker().kick()?;
            ensure_eq!(vcpu.run()?.reason, AxVCpuExitReason::Interrupted, "exit of a vCPU that was kicked");
        }
        Ok(())
    }

    /// What each has been sent and has not taken. No guest instruction is executed.
    ///
    /// # Errors
    /// What the module reports.
    pub fn states(&mut self) -> Result<Vec<State>, Stop> {
        self.publish()?;
        (0..self.ids.len()).map(|place| self.state(place)).collect()
    }

    /// What the vCPU at `place` had been sent when it last ran.
    ///
    /// # Errors
    /// What the module reports.
    pub fn state(&mut self, place: usize) -> Result<State, Stop> {
        let vcpu = self.vcpu(place);
        let (apic, events) = (vcpu.get::<LocalApic>()?, vcpu.get::<Events>()?);
        let requested = |vector: &u8| apic.regs[0x20 + usize::from(vector / 32)] >> (vector % 32) & 1 != 0;
        Ok(State {
            vectors: (0..=255).filter(requested).collect(),
            nmi: events.flags & EVENTS_NMI_PENDING != 0,
            activity: events.activity,
        })
    }

    /// Runs the vCPU at `place` to its next exit, which must be `OUT port, AL`, and gives the value.
    ///
    /// # Errors
    /// If it is another.
    pub fn mark(&mut self, place: usize, port: u16) -> Result<u64, Stop> {
        let id = self.ids[place];
        match self.vcpu(place).run()?.reason {
            AxVCpuExitReason::IoWrite { port: found, data, .. } if found == port => Ok(data),
            other => Err(Stop::Fail(format!("vCPU {id}: expected OUT {port:#x}, found {other:x?}"))),
        }
    }

    /// Writes a register of the xAPIC page of the vCPU at `place`, as if its guest had.
    ///
    /// # Errors
    /// What the module reports.
    pub fn write_apic(&mut self, place: usize, offset: u32, value: u32) -> CaseResult {
        Ok(self.vcpu(place).apic_access(offset, Some(value)).map(drop)?)
    }

    /// Runs all of them at once, each on a thread of its own, until each has come to `OUT port, AL`.
    ///
    /// # Errors
    /// The first that comes to something else.
    pub fn run_all(&mut self, port: u16) -> CaseResult {
        let vcpus = std::iter::once(&mut self.machine.vcpu).chain(&mut self.others).zip(&self.ids);
        thread::scope(|scope| {
            let threads: Vec<_> = vcpus
                .map(|(vcpu, id)| {
                    scope.spawn(move || -> CaseResult {
                        loop {
                            match vcpu.run()?.reason {
                                AxVCpuExitReason::IoWrite { port: found, .. } if found == port => return Ok(()),
                                AxVCpuExitReason::Interrupted => harness::check_time()?,
                                other => {
                                    let at = vcpu.get::<General>()?;
                                    return Err(Stop::Fail(format!("vCPU {id}: exit {other:x?} with {at:x?}")));
                                }
                            }
                        }
                    })
                })
                .collect();
            let results = threads.into_iter().map(|t| harness::joined(t.join()).and_then(|result| result));
            results.fold(Ok(()), CaseResult::and)
        })
    }
}
