// SPDX-License-Identifier: MIT OR Apache-2.0
//! Several accesses that KVM hands over at once, taken apart into what the run loop understands.
//!
//! A repeated `OUTS` comes as many items of one port (`KVM_EXIT_IO` with a count), and an access that runs over a page's
//! edge as pieces of any length up to 8 (`KVM_EXIT_MMIO`).

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::exit::{AccessWidth, AxVCpuExitReason};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// Items of one width, all for the same port.
    Port(u16, AccessWidth),
    /// Consecutive bytes.
    Memory(u64),
}

/// Accesses whose data is in the run page, and how many bytes of it are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    target: Target,
    write: bool,
    /// Offset of the data in the run page.
    data: usize,
    length: usize,
    done: usize,
}

impl Transfer {
    /// Port I/O of `length` bytes in items of `item`.
    pub const fn port(port: u16, item: AccessWidth, write: bool, data: usize, length: usize) -> Self {
        Self { target: Target::Port(port, item), write, data, length, done: 0 }
    }

    /// An access to `length` bytes of device memory.
    pub const fn memory(at: u64, write: bool, data: usize, length: usize) -> Self {
        Self { target: Target::Memory(at), write, data, length, done: 0 }
    }

    /// Offset in the run page and width of the access that is next; `None` if all are done.
    pub fn part(&self) -> Option<(usize, AccessWidth)> {
        let left = self.length.checked_sub(self.done).filter(|left| *left > 0)?;
        let width = match self.target {
            Target::Port(_, item) => item,
            // The largest power of two: the whole, unless the length is none itself.
            Target::Memory(_) => match left {
                8.. => AccessWidth::Qword,
                4..8 => AccessWidth::Dword,
                2..4 => AccessWidth::Word,
                _ => AccessWidth::Byte,
            },
        };
        Some((self.data + self.done, width))
    }

    /// That access as an exit; `data` is what it writes.
    pub fn exit(&self, width: AccessWidth, data: u64) -> AxVCpuExitReason {
        match (self.target, self.write) {
            (Target::Port(port, _), false) => AxVCpuExitReason::IoRead { port, width },
            (Target::Port(port, _), true) => AxVCpuExitReason::IoWrite { port, width, data },
            (Target::Memory(at), write) => {
                let addr = GuestPhysAddr::new(at.wrapping_add(self.done as u64));
                if write {
                    AxVCpuExitReason::MmioWrite { addr, width, data }
                } else {
                    // KVM knows the destination and completes the instruction itself.
                    AxVCpuExitReason::MmioRead { addr, width, reg: 0, reg_width: width, signed_ext: false }
                }
            }
        }
    }

    /// The access that was next is done.
    pub fn advance(&mut self) {
        if let Some((_, width)) = self.part() {
            self.done += width.size();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(mut transfer: Transfer) -> Vec<(usize, AxVCpuExitReason)> {
        let mut found = Vec::new();
        while let Some((offset, width)) = transfer.part() {
            found.push((offset, transfer.exit(width, offset as u64)));
            transfer.advance();
        }
        found
    }

    #[test]
    fn string_output_is_one_exit_an_item() {
        let exits = all(Transfer::port(0x1f0, AccessWidth::Word, true, 4096, 6));
        let exit = |data| AxVCpuExitReason::IoWrite { port: 0x1f0, width: AccessWidth::Word, data };
        assert_eq!(exits, [(4096, exit(4096)), (4098, exit(4098)), (4100, exit(4100))]);
    }

    #[test]
    fn memory_accesses_stay_whole_if_they_can() {
        for (length, widths) in
            [(1, vec![1]), (2, vec![2]), (4, vec![4]), (8, vec![8]), (3, vec![2, 1]), (7, vec![4, 2, 1])]
        {
            let exits = all(Transfer::memory(0x1001, false, 100, length));
            let mut at = 0;
            for ((offset, exit), size) in exits.iter().zip(&widths) {
                let width = AccessWidth::from_size(*size).unwrap();
                let addr = GuestPhysAddr::new(0x1001 + at);
                let wanted = AxVCpuExitReason::MmioRead { addr, width, reg: 0, reg_width: width, signed_ext: false };
                assert_eq!((*offset, *exit), (100 + at as usize, wanted));
                at += size;
            }
            assert_eq!(exits.len(), widths.len());
        }
    }
}
