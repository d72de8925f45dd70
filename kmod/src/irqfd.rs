// SPDX-License-Identifier: GPL-2.0-only
//! Eventfds that interrupt the guest: a signal delivers an interrupt message, from the context it comes from; and for
//! level-triggered interrupts, the guest's end of interrupt signals another eventfd.
//!
//! Locks: `list`, a mutex, serialises attaching and detaching; nothing is taken under it but the eventfds' own locks. A
//! signal arrives under its eventfd's lock and takes none of ours.

use core::{
    ptr::NonNull,
    sync::atomic::{AtomicBool, Ordering},
};

use axvcpu_uapi::vm::{self as abi, IRQFD_DETACH, IRQFD_RESAMPLE};
use kernel::{
    fs::LocalFile,
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};

use crate::{
    arch::{self, Message},
    eventfd::{self, EventFd, Listener, Signalled},
    ffi::IrqOff,
    published::Published,
    vm::Vm,
};

/// Eventfds of each direction per VM.
pub(crate) const MAX_EVENTFDS: usize = 256;

/// One attached eventfd.
#[pin_data]
struct Irqfd {
    // First, so that no signal comes any more when the rest is dropped.
    #[pin]
    listener: Listener<Self>,
    message: Message,
    resample: Option<EventFd>,
    /// With `resample`: the interrupt has been delivered and its end has not come.
    asserted: AtomicBool,
    /// The eventfd's last file has been closed.
    closed: AtomicBool,
    /// The VM, whose part this is.
    vm: NonNull<Vm>,
}

// SAFETY: The VM may be used from any thread, and everything else is `Send` by itself.
unsafe impl Send for Irqfd {}
// SAFETY: As above.
unsafe impl Sync for Irqfd {}

impl Signalled for Irqfd {
    fn signalled(&self) {
        if self.closed.load(Ordering::Relaxed) {
            return;
        }
        // Asserted before the message leaves, since its end may come at once on another CPU.
        if self.resample.is_some() && self.asserted.swap(true, Ordering::SeqCst) {
            return;
        }
        // SAFETY: The VM detaches all eventfds before it goes.
        let vm = unsafe { self.vm.as_ref() };
        if !vm.route(&self.message, None) {
            // No vCPU took it, so no end will come.
            self.asserted.store(false, Ordering::SeqCst);
        }
    }

    fn closed(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

/// An eventfd that waits for the end of interrupts of one vector.
struct End {
    vector: u8,
    irqfd: Arc<Irqfd>,
}

/// The eventfds attached to a VM.
#[pin_data]
pub(crate) struct Irqfds {
    #[pin]
    list: Mutex<KVec<Arc<Irqfd>>>,
    /// Those of `list` with a resample eventfd.
    ends: Published<End>,
}

impl Irqfds {
    /// None.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            list <- new_mutex!(KVec::new()),
            ends: Published::new(),
        })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.list.lock().len()
    }

    /// `IRQFD`. `vm` is the VM that these belong to.
    ///
    /// # Errors
    /// - `EINVAL`: unknown flags, a message that is none, something else than an eventfd, resampling of an edge.
    /// - `EOPNOTSUPP`: there is no interrupt controller in the kernel.
    /// - `EBADF`, `ENOMEM`: as it says.
    /// - `EEXIST`: the eventfd is attached already. `ENOSPC`: too many. `ENOENT`, to detach: it is not attached.
    pub(crate) fn change(&self, vm: &Vm, arg: &abi::Irqfd) -> Result<isize> {
        let file = eventfd::file(arg.fd);
        match arg.flags {
            IRQFD_DETACH => {
                crate::abi::must_be_zero(&[arg.resample_fd as u64, arg.address, arg.data.into()])?;
                self.detach(&EventFd::of(&*file?)?)
            }
            0 | IRQFD_RESAMPLE => {
                let message = arch::message(vm, arg.address, arg.data).map_err(crate::abi::errno)?;
                let resample = if arg.flags == IRQFD_RESAMPLE {
                    if !message.level {
                        return Err(EINVAL);
                    }
                    Some(EventFd::get(arg.resample_fd)?)
                } else {
                    crate::abi::must_be_zero(&[arg.resample_fd as u64])?;
                    None
                };
                self.attach(vm, &*file?, message, resample)
            }
            _ => Err(EINVAL),
        }
    }

    fn attach(&self, vm: &Vm, file: &LocalFile, message: Message, resample: Option<EventFd>) -> Result<isize> {
        let event = EventFd::of(file)?;
        let mut list = self.list.lock();
        self.drop_closed(&mut list)?;
        if list.iter().any(|irqfd| irqfd.listener.event().is(&event)) {
            return Err(EEXIST);
        }
        if list.len() >= MAX_EVENTFDS {
            return Err(ENOSPC);
        }
        list.reserve(1, GFP_KERNEL_ACCOUNT)?;
        let resampled = resample.is_some();
        let irqfd = Arc::pin_init(
            try_pin_init!(&this in Irqfd {
                message,
                resample,
                asserted: AtomicBool::new(false),
                closed: AtomicBool::new(false),
                vm: NonNull::from(vm),
                // SAFETY: The listener is a field of the pinned object it points to, initialised last and dropped first.
                listener <- unsafe { Listener::new(file, this.as_ptr().cast_const()) },
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        list.push(irqfd, GFP_KERNEL_ACCOUNT)?;
        if resampled {
            if let Err(error) = self.publish(&list) {
                list.pop();
                return Err(error);
            }
        }
        Ok(0)
    }

    fn detach(&self, event: &EventFd) -> Result<isize> {
        let mut list = self.list.lock();
        let index = list.iter().position(|irqfd| irqfd.listener.event().is(event)).ok_or(ENOENT)?;
        self.remove(&mut list, index)?;
        Ok(0)
    }

    /// Lets go of eventfds that no program has open any more.
    fn drop_closed(&self, list: &mut KVec<Arc<Irqfd>>) -> Result {
        while let Some(index) = list.iter().position(|irqfd| irqfd.closed.load(Ordering::Relaxed)) {
            self.remove(list, index)?;
        }
        Ok(())
    }

    /// Takes one out. When this returns its signals have no effect any more.
    fn remove(&self, list: &mut KVec<Arc<Irqfd>>, index: usize) -> Result {
        let removed = list.remove(index).map_err(|_| ENOENT)?;
        if removed.resample.is_some() {
            if let Err(error) = self.publish(list) {
                // There is room, as one has just been taken out.
                list.push(removed, GFP_KERNEL_ACCOUNT)?;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Shows the vCPUs those of `list`, which is `self.list`, that wait for ends.
    fn publish(&self, list: &[Arc<Irqfd>]) -> Result {
        let mut ends = KVVec::new();
        for irqfd in list.iter().filter(|irqfd| irqfd.resample.is_some()) {
            ends.push(End { vector: irqfd.message.vector, irqfd: irqfd.clone() }, GFP_KERNEL_ACCOUNT)?;
        }
        // SAFETY: The caller holds the mutex around the list.
        unsafe { self.ends.replace(ends) }
    }

    /// The guest has handled the level-triggered interrupt `vector`. Whether it was one of these; they are told then, `before`
    /// which something may be done.
    pub(crate) fn end(&self, vector: u8, irq_off: &IrqOff, before: impl Fn()) -> bool {
        let mut any = false;
        for end in self.ends.read(irq_off).iter().filter(|end| end.vector == vector) {
            if end.irqfd.asserted.swap(false, Ordering::SeqCst) {
                any = true;
                before();
                if let Some(resample) = &end.irqfd.resample {
                    resample.signal();
                }
            }
        }
        any
    }
}
