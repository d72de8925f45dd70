// SPDX-License-Identifier: GPL-2.0-only
//! Eventfds that the guest signals by writing to a port or to an address that is not memory.
//!
//! Which write it is must be known without decoding an instruction. Of port output the CPU tells everything. Of a write to an
//! address that is not memory an AArch64 CPU does, too, an x86 CPU only the address: there the kernel takes only attachments to
//! which width and value do not matter. For others see the client library, which signals them after the exit.
//!
//! Locks: `count`, a mutex, serialises attaching and detaching, and nothing is taken under it. vCPUs take none.

use axvcpu_uapi::{
    exit::AccessWidth,
    vm::{self as abi, IOEVENTFD_DATAMATCH, IOEVENTFD_DETACH, IOEVENTFD_PORT},
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};

use crate::{arch, eventfd::EventFd, ffi::IrqOff, irqfd::MAX_EVENTFDS, published::Published};

/// Ports end here.
const PORTS: u64 = 1 << 16;

/// What a write must be.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Pattern {
    port: bool,
    address: u64,
    /// In bytes; 0 for any.
    width: u32,
    data: Option<u64>,
}

/// An attached eventfd.
#[derive(Clone)]
struct IoEventfd {
    pattern: Pattern,
    event: Arc<EventFd>,
}

/// The eventfds attached to a VM.
#[pin_data]
pub(crate) struct IoEventfds {
    /// How many there are.
    #[pin]
    count: Mutex<usize>,
    /// Those at ports, ordered by number.
    ports: Published<IoEventfd>,
    /// Those at addresses, ordered by these.
    memory: Published<IoEventfd>,
}

impl Pattern {
    /// # Errors
    /// - `EINVAL`: not a write that there can be.
    /// - `EOPNOTSUPP`: one that the kernel cannot tell from others.
    fn new(arg: &abi::IoEventfd) -> Result<Self> {
        if arg.flags & !(IOEVENTFD_DETACH | IOEVENTFD_PORT | IOEVENTFD_DATAMATCH) != 0 {
            return Err(EINVAL);
        }
        crate::abi::must_be_zero(&[arg.reserved.into()])?;
        let port = arg.flags & IOEVENTFD_PORT != 0;
        let width = match arg.width {
            0 => None,
            width => Some(AccessWidth::from_size(width.into()).ok_or(EINVAL)?),
        };
        let data = (arg.flags & IOEVENTFD_DATAMATCH != 0).then_some(arg.data);
        match (data, width) {
            (None, _) => crate::abi::must_be_zero(&[arg.data])?,
            (Some(data), Some(width)) if data & !width.mask() == 0 => {}
            (Some(_), _) => return Err(EINVAL),
        }
        let last = arg.address.checked_add(u64::from(arg.width.max(1)).wrapping_sub(1)).ok_or(EINVAL)?;
        if port && (!arch::HAS_PORTS || last >= PORTS || width == Some(AccessWidth::Qword)) {
            return Err(EINVAL);
        }
        if !arch::KNOWS_STORES && !port && (width.is_some() || data.is_some()) {
            return Err(crate::abi::not_supported());
        }
        Ok(Self { port, address: arg.address, width: arg.width, data })
    }

    /// Whether one write can be both, which are in the same table.
    fn overlaps(&self, other: &Self) -> bool {
        self.address == other.address
            && (self.width == other.width || self.width == 0 || other.width == 0)
            && (self.data == other.data || self.data.is_none() || other.data.is_none())
    }
}

impl IoEventfds {
    /// None.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            count <- new_mutex!(0),
            ports: Published::new(),
            memory: Published::new(),
        })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        *self.count.lock()
    }

    /// `IOEVENTFD`.
    ///
    /// # Errors
    /// - `EINVAL`: unknown flags, a write that there cannot be, something else than an eventfd.
    /// - `EOPNOTSUPP`: a write that the kernel cannot tell from others.
    /// - `EBADF`, `ENOMEM`: as it says.
    /// - `EEXIST`: a write can be this and one attached already. `ENOSPC`: too many. `ENOENT`, to detach: not attached.
    pub(crate) fn change(&self, arg: &abi::IoEventfd) -> Result<isize> {
        let pattern = Pattern::new(arg)?;
        let added = if arg.flags & IOEVENTFD_DETACH == 0 {
            let event = Arc::new(EventFd::get(arg.fd)?, GFP_KERNEL_ACCOUNT)?;
            Some(IoEventfd { pattern, event })
        } else if arg.fd == -1 {
            None
        } else {
            return Err(EINVAL);
        };
        let table = if pattern.port { &self.ports } else { &self.memory };
        let mut count = self.count.lock();
        // SAFETY: We hold the mutex, and have built the new table before it replaces this one.
        let old = unsafe { table.current() };
        if added.is_some() {
            if old.iter().any(|other| other.pattern.overlaps(&pattern)) {
                return Err(EEXIST);
            }
            if *count >= MAX_EVENTFDS {
                return Err(ENOSPC);
            }
        } else if !old.iter().any(|other| other.pattern == pattern) {
            return Err(ENOENT);
        }
        let at = old.partition_point(|other| other.pattern.address < pattern.address);
        let (before, behind) = old.split_at_checked(at).ok_or(EINVAL)?;
        let mut new = KVVec::with_capacity(old.len().saturating_add(1), GFP_KERNEL_ACCOUNT)?;
        for part in [before, added.as_slice(), behind] {
            for entry in part.iter().filter(|entry| added.is_some() || entry.pattern != pattern) {
                new.push(entry.clone(), GFP_KERNEL_ACCOUNT)?;
            }
        }
        let changed = count.wrapping_sub(old.len()).wrapping_add(new.len());
        // SAFETY: We hold the mutex.
        unsafe { table.replace(new) }?;
        *count = changed;
        Ok(0)
    }

    /// Those of `table` at `address`.
    #[inline]
    fn at<'a>(
        table: &'a Published<IoEventfd>,
        address: u64,
        irq_off: &'a IrqOff,
    ) -> impl Iterator<Item = &'a IoEventfd> {
        let table = table.read(irq_off);
        let first = table.partition_point(|entry| entry.pattern.address < address);
        table.get(first..).unwrap_or(&[]).iter().take_while(move |entry| entry.pattern.address == address)
    }

    /// The guest has written `data` to a port. Whether an eventfd was attached to that, which is signalled then.
    #[cfg(CONFIG_X86_64)] // There are no ports elsewhere.
    #[inline]
    pub(crate) fn port_write(&self, port: u16, width: AccessWidth, data: u64, irq_off: &IrqOff) -> bool {
        Self::write(&self.ports, port.into(), width, data, irq_off)
    }

    /// The guest writes `data` to `address`, which is not memory: the same.
    #[cfg(CONFIG_ARM64)] // Elsewhere it is not known: `KNOWS_STORES`.
    #[inline]
    pub(crate) fn store(&self, address: u64, width: AccessWidth, data: u64, irq_off: &IrqOff) -> bool {
        Self::write(&self.memory, address, width, data, irq_off)
    }

    #[inline]
    fn write(
        table: &Published<IoEventfd>,
        address: u64,
        width: AccessWidth,
        data: u64,
        irq_off: &IrqOff,
    ) -> bool {
        let found = Self::at(table, address, irq_off).find(|entry| {
            let Pattern { width: wanted, data: value, .. } = entry.pattern;
            (wanted == 0 || wanted as usize == width.size()) && value.is_none_or(|value| value == data)
        });
        if let Some(entry) = found {
            entry.event.signal();
        }
        found.is_some()
    }

    /// The guest is about to write to `address`, which is not memory. If an eventfd is attached to that, `complete` is to do
    /// the instruction but for the write, and if it can, the eventfd is signalled. Whether it was.
    #[cfg(CONFIG_X86_64)] // Elsewhere more is known: `KNOWS_STORES`.
    #[inline]
    pub(crate) fn memory_write(&self, address: u64, irq_off: &IrqOff, complete: impl FnOnce() -> bool) -> bool {
        match Self::at(&self.memory, address, irq_off).next() {
            Some(entry) if complete() => {
                entry.event.signal();
                true
            }
            _ => false,
        }
    }
}
