// SPDX-License-Identifier: GPL-2.0-only
//! The registration of `/dev/axvcpu` as a misc device.
//!
//! Not by `kernel::miscdevice`: before Linux 7.3 its file operations name no owner, and the module could be unloaded while
//! the device is open.

use kernel::{bindings, prelude::*, types::Opaque};

use crate::{fd, system};

/// The registered device.
///
/// # Invariants
/// `inner` is registered while the object exists.
#[pin_data(PinnedDrop)]
pub(crate) struct Device {
    #[pin]
    inner: Opaque<bindings::miscdevice>,
}

// SAFETY: A misc device may be deregistered from another thread than it was registered from.
unsafe impl Send for Device {}
// SAFETY: There are no methods.
unsafe impl Sync for Device {}

/// The file operations, in a static.
struct Operations(bindings::file_operations);

// SAFETY: A table of function pointers that is never written.
unsafe impl Sync for Operations {}

static OPERATIONS: Operations = {
    let mut table = fd::operations_of_this_module();
    table.unlocked_ioctl = Some(ioctl);
    table.compat_ioctl = Some(ioctl);
    Operations(table)
};

unsafe extern "C" fn ioctl(_file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
    match system::ioctl(cmd, arg) {
        Ok(value) => value as c_long,
        Err(error) => error.to_errno() as c_long,
    }
}

impl Device {
    /// Registers the device. Its node has mode 0600 unless udev says otherwise.
    ///
    /// # Errors
    /// Those of `misc_register`.
    pub(crate) fn register() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            inner <- Opaque::try_ffi_init(|slot: *mut bindings::miscdevice| {
                // SAFETY: `slot` is ours to initialise, and all zero is a device without properties.
                unsafe {
                    slot.write(core::mem::zeroed());
                    (*slot).minor = bindings::MISC_DYNAMIC_MINOR as c_int;
                    (*slot).name = c"axvcpu".as_ptr().cast();
                    (*slot).fops = &OPERATIONS.0;
                    (*slot).mode = 0o600;
                }
                // SAFETY: The device is initialised, pinned, and stays until `drop` deregisters it.
                kernel::error::to_result(unsafe { bindings::misc_register(slot) })
            }),
        })
    }
}

#[pinned_drop]
impl PinnedDrop for Device {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered by the type invariant.
        unsafe { bindings::misc_deregister(self.inner.get()) };
    }
}
