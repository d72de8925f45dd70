// SPDX-License-Identifier: MIT OR Apache-2.0
//! Device models and the bus that connects them to the guest's accesses.
//!
//! A [`Device`] answers accesses within the range it was attached to; a [`Bus`] finds it by address. There is one bus for
//! ports and one for physical addresses. Each device has a lock of its own, taken for one access, so that devices of
//! different vCPUs do not wait for each other.
//!
//! Lock order: device, then interrupt controllers, then [`crate::control::Control`]. Nobody who holds the lock of one device
//! accesses another.
//!
//! | file | what |
//! |---|---|
//! | `clock.rs` | time for devices |
//! | `line.rs` | interrupt lines |
//! | `serial.rs` | the serial port |
//!
//! The devices that only one architecture's machine has are among the architecture's files.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub mod clock;
pub mod line;
pub mod serial;

/// A device model.
pub trait Device: Send {
    /// A read of `data.len()` bytes (1, 2, 4 or 8; ports at most 4) at `offset` from the start of the range that the
    /// device was attached to; the range contains all of it. Little endian. Bytes left alone read as all ones.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// A write, likewise.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Devices by address.
#[derive(Default)]
pub struct Bus {
    /// By the last address of each range.
    devices: BTreeMap<u64, Attached>,
    /// Accesses that no device answered.
    unclaimed: AtomicU64,
}

struct Attached {
    start: u64,
    device: Arc<Mutex<dyn Device>>,
}

impl Bus {
    /// A bus without devices.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Attaches `device` to `range`, taking the place of what was attached there.
    pub fn attach<T: Into<u64> + Copy>(&mut self, range: &RangeInclusive<T>, device: Arc<Mutex<dyn Device>>) {
        let (start, last) = ((*range.start()).into(), (*range.end()).into());
        self.devices.retain(|other_last, other| *other_last < start || other.start > last);
        self.devices.insert(last, Attached { start, device });
    }

    fn find(&self, address: u64, size: usize) -> Option<(u64, &Mutex<dyn Device>)> {
        let (last, attached) = self.devices.range(address..).next()?;
        let offset = address.checked_sub(attached.start)?;
        (address.checked_add(size as u64 - 1)? <= *last).then_some((offset, &*attached.device))
    }

    /// A read of 1, 2, 4 or 8 bytes. Says whether a device was there; if not, `data` is all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(address, data.len()) {
            Some((offset, device)) => lock(device).read(offset, data),
            None => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(address = format_args!("{address:#x}"), size = data.len(), "read of nothing");
                return false;
            }
        }
        true
    }

    /// A write of 1, 2, 4 or 8 bytes. Says whether a device was there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => lock(device).write(offset, data),
            None => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(address = format_args!("{address:#x}"), ?data, "write to nothing");
                return false;
            }
        }
        true
    }

    /// Accesses that no device answered, so far.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }
}

/// Locks, also after another thread panicked with the lock held: the program is then on its way out, and devices are
/// never left in a state that matters for that.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Spreads an access of several bytes over byte-wide registers at consecutive offsets, as an 8-bit device on the ISA bus
/// sees it.
pub(crate) fn read_bytes(offset: u64, data: &mut [u8], mut register: impl FnMut(u64) -> u8) {
    for (i, byte) in (0..).zip(data) {
        *byte = register(offset + i);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(Vec<(u64, Vec<u8>)>);
    impl Device for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_find_their_device() {
        let mut bus = Bus::new();
        let echo = Arc::new(Mutex::new(Echo(vec![])));
        bus.attach(&(0x3f8u16..=0x3ff), echo.clone());
        let mut byte = [0];
        assert!(bus.read(0x3ff, &mut byte));
        assert_eq!(byte, [7]);
        for outside in [0x3f7, 0x400, u64::MAX] {
            assert!(!bus.read(outside, &mut byte));
            assert_eq!(byte, [0xff]);
        }
        let mut word = [0, 0];
        assert!(!bus.read(0x3ff, &mut word), "reaches beyond the device");
        assert!(bus.read(0x3f8, &mut word));
        assert_eq!(word, [0, 0xff], "bytes left alone are all ones");
        assert!(bus.write(0x3f9, &[1, 2]));
        assert!(!bus.write(0x80, &[1]));
        assert_eq!(lock(&echo).0, [(1, vec![1, 2])]);
        assert_eq!(bus.unclaimed(), 5);
    }

    #[test]
    fn the_last_device_attached_wins() {
        let mut bus = Bus::new();
        let (a, b) = (Arc::new(Mutex::new(Echo(vec![]))), Arc::new(Mutex::new(Echo(vec![]))));
        bus.attach(&(0u16..=9), a.clone());
        bus.attach(&(5u16..=12), b.clone());
        bus.write(5, &[1]);
        assert!(lock(&a).0.is_empty());
        assert_eq!(lock(&b).0.len(), 1);
    }
}
