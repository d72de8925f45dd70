// SPDX-License-Identifier: GPL-2.0-only
//! A vCPU: the object behind its file descriptor, and its ioctls but for `RUN` (`run.rs`) and what each architecture does in
//! its own way (`arch`).
//!
//! Locks: `inner`, a mutex, is held by every ioctl but `KICK` and `VCPU_STATS`, and by `RUN` as long as it lasts; nobody waits
//! for it (`EALREADY`). Under it: the address space's spin lock.

use axvcpu_uapi::{
    ioctl,
    vcpu::{self as abi_vcpu, Entry, EptRoot, Gpr, RegisterSet},
};
use kernel::{
    mm::virt::VmaNew,
    new_mutex,
    prelude::*,
    seq_file::SeqFile,
    seq_print,
    sync::{Arc, ArcBorrow, Mutex},
};
use vcpu_core::{AxError, AxVCpu, GuestPhysAddr};

use crate::{
    abi,
    arch::{self, regs},
    aspace::AddressSpace,
    fd::{self, FdObject, FileOperations},
    hal::Host,
    runpage::Page,
    shared::Shared,
    tables::Spare,
    timer::Timer,
    vm::{Member, Vm},
};

/// A vCPU.
#[pin_data]
pub(crate) struct Vcpu {
    pub(crate) shared: Arc<Shared>,
    pub(crate) vm: Member,
    pub(crate) page: Page,
    #[pin]
    inner: Mutex<Inner>,
}

/// What belongs to the thread that works on the vCPU.
pub(crate) struct Inner {
    pub(crate) vcpu: AxVCpu<arch::VCpu, Host>,
    pub(crate) aspace: Option<Arc<AddressSpace>>,
    pub(crate) timer: Timer,
    /// Frames for the next nested page fault.
    pub(crate) spare: Spare,
    /// The generation of the address space's translations that the TLB was flushed for last.
    pub(crate) seen_generation: u64,
    /// The interrupt controller's part of the vCPU is in the kernel, and with it the sleep of a halted guest.
    pub(crate) in_kernel_apic: bool,
}

static OPERATIONS: FileOperations<Vcpu> = FileOperations::new();

impl Vcpu {
    /// vCPU `shared.id` of `vm`.
    ///
    /// # Errors
    /// `ENOMEM`, and the backend's.
    #[inline(never)] // A stack frame of its own, gone when the caller goes on.
    pub(crate) fn new(vm: Arc<Vm>, shared: Arc<Shared>) -> Result<Arc<Self>> {
        let inner = Inner {
            vcpu: AxVCpu::new(arch::create_config(vm.arch(), shared.id)).map_err(abi::errno)?,
            aspace: None,
            timer: Timer::new(shared.clone())?,
            spare: Spare::empty(),
            seen_generation: 0,
            in_kernel_apic: false,
        };
        let page = Page::new()?;
        Arc::pin_init(
            pin_init!(Self {
                shared,
                vm: Member::vcpu(vm),
                page,
                inner <- new_mutex!(inner),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    fn set_ept_root(&self, inner: &mut Inner, arg: EptRoot) -> Result<isize> {
        abi::must_be_zero(&[arg.reserved.into()])?;
        let aspace = fd::lookup::<AddressSpace>(arg.aspace_fd)?;
        if !aspace.is_of(self.vm.vm()) {
            return Err(EINVAL);
        }
        inner.vcpu.set_ept_root(aspace.root()).map_err(abi::errno)?;
        self.shared.set_aspace(aspace.identity());
        inner.aspace = Some(aspace);
        Ok(0)
    }

    fn set_gpr(inner: &mut Inner, arg: Gpr) -> Result<isize> {
        abi::must_be_zero(&[arg.reserved.into()])?;
        if arg.reg >= arch::GENERAL_REGISTERS {
            return Err(EINVAL);
        }
        inner.vcpu.set_gpr(arg.reg as usize, arg.value as usize).map_err(abi::errno)?;
        Ok(0)
    }
}

impl FdObject for Vcpu {
    const NAME: &'static CStr = c"axvcpu-vcpu";

    fn operations() -> &'static FileOperations<Self> {
        &OPERATIONS
    }

    fn ioctl(this: ArcBorrow<'_, Self>, cmd: u32, arg: usize) -> Result<isize> {
        match cmd {
            ioctl::KICK => {
                this.shared.kick();
                return Ok(0);
            }
            ioctl::VCPU_STATS => return abi::write(arg, this.shared.stats.snapshot()).map(|()| 0),
            _ => this.vm.check_process()?,
        }
        let mut inner = this.inner.try_lock().ok_or_else(|| abi::errno(AxError::Running))?;
        let inner = &mut *inner;
        match cmd {
            ioctl::RUN => this.run(inner),
            ioctl::SET_ENTRY => {
                let entry: Entry = abi::read(arg)?;
                inner.vcpu.set_entry(GuestPhysAddr::new(entry.guest_addr)).map_err(abi::errno)?;
                Ok(0)
            }
            ioctl::SET_EPT_ROOT => this.set_ept_root(inner, abi::read(arg)?),
            ioctl::SETUP => this.setup(inner, abi::read(arg)?),
            ioctl::SET_GPR => Self::set_gpr(inner, abi::read(arg)?),
            ioctl::GET_REGS => regs::get(inner, abi::read::<RegisterSet>(arg)?),
            ioctl::SET_REGS => {
                let result = regs::set(inner, abi::read::<RegisterSet>(arg)?);
                this.publish(inner);
                result
            }
            _ => arch::vcpu_ioctl(&this, inner, cmd, arg),
        }
    }

    fn mmap(this: ArcBorrow<'_, Self>, vma: &VmaNew) -> Result {
        this.vm.check_process()?;
        this.page.map(vma)
    }

    fn show(&self, to: &SeqFile) {
        let stats = self.shared.stats.snapshot();
        seq_print!(to, "vcpu:\t{}\n", self.shared.id);
        seq_print!(to, "state:\t{}\n", stats.state);
        seq_print!(to, "last-cpu:\t{}\n", stats.last_cpu as i32);
        seq_print!(to, "runs:\t{}\n", stats.runs);
        seq_print!(to, "windows:\t{}\n", stats.windows);
        seq_print!(to, "entries:\t{}\n", stats.entries);
        seq_print!(to, "user-exits:\t{}\n", stats.user_exits);
        seq_print!(to, "injections:\t{}\n", stats.injections);
        seq_print!(to, "tlb-flushes:\t{}\n", stats.tlb_flushes);
        seq_print!(to, "migrations:\t{}\n", stats.migrations);
        seq_print!(to, "run-ns:\t{}\n", stats.run_ns);
        seq_print!(to, "halt-ns:\t{}\n", stats.halt_ns);
        for kind in abi_vcpu::ExitKind::ALL {
            let count = stats.exits.get(kind as usize).copied().unwrap_or(0);
            seq_print!(to, "exit-{}:\t{}\n", kind.name(), count);
        }
    }
}
