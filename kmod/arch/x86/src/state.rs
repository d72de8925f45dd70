// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The part of a vCPU that is the same whatever the backend: [`Guest`]; and the part that the backend's hardware structure
//! holds, as the rest of the crate sees it: [`Registers`]. Here is what it consists of, its set-up, and whether it runs.

mod apic;
mod registers;
mod reset;

pub(crate) use apic::ApicView;
pub(crate) use registers::{is_long_code, Registers};

use core::sync::atomic::{AtomicU64, Ordering};

use axvcpu_uapi::vcpu::ExitKind;
use vcpu_core::{AxResult, HostPhysAddr};

use crate::apic::{Config, Lapic};
use crate::backend::{Backend, Exited};
use crate::caps::Capabilities;
use crate::cpuid::{CpuidTable, Feature};
use crate::debug::DebugRegisters;
use crate::events::{Activity, Events, Situation};
use crate::exit::Pending;
use crate::fpu::Fpu;
use crate::hal::X86Hal;
use crate::msr::{Msrs, Offered};
use crate::mtrr::Mtrr;
use crate::nested::Known;
use crate::pvclock::PvClock;
use crate::regs::{rflags, xcr0, Limits};
use crate::vcpu::X86SetupConfig;
use crate::window::HostState;

/// The last identity given to a vCPU. 0 is none.
static IDENTITIES: AtomicU64 = AtomicU64::new(0);

/// A vCPU, but for the registers that the hardware structure holds.
pub(crate) struct Guest<H: X86Hal> {
    pub(crate) caps: Capabilities,
    pub(crate) vcpu_id: u32,
    /// Unique in the system, for ever.
    pub(crate) identity: u64,
    /// Where it starts: below 4 GiB.
    pub(crate) entry: u64,
    /// The nested page table, of [`Capabilities::npt_levels`] levels.
    pub(crate) root: HostPhysAddr,
    /// It has a CPU, until it is unbound.
    pub(crate) bound: bool,
    /// `None` until it is set up.
    pub(crate) cpuid: Option<CpuidTable<H>>,
    pub(crate) limits: Limits,
    /// `None` if the local APIC is userspace's.
    lapic: Option<Lapic<H>>,
    /// What entries ask of it, until something changes there.
    apic_view: Option<ApicView>,
    /// Others know who the local APIC is.
    published: bool,
    /// The posted-interrupt descriptor, if its address is known.
    pub(crate) posted: Option<HostPhysAddr>,
    /// CR8 and IA32_APIC_BASE without a local APIC here.
    cr8: u8,
    apic_base: u64,
    pub(crate) events: Events,
    pub(crate) msrs: Msrs,
    pub(crate) offered: Offered,
    pub(crate) mtrr: Mtrr,
    pub(crate) clock: PvClock,
    pub(crate) fpu: Fpu<H>,
    pub(crate) xcr0: u64,
    pub(crate) debug: DebugRegisters,
    /// The host's FPU state in a window.
    pub(crate) host: HostState,
    /// What is added to the host's TSC.
    pub(crate) tsc_offset: u64,
    pub(crate) pending: Pending,
    /// The store that was stepped over last. Forgotten when the TLB is to be flushed of what the nested page table has lost.
    pub(crate) store: Option<Known>,
    /// An interrupt command that an access to the xAPIC page has left, for [`take_ipi`](Self::take_ipi).
    ipi: Option<u64>,
    /// How the last entry ended.
    pub(crate) exited: Exited,
    /// Of the last exit.
    pub(crate) exit_kind: ExitKind,
    /// The last exit is over, and nothing has changed by it that anybody but the vCPU looks at: not its local APIC, not its
    /// clocks. [`run_while`](Self::run_while) may go on.
    pub(crate) private: bool,
    /// Events injected.
    pub(crate) injections: u64,
    /// TLB flushes asked of the CPU, fresh identifiers of translations included.
    pub(crate) tlb_flushes: u64,
}

impl<H: X86Hal> Guest<H> {
    pub(crate) fn new(vcpu_id: u32, caps: Capabilities) -> AxResult<Self> {
        Ok(Self {
            caps,
            vcpu_id,
            identity: IDENTITIES.fetch_add(1, Ordering::Relaxed).wrapping_add(1),
            entry: 0,
            root: HostPhysAddr::new(0),
            bound: false,
            cpuid: None,
            limits: Limits { phys_bits: 36, cr4: 0, efer: 0, xcr0: 0 },
            lapic: None,
            apic_view: None,
            published: false,
            posted: None,
            cr8: 0,
            apic_base: apic::base_at_reset(vcpu_id),
            events: Events::new(),
            msrs: Msrs::new(&caps),
            offered: Offered::default(),
            mtrr: Mtrr::new(),
            clock: PvClock::new(),
            fpu: Fpu::new(&caps)?,
            xcr0: xcr0::X87,
            debug: DebugRegisters::default(),
            host: HostState::default(),
            tsc_offset: 0,
            pending: Pending::None,
            store: None,
            ipi: None,
            exited: Exited::NEVER,
            exit_kind: ExitKind::Other,
            private: false,
            injections: 0,
            tlb_flushes: 0,
        })
    }

    /// Completes the vCPU. May sleep.
    ///
    /// # Errors
    /// [`NoMemory`](vcpu_core::AxError::NoMemory).
    pub(crate) fn setup(&mut self, hw: &mut impl Backend<H>, config: X86SetupConfig<H>) -> AxResult {
        let X86SetupConfig { cpuid, in_kernel_apic, tsc_origin, posted } = config;
        self.limits = Limits::new(&cpuid, self.caps.xcr0);
        self.offered = Offered::new(&cpuid, &self.caps);
        self.lapic = match in_kernel_apic {
            true => Some(Lapic::new(Config {
                id: self.vcpu_id,
                boot_processor: self.vcpu_id == 0,
                x2apic: cpuid.has(Feature::X2APIC),
                tsc_deadline: cpuid.has(Feature::TSC_DEADLINE),
            })?),
            false => None,
        };
        self.tsc_offset = tsc_origin.wrapping_neg();
        hw.regs_mut().set_tsc_offset(self.tsc_offset);
        self.posted = posted;
        self.cpuid = Some(cpuid);
        hw.setup(self);
        let entry = self.entry;
        self.reset(hw, entry & 0xffff_0000, (entry >> 4) as u16 & 0xf000, entry & 0xffff);
        let waits = in_kernel_apic && self.vcpu_id != 0;
        self.events.reset(if waits { Activity::WaitForSipi } else { Activity::Running });
        Ok(())
    }

    pub(crate) fn situation(&self, regs: &impl Registers) -> Situation {
        Situation { interrupts_enabled: regs.rflags() & rflags::IF != 0, shadow: regs.shadow() }
    }

    /// Ends HLT if there is reason to, and tells whether the vCPU executes instructions.
    pub(crate) fn update_activity(&mut self, regs: &impl Registers) -> bool {
        if self.events.activity() == Activity::Halted
            && self.events.wakes(self.situation(regs), self.apic_vector().is_some())
        {
            self.events.set_activity(Activity::Running);
        }
        self.events.activity() == Activity::Running
    }

    pub(crate) fn window_open(&self, regs: &impl Registers) -> bool {
        self.accepts_pic_interrupt() && self.events.window_open(self.situation(regs))
    }
}
