// SPDX-License-Identifier: GPL-2.0-only
//! The run page, as the kernel sees it: a page of the module's that the process has mapped and may change at any time.
//! Each field is read once and nothing read is trusted.

use axvcpu_uapi::run::RunPage;
use kernel::{mm::virt::VmaNew, prelude::*};
use vcpu_core::HostPhysAddr;

use crate::ffi;

/// The page.
///
/// # Invariants
/// `frame` is a page of `ffi::alloc_pages(0)` that this object owns, and `at` where the kernel sees it.
pub(crate) struct Page {
    frame: HostPhysAddr,
    at: usize,
}

macro_rules! field {
    ($(#[$meta:meta])* $set:ident, $($name:ident).+: $ty:ty) => {
        $(#[$meta])*
        #[inline]
        pub(crate) fn $set(&self, value: $ty) {
            // SAFETY: The field is inside the page, which we own. Volatile, as the process may access it at the same time;
            // whatever tearing it sees is its own affair.
            unsafe { core::ptr::addr_of_mut!((*self.page()).$($name).+).write_volatile(value) }
        }
    };
}

impl Page {
    /// A zeroed page.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        let frame = ffi::alloc_pages(0).ok_or(ENOMEM)?;
        // INVARIANT: Allocated here.
        Ok(Self { frame, at: ffi::phys_to_virt(frame) as usize })
    }

    #[inline]
    fn page(&self) -> *mut RunPage {
        self.at as *mut RunPage
    }

    field!(
        /// Sets why `RUN` returned.
        set_exit, exit: axvcpu_uapi::exit::ExitRecord
    );
    field!(
        /// Sets the state flags.
        set_state, state: u32
    );
    field!(
        /// Sets the number of instruction bytes.
        #[cfg(CONFIG_X86_64)]
        set_insn_len, insn_len: u32
    );
    field!(
        /// Sets the instruction bytes.
        #[cfg(CONFIG_X86_64)]
        set_insn, insn: [u8; 16]
    );
    field!(
        /// Sets the address of the next instruction.
        #[cfg(CONFIG_X86_64)]
        set_next_rip, next_rip: u64
    );
    /// Sets a general register; nothing for a number that is none.
    #[cfg(CONFIG_X86_64)]
    #[inline]
    pub(crate) fn set_gpr(&self, register: usize, value: u64) {
        if register < 16 {
            // SAFETY: As in `field`, and inside the array of 16.
            unsafe { core::ptr::addr_of_mut!((*self.page()).general.gpr).cast::<u64>().add(register).write_volatile(value) };
        }
    }

    field!(
        /// Sets RIP.
        #[cfg(CONFIG_X86_64)]
        set_rip, general.rip: u64
    );
    field!(
        /// Sets RFLAGS.
        #[cfg(CONFIG_X86_64)]
        set_rflags, general.rflags: u64
    );
    field!(
        /// Sets the control registers.
        #[cfg(CONFIG_X86_64)]
        set_control, control: axvcpu_uapi::x86::Control
    );
    field!(
        /// Sets the segments.
        #[cfg(CONFIG_X86_64)]
        set_segments, segments: axvcpu_uapi::x86::Segments
    );
    /// Sets the general registers, with this processor state.
    #[cfg(CONFIG_ARM64)]
    #[inline]
    pub(crate) fn set_general(&self, general: &axvcpu_uapi::arm64::General, pstate: u64) {
        // SAFETY: As in `field`; the page is no memory that references point into. Copied in one go, not by way of the stack, as
        // a volatile write would be.
        unsafe {
            let to = core::ptr::addr_of_mut!((*self.page()).arm64);
            core::ptr::from_ref(general).copy_to_nonoverlapping(to, 1);
            core::ptr::addr_of_mut!((*to).pstate).write_volatile(pstate);
        }
    }
    field!(
        /// Sets the syndrome.
        #[cfg(CONFIG_ARM64)]
        set_esr, esr: u64
    );
    field!(
        /// Sets the address of the fault.
        #[cfg(CONFIG_ARM64)]
        set_far, far: u64
    );
    field!(
        /// Sets the requests, to clear those that have been done.
        set_request, request: u32
    );
    field!(
        /// Sets the reply flags, to clear them.
        set_reply, reply: u32
    );

    /// The caller's requests.
    pub(crate) fn request(&self) -> u32 {
        // SAFETY: As in `field`.
        unsafe { core::ptr::addr_of!((*self.page()).request).read_volatile() }
    }

    /// The caller's reply flags.
    pub(crate) fn reply(&self) -> u32 {
        // SAFETY: As in `field`.
        unsafe { core::ptr::addr_of!((*self.page()).reply).read_volatile() }
    }

    /// The caller's reply value.
    pub(crate) fn value(&self) -> u64 {
        // SAFETY: As in `field`.
        unsafe { core::ptr::addr_of!((*self.page()).value).read_volatile() }
    }

    /// The caller's general registers.
    #[cfg(CONFIG_ARM64)]
    pub(crate) fn general(&self) -> axvcpu_uapi::arm64::General {
        // SAFETY: As in `field`; any bit pattern is valid.
        unsafe { core::ptr::addr_of!((*self.page()).arm64).read_volatile() }
    }

    /// The caller's general registers.
    #[cfg(CONFIG_X86_64)]
    pub(crate) fn general(&self) -> axvcpu_uapi::x86::General {
        // SAFETY: As in `field`; any bit pattern is valid.
        unsafe { core::ptr::addr_of!((*self.page()).general).read_volatile() }
    }

    /// Maps the page into the process: whole, shared, not executable.
    ///
    /// # Errors
    /// `EINVAL`: another size or offset, private, or executable. Otherwise what inserting the page says.
    pub(crate) fn map(&self, vma: &VmaNew) -> Result {
        // SAFETY: The VMA is undergoing set-up and ours to read.
        let offset = unsafe { (*vma.as_ptr()).vm_pgoff };
        let shared = vma.flags() & kernel::mm::virt::flags::SHARED != 0;
        if vma.end().wrapping_sub(vma.start()) != core::mem::size_of::<RunPage>() || offset != 0 || !shared {
            return Err(EINVAL);
        }
        vma.try_clear_mayexec()?;
        vma.set_dontexpand();
        vma.set_dontdump();
        vma.set_mixedmap();
        // SAFETY: The frame is an order-0 page by the type's invariant, and the VMA one of a single page in set-up.
        unsafe { ffi::insert_page(vma.as_ptr(), self.frame) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: We own the frame. A mapping that still exists has a reference to the page of its own.
        unsafe { ffi::free_pages(self.frame, 0) }
    }
}
