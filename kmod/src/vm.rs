// SPDX-License-Identifier: GPL-2.0-only
//! A virtual machine: what its vCPUs and address spaces have in common.
//!
//! vCPU slots are filled once and never emptied, so interrupts are routed without a lock. Creating is serialised by
//! `creation`, which is taken inside no other lock. The eventfds have locks of their own (`irqfd`, `ioeventfd`).

use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use axvcpu_uapi::{ioctl, vm as abi_vm};
use kernel::{
    mm::Mm,
    new_mutex,
    prelude::*,
    seq_file::SeqFile,
    seq_print,
    sync::{aref::ARef, Arc, ArcBorrow, Mutex, SetOnce},
};

use crate::{
    abi,
    arch::{self, VmState},
    aspace::AddressSpace,
    fd::{self, FdObject, FileOperations},
    ioeventfd::IoEventfds,
    irqfd::Irqfds,
    shared::{Need, Shared},
    vcpu::Vcpu,
};

/// vCPUs per VM.
pub(crate) const MAX_VCPUS: usize = 64;
/// Address spaces per VM.
pub(crate) const MAX_ADDRESS_SPACES: u32 = 16;

/// VMs that exist.
static COUNT: AtomicU32 = AtomicU32::new(0);

/// How many VMs exist in the system.
pub(crate) fn count() -> u32 {
    COUNT.load(Ordering::Relaxed)
}

/// A VM.
#[pin_data(PinnedDrop)]
pub(crate) struct Vm {
    // First, so that no signal comes any more when the rest is dropped.
    #[pin]
    pub(crate) irqfds: Irqfds,
    #[pin]
    pub(crate) ioeventfds: IoEventfds,
    /// The address space of the process that created it, the only one that may use it.
    mm: ARef<Mm>,
    slots: [SetOnce<Arc<Shared>>; MAX_VCPUS],
    #[pin]
    creation: Mutex<()>,
    vcpus: AtomicU32,
    address_spaces: AtomicU32,
    /// The slot that a spinning vCPU has yielded to last.
    boosted: AtomicUsize,
    arch: VmState,
    pub(crate) stats: Stats,
}

/// Counters of a VM, over all its address spaces. Written by whoever causes the event.
#[derive(Default)]
pub(crate) struct Stats {
    pub(crate) pages_4k: AtomicU64,
    pub(crate) pages_2m: AtomicU64,
    pub(crate) table_pages: AtomicU64,
    pub(crate) faults: AtomicU64,
    pub(crate) invalidations: AtomicU64,
    pub(crate) shootdowns: AtomicU64,
    pub(crate) log_pages: AtomicU64,
}

static OPERATIONS: FileOperations<Vm> = FileOperations::new();

impl Vm {
    /// A VM of the current process.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let mm = current_mm()?;
        let this = Arc::pin_init(
            pin_init!(Self {
                irqfds <- Irqfds::new(),
                ioeventfds <- IoEventfds::new(),
                mm,
                slots: [const { SetOnce::new() }; MAX_VCPUS],
                creation <- new_mutex!(()),
                vcpus: AtomicU32::new(0),
                address_spaces: AtomicU32::new(0),
                boosted: AtomicUsize::new(0),
                arch: arch::new_vm(),
                stats: Stats::default(),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        COUNT.fetch_add(1, Ordering::Relaxed);
        Ok(this)
    }

    /// The address space that the VM belongs to.
    pub(crate) fn mm(&self) -> &ARef<Mm> {
        &self.mm
    }

    /// What the architecture keeps for the VM.
    pub(crate) fn arch(&self) -> &VmState {
        &self.arch
    }

    /// Refuses callers of other processes.
    ///
    /// # Errors
    /// `EXDEV`.
    pub(crate) fn check_process(&self) -> Result {
        let here = current!().mm().is_some_and(|mm| core::ptr::eq(mm.as_raw(), self.mm.as_raw()));
        if here {
            Ok(())
        } else {
            Err(abi::other_process())
        }
    }

    /// All vCPUs.
    pub(crate) fn vcpus(&self) -> impl Iterator<Item = &Arc<Shared>> + Clone {
        self.slots.iter().filter_map(SetOnce::as_ref)
    }

    /// `spinner` waits for another vCPU by spinning: gives this thread's CPU to one that could run but has none, first to who
    /// has events to take, last to other spinners, and among equals to each in turn (compare `kvm_vcpu_on_spin` in Linux
    /// `virt/kvm/kvm_main.c`). Nothing happens if all that could run do. May sleep.
    pub(crate) fn yield_for(&self, spinner: &Shared) {
        /// CPUs that are not worth yielding, after which to give up.
        const TRIES: u32 = 3;
        let last = self.boosted.load(Ordering::Relaxed);
        let mut refused = 0;
        for need in Need::ALL {
            // Round the slots, from the one behind the last.
            let slots = (0..MAX_VCPUS).map(|i| last.wrapping_add(i).wrapping_add(1) % MAX_VCPUS);
            for (index, vcpu) in slots.filter_map(|index| Some((index, self.slots.get(index)?.as_ref()?))) {
                if vcpu.id == spinner.id || vcpu.need() != Some(need) {
                    continue;
                }
                match vcpu.worker.yield_to() {
                    Ok(true) => {
                        self.boosted.store(index, Ordering::Relaxed);
                        return;
                    }
                    Ok(false) => {}
                    Err(_) => refused += 1,
                }
                if refused >= TRIES {
                    return;
                }
            }
        }
    }

    fn create_vcpu(this: ArcBorrow<'_, Self>, arg: abi_vm::CreateVcpu) -> Result<isize> {
        abi::must_be_zero(&[arg.flags.into()])?;
        let _creation = this.creation.lock();
        let slot = this.slots.get(arg.id as usize).ok_or(EINVAL)?;
        if slot.as_ref().is_some() {
            return Err(EEXIST);
        }
        let shared = Arc::new(Shared::new(arg.id)?, GFP_KERNEL_ACCOUNT)?;
        let vcpu = Vcpu::new(this.into(), shared.clone())?;
        let fd = fd::install(vcpu)?;
        // Nobody fills the slot but under the mutex that we hold.
        slot.populate(shared);
        Ok(fd)
    }

    fn create_address_space(this: ArcBorrow<'_, Self>, arg: abi_vm::CreateAddressSpace) -> Result<isize> {
        abi::must_be_zero(&[arg.flags.into(), arg.reserved.into()])?;
        let _creation = this.creation.lock();
        if this.address_spaces.load(Ordering::Relaxed) >= MAX_ADDRESS_SPACES {
            return Err(ENOSPC);
        }
        fd::install(AddressSpace::new(this.into())?)
    }

    fn statistics(&self) -> abi_vm::VmStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        abi_vm::VmStats {
            vcpus: self.vcpus.load(Ordering::Relaxed),
            address_spaces: self.address_spaces.load(Ordering::Relaxed),
            pages_4k: get(&self.stats.pages_4k),
            pages_2m: get(&self.stats.pages_2m),
            table_pages: get(&self.stats.table_pages),
            faults: get(&self.stats.faults),
            invalidations: get(&self.stats.invalidations),
            shootdowns: get(&self.stats.shootdowns),
            log_pages: get(&self.stats.log_pages),
        }
    }
}

/// A reference to a VM that counts as one of its objects.
pub(crate) struct Member {
    vm: Arc<Vm>,
    counter: fn(&Vm) -> &AtomicU32,
}

impl Member {
    /// Membership of a vCPU.
    pub(crate) fn vcpu(vm: Arc<Vm>) -> Self {
        Self::new(vm, |vm| &vm.vcpus)
    }

    /// Membership of an address space.
    pub(crate) fn address_space(vm: Arc<Vm>) -> Self {
        Self::new(vm, |vm| &vm.address_spaces)
    }

    fn new(vm: Arc<Vm>, counter: fn(&Vm) -> &AtomicU32) -> Self {
        counter(&vm).fetch_add(1, Ordering::Relaxed);
        Self { vm, counter }
    }

    /// The VM.
    pub(crate) fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }
}

impl core::ops::Deref for Member {
    type Target = Vm;
    fn deref(&self) -> &Vm {
        &self.vm
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        (self.counter)(&self.vm).fetch_sub(1, Ordering::Relaxed);
    }
}

/// A reference to the current process's address space that does not keep its memory.
///
/// # Errors
/// `ESRCH` for a kernel thread.
fn current_mm() -> Result<ARef<Mm>> {
    let current = current!();
    let mm = current.mm().ok_or(ESRCH)?;
    let mm: &Mm = mm;
    Ok(mm.into())
}

#[pinned_drop]
impl PinnedDrop for Vm {
    fn drop(self: Pin<&mut Self>) {
        COUNT.fetch_sub(1, Ordering::Relaxed);
    }
}

impl FdObject for Vm {
    const NAME: &'static CStr = c"axvcpu-vm";

    fn operations() -> &'static FileOperations<Self> {
        &OPERATIONS
    }

    fn ioctl(this: ArcBorrow<'_, Self>, cmd: u32, arg: usize) -> Result<isize> {
        if cmd == ioctl::VM_STATS {
            return abi::write(arg, this.statistics()).map(|()| 0);
        }
        this.check_process()?;
        match cmd {
            ioctl::CREATE_ADDRESS_SPACE => Self::create_address_space(this, abi::read(arg)?),
            ioctl::CREATE_VCPU => Self::create_vcpu(this, abi::read(arg)?),
            ioctl::IRQFD => this.irqfds.change(&this, &abi::read(arg)?),
            ioctl::IOEVENTFD => this.ioeventfds.change(&abi::read(arg)?),
            _ => arch::vm_ioctl(&this, cmd, arg),
        }
    }

    fn show(&self, to: &SeqFile) {
        let stats = self.statistics();
        seq_print!(to, "vcpus:\t{}\n", stats.vcpus);
        seq_print!(to, "address-spaces:\t{}\n", stats.address_spaces);
        seq_print!(to, "pages-4k:\t{}\n", stats.pages_4k);
        seq_print!(to, "pages-2m:\t{}\n", stats.pages_2m);
        seq_print!(to, "table-pages:\t{}\n", stats.table_pages);
        seq_print!(to, "faults:\t{}\n", stats.faults);
        seq_print!(to, "invalidations:\t{}\n", stats.invalidations);
        seq_print!(to, "shootdowns:\t{}\n", stats.shootdowns);
        seq_print!(to, "log-pages:\t{}\n", stats.log_pages);
        seq_print!(to, "irqfds:\t{}\n", self.irqfds.count());
        seq_print!(to, "ioeventfds:\t{}\n", self.ioeventfds.count());
    }
}
