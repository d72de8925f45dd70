// SPDX-License-Identifier: GPL-2.0-only
//! The functions of `helpers.c`: the calls into the C side of the kernel that its Rust bindings cannot make. Each is
//! wrapped once, in a safe function where that is possible; the other files use these wrappers only. Some of them each
//! architecture implements in its own way, in `x86/helpers.c` and
//! `arm64/helpers.c`.

use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use kernel::{bindings, prelude::*, types::Opaque};

use vcpu_core::HostPhysAddr;

mod raw {
    use kernel::bindings;

    // The kernel's structures are passed by pointer only, so what bindgen makes of their inside does not matter.
    #[allow(improper_ctypes)]
    extern "C" {
        pub(super) fn axvcpu_alloc_pages(order: u32) -> usize;
        pub(super) fn axvcpu_split_pages(addr: usize, order: u32);
        pub(super) fn axvcpu_free_pages(addr: usize, order: u32);
        pub(super) fn axvcpu_virt_to_phys(addr: usize) -> u64;
        pub(super) fn axvcpu_page_to_phys(page: *mut bindings::page) -> u64;
        pub(super) fn axvcpu_mark_guest_page(page: *mut bindings::page, dirty: bool);
        pub(super) fn axvcpu_put_guest_page(page: *mut bindings::page);
        pub(super) fn axvcpu_access_ok(addr: usize, size: usize) -> bool;
        pub(super) fn axvcpu_insert_page(vma: *mut bindings::vm_area_struct, addr: usize) -> i32;
        pub(super) fn axvcpu_host_leaf_shift(mm: *mut bindings::mm_struct, addr: usize) -> u32;
        pub(super) fn axvcpu_host_leaf(mm: *mut bindings::mm_struct, addr: usize) -> u64;
        pub(super) fn axvcpu_anon_fd(
            name: *const kernel::ffi::c_char,
            fops: *const bindings::file_operations,
            private: *mut core::ffi::c_void,
        ) -> i32;
        pub(super) fn axvcpu_listen(
            file: *mut bindings::file,
            wait: *mut bindings::wait_queue_entry,
            wake: bindings::wait_queue_func_t,
        );
        pub(super) fn axvcpu_preempt_disable();
        pub(super) fn axvcpu_preempt_enable();
        pub(super) fn axvcpu_irq_disable();
        pub(super) fn axvcpu_irq_enable();
        pub(super) fn axvcpu_work_pending() -> bool;
        pub(super) fn axvcpu_handle_work() -> i32;
        pub(super) fn axvcpu_send_ipi(cpu: i32);
        pub(super) fn axvcpu_interrupt_and_wait(cpu: i32);
        pub(super) fn axvcpu_wait(
            wait: *mut bindings::rcuwait,
            ready: unsafe extern "C" fn(*const core::ffi::c_void) -> bool,
            data: *const core::ffi::c_void,
        ) -> i32;
        pub(super) fn axvcpu_wake(wait: *mut bindings::rcuwait);
        pub(super) fn axvcpu_yield_to(slot: *const *mut bindings::task_struct) -> i32;
        pub(super) fn axvcpu_fpu_begin();
        pub(super) fn axvcpu_fpu_end();
    }
}

/// Allocates `1 << order` zeroed pages, accounted to the caller's memory cgroup. May sleep.
pub(crate) fn alloc_pages(order: u32) -> Option<HostPhysAddr> {
    // SAFETY: No precondition but a context that may sleep, which every caller is.
    let addr = unsafe { raw::axvcpu_alloc_pages(order) };
    if addr == 0 {
        return None;
    }
    // SAFETY: `addr` is in the direct map, as the page allocator just returned it.
    let phys = unsafe { raw::axvcpu_virt_to_phys(addr) };
    DIRECT_MAP.store(addr.wrapping_sub(phys as usize), Ordering::Relaxed);
    Some(HostPhysAddr::new(phys))
}

/// Allocates `1 << order` pages as [`alloc_pages`] does, but each to be freed by itself, with order 0.
pub(crate) fn alloc_single_pages(order: u32) -> Option<HostPhysAddr> {
    let addr = alloc_pages(order)?;
    // SAFETY: The block was just allocated with this order, and nobody else knows of it.
    unsafe { raw::axvcpu_split_pages(phys_to_virt(addr) as usize, order) };
    Some(addr)
}

/// Frees what [`alloc_pages`] gave.
///
/// # Safety
/// `addr` and `order` come from one call of [`alloc_pages`], are freed once, and nothing uses the pages any more.
pub(crate) unsafe fn free_pages(addr: HostPhysAddr, order: u32) {
    // SAFETY: The caller hands back an allocation of the page allocator, with its order.
    unsafe { raw::axvcpu_free_pages(phys_to_virt(addr) as usize, order) }
}

/// Where the direct map shows physical address 0. It is one map, and stays where it is; every allocation tells it again.
static DIRECT_MAP: AtomicUsize = AtomicUsize::new(0);

/// Where the direct map shows physical memory. All that anybody here has the address of is a frame of [`alloc_pages`], or has been
/// found with the help of one (a guest's page, through its tables), so the map's place is known.
#[inline]
pub(crate) fn phys_to_virt(addr: HostPhysAddr) -> *mut u8 {
    DIRECT_MAP.load(Ordering::Relaxed).wrapping_add(addr.as_u64() as usize) as *mut u8
}

/// A page of guest memory that the host's memory management lent us, with one reference.
pub(crate) struct GuestPage {
    page: *mut bindings::page,
    writable: bool,
}

impl GuestPage {
    /// Looks up the page behind `addr` in the current process, faulting it in where needed. May sleep.
    ///
    /// `write` asks for a page that the guest may write: copy-on-write is broken now. Without it, but with `may_write`, a
    /// writable page is taken if the host has one there already, otherwise a read-only one.
    ///
    /// # Errors
    /// What `get_user_pages_fast` says: `EFAULT` if nothing is mapped there or not so, `EINTR` for a fatal signal, ...
    pub(crate) fn lookup(addr: usize, write: bool, may_write: bool) -> Result<Self> {
        let mut page: *mut bindings::page = core::ptr::null_mut();
        if may_write && !write {
            // SAFETY: `page` has room for the one page asked for; this never sleeps nor faults.
            let got = unsafe { bindings::get_user_pages_fast_only(addr, 1, bindings::FOLL_WRITE, &mut page) };
            if got == 1 {
                return Ok(Self::marked(page, true));
            }
        }
        let flags = if write { bindings::FOLL_WRITE } else { 0 };
        // SAFETY: `page` has room for the one page asked for, and the current process has an address space: it is in an ioctl.
        let got = unsafe { bindings::get_user_pages_fast(addr, 1, flags, &mut page) };
        match got {
            1 => Ok(Self::marked(page, write)),
            0 => Err(EFAULT),
            error => Err(Error::from_errno(error)),
        }
    }

    /// Takes over a reference, and tells the host that the guest will use the page, before it can.
    fn marked(page: *mut bindings::page, writable: bool) -> Self {
        // SAFETY: The caller has a reference to the page and holds no lock, so locking the page is fine.
        unsafe { raw::axvcpu_mark_guest_page(page, writable) };
        Self { page, writable }
    }

    /// The page's address.
    pub(crate) fn phys(&self) -> HostPhysAddr {
        // SAFETY: We hold a reference to the page.
        HostPhysAddr::new(unsafe { raw::axvcpu_page_to_phys(self.page) })
    }

    /// Whether the guest may be allowed to write it.
    pub(crate) fn writable(&self) -> bool {
        self.writable
    }
}

impl Drop for GuestPage {
    fn drop(&mut self) {
        // SAFETY: We own one reference, given up here. A mapping made meanwhile does not need it: an MMU notifier takes the
        // mapping down before the page goes away.
        unsafe { raw::axvcpu_put_guest_page(self.page) }
    }
}

/// Whether the range can be memory of the current process at all, rather than the kernel's.
pub(crate) fn is_user_range(addr: u64, size: u64) -> bool {
    let (Ok(addr), Ok(size)) = (usize::try_from(addr), usize::try_from(size)) else {
        return false;
    };
    // SAFETY: Compares numbers.
    unsafe { raw::axvcpu_access_ok(addr, size) }
}

/// The size, as log2 of bytes, of the leaf by which the host maps `addr` in `mm`; 0 if it does not.
///
/// The answer is only good while the caller excludes MMU notifier invalidations.
///
/// # Safety
/// `mm` is a live address space.
pub(crate) unsafe fn host_leaf_shift(mm: *mut bindings::mm_struct, addr: usize) -> u32 {
    // SAFETY: `mm` is live by the caller's promise; the walk itself keeps the tables from being freed.
    unsafe { raw::axvcpu_host_leaf_shift(mm, addr) }
}

/// A page as the host's own page table maps it: see `axvcpu_host_leaf` in `helpers.c`.
#[derive(Clone, Copy)]
pub(crate) struct HostLeaf(u64);

impl HostLeaf {
    /// `AXVCPU_LEAF_SHIFT` of `helpers.h`.
    const SHIFT: u64 = 0x3f;
    /// `AXVCPU_LEAF_USABLE`.
    const USABLE: u64 = 0x40;
    /// `AXVCPU_LEAF_WRITABLE`.
    const WRITABLE: u64 = 0x80;
    /// `AXVCPU_LEAF_DIRTY`.
    const DIRTY: u64 = 0x100;

    /// How `addr` is mapped in `mm`, if a CPU could use the mapping as it is: the page is there, the host has seen it used, and it
    /// is of a kind whose owner need not be told of its users.
    ///
    /// The answer is only good while the caller excludes MMU notifier invalidations.
    ///
    /// # Safety
    /// `mm` is a live address space.
    #[inline]
    pub(crate) unsafe fn usable(mm: *mut bindings::mm_struct, addr: usize, _irq_off: &IrqOff) -> Option<Self> {
        // SAFETY: `mm` is live by the caller's promise, and interrupts are off, which keeps its tables from being freed.
        let leaf = unsafe { raw::axvcpu_host_leaf(mm, addr) };
        (leaf & Self::USABLE != 0).then_some(Self(leaf))
    }

    /// The page of 4 KiB around the address.
    #[inline]
    pub(crate) fn phys(self) -> HostPhysAddr {
        HostPhysAddr::new(self.0).align_down(4096)
    }

    /// The size of the mapping, as log2 of bytes.
    #[inline]
    pub(crate) fn shift(self) -> u32 {
        (self.0 & Self::SHIFT) as u32
    }

    /// Whether writes are allowed.
    #[inline]
    pub(crate) fn writable(self) -> bool {
        self.0 & Self::WRITABLE != 0
    }

    /// Whether the host takes the page for written already.
    #[inline]
    pub(crate) fn dirty(self) -> bool {
        self.0 & Self::DIRTY != 0
    }
}

/// Maps the page at `addr` as the only page of `vma`.
///
/// # Safety
/// `addr` is an order-0 page of [`alloc_pages`], and `vma` is being set up by an mmap of one page.
pub(crate) unsafe fn insert_page(vma: *mut bindings::vm_area_struct, addr: HostPhysAddr) -> Result {
    // SAFETY: By the caller's promise.
    kernel::error::to_result(unsafe { raw::axvcpu_insert_page(vma, phys_to_virt(addr) as usize) })
}

/// Gives the current process a new file descriptor for an anonymous file.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`; then `private` is still the caller's.
///
/// # Safety
/// `private` is what the functions of `fops` expect as the file's private data; on success the file owns it.
pub(crate) unsafe fn anon_fd(
    name: &CStr,
    fops: &'static bindings::file_operations,
    private: *mut core::ffi::c_void,
) -> Result<i32> {
    // SAFETY: The name is copied, the operations are static, and `private` fits them by the caller's promise.
    let fd = unsafe { raw::axvcpu_anon_fd(name.as_ptr().cast(), fops, private) };
    if fd < 0 {
        return Err(Error::from_errno(fd));
    }
    Ok(fd)
}

/// A function that a wait queue calls for an entry.
pub(crate) type Wake =
    unsafe extern "C" fn(*mut bindings::wait_queue_entry, c_uint, c_int, *mut core::ffi::c_void) -> c_int;

/// Initialises `wait` and puts it into the wait queue of the eventfd that `file` is. `wake` is called at once, without poll
/// flags, and from then on at each wake-up, always under the eventfd's lock.
///
/// # Safety
/// `file` is an eventfd. `wait` can be written, stays where it is until it has been taken out of the queue, and `wake` may be
/// called with it from now on.
pub(crate) unsafe fn listen(file: *mut bindings::file, wait: *mut bindings::wait_queue_entry, wake: Wake) {
    // SAFETY: By the caller's promise.
    unsafe { raw::axvcpu_listen(file, wait, Some(wake)) }
}

/// Proof that this thread stays on its CPU: preemption is off while it lives.
pub(crate) struct PreemptOff(core::marker::PhantomData<*mut ()>);

impl PreemptOff {
    /// Turns preemption off.
    pub(crate) fn new() -> Self {
        // SAFETY: Balanced by `drop`.
        unsafe { raw::axvcpu_preempt_disable() };
        Self(core::marker::PhantomData)
    }
}

impl Drop for PreemptOff {
    fn drop(&mut self) {
        // SAFETY: Balances `new`.
        unsafe { raw::axvcpu_preempt_enable() }
    }
}

/// Proof that interrupts are off on this CPU while it lives, and so that the thread stays there. They were on before.
pub(crate) struct IrqOff(core::marker::PhantomData<*mut ()>);

impl IrqOff {
    /// Turns interrupts off, and with them preemption. They must be on.
    pub(crate) fn new() -> Self {
        // SAFETY: Balanced by `drop`.
        unsafe { raw::axvcpu_irq_disable() };
        Self(core::marker::PhantomData)
    }

    /// Whether a signal, a reschedule or task work waits, for which the guest must be left.
    #[inline]
    pub(crate) fn work_pending(&self) -> bool {
        // SAFETY: Interrupts are off, as the function asserts.
        unsafe { raw::axvcpu_work_pending() }
    }

    /// Ends it by `enable`, which turns interrupts on.
    #[cfg(CONFIG_X86_64)]
    pub(crate) fn end_by(self, enable: impl FnOnce()) {
        core::mem::forget(self);
        enable();
    }
}

impl Drop for IrqOff {
    fn drop(&mut self) {
        // SAFETY: Balances `new`; they were on before it.
        unsafe { raw::axvcpu_irq_enable() }
    }
}

/// Reschedules and does the task work that waits.
///
/// # Errors
/// `EINTR` if a signal waits.
pub(crate) fn handle_work() -> Result {
    // SAFETY: Called on the way through an ioctl, where sleeping is fine and no lock but the vCPU's mutex is held.
    kernel::error::to_result(unsafe { raw::axvcpu_handle_work() })
}

/// Makes `cpu` leave the guest, without waiting. From any context.
pub(crate) fn send_ipi(cpu: i32) {
    // SAFETY: The helper checks that the CPU is online, and it is not this one.
    unsafe { raw::axvcpu_send_ipi(cpu) }
}

/// Makes `cpu` leave the guest and waits until it has interrupts on again. Interrupts are on here.
pub(crate) fn interrupt_and_wait(cpu: i32) {
    // SAFETY: Interrupts are on and this is process context: the callers are ioctls and MMU notifiers.
    unsafe { raw::axvcpu_interrupt_and_wait(cpu) }
}

/// A place where one thread sleeps and any context wakes it.
pub(crate) struct WaitPoint(Opaque<bindings::rcuwait>);

// SAFETY: `rcuwait` is made to be used from several contexts at once.
unsafe impl Send for WaitPoint {}
// SAFETY: As above.
unsafe impl Sync for WaitPoint {}

impl WaitPoint {
    /// A place where nobody sleeps.
    pub(crate) fn new() -> Self {
        // An `rcuwait` without a task is all zero (`rcuwait_init`).
        Self(Opaque::zeroed())
    }

    /// Sleeps until `ready` says so. One thread at a time: the caller holds the vCPU's mutex.
    ///
    /// # Errors
    /// `EINTR` if a signal waits.
    pub(crate) fn wait<T>(&self, data: &T, ready: unsafe extern "C" fn(*const core::ffi::c_void) -> bool) -> Result {
        // SAFETY: The structure is initialised, and `data` outlives the call; `ready` gets just this pointer.
        kernel::error::to_result(unsafe { raw::axvcpu_wait(self.0.get(), ready, core::ptr::from_ref(data).cast()) })
    }

    /// Wakes the sleeper, if there is one. From any context.
    pub(crate) fn wake(&self) {
        // SAFETY: The structure is initialised.
        unsafe { raw::axvcpu_wake(self.0.get()) }
    }
}

/// Saves the current user's FPU state and lends the FPU to the caller, with preemption off.
///
/// # Safety
/// Process context, and the FPU is not lent already. [`fpu_end`] follows.
pub(crate) unsafe fn fpu_begin() {
    // SAFETY: The caller's promise.
    unsafe { raw::axvcpu_fpu_begin() }
}

/// Gives the FPU back.
///
/// # Safety
/// Pairs with [`fpu_begin`].
pub(crate) unsafe fn fpu_end() {
    // SAFETY: The caller's promise.
    unsafe { raw::axvcpu_fpu_end() }
}

/// The thread that is at work somewhere right now, to which another may yield its CPU.
pub(crate) struct Worker(AtomicPtr<bindings::task_struct>);

impl Worker {
    /// Nobody.
    pub(crate) const fn new() -> Self {
        Self(AtomicPtr::new(core::ptr::null_mut()))
    }

    /// The current thread is at work until the guard goes. One thread at a time: the caller holds the vCPU's mutex.
    pub(crate) fn begin(&self) -> AtWork<'_> {
        self.0.store(current!().as_ptr(), Ordering::Release);
        AtWork(&self.0)
    }

    /// Yields the CPU to the worker, if it could run but has none. May sleep. Says whether that was so.
    ///
    /// # Errors
    /// `ESRCH` if both are alone on their CPUs.
    pub(crate) fn yield_to(&self) -> Result<bool> {
        // SAFETY: What the pointer points to, if it is not null, is a task that had not ended its work, and so had not ended, when
        // it was read; the helper reads it inside of an RCU section and keeps the task from being freed from then on.
        let yielded = unsafe { raw::axvcpu_yield_to(self.0.as_ptr()) };
        if yielded < 0 {
            return Err(Error::from_errno(yielded));
        }
        Ok(yielded > 0)
    }
}

/// Proof that the current thread is a [`Worker`].
pub(crate) struct AtWork<'a>(&'a AtomicPtr<bindings::task_struct>);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.store(core::ptr::null_mut(), Ordering::Release);
    }
}
