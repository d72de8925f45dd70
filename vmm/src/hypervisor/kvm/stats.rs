// SPDX-License-Identifier: MIT OR Apache-2.0
//! KVM's binary statistics: a file that describes its own counters (Linux `Documentation/virt/kvm/api.rst`,
//! `KVM_GET_STATS_FD`).

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::{KVMIO, KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_INSTANT, KVM_STATS_TYPE_MASK};

nix::ioctl_none!(get_stats_fd, KVMIO, 0xce);

/// More than the file of any KVM holds.
const ENOUGH: usize = 1 << 16;

/// The plain counters of the VM or vCPU that `file` is, by KVM's names; `None` where KVM has none (before Linux 5.14).
pub(crate) fn read(file: &impl AsRawFd) -> Option<Vec<(String, u64)>> {
    // SAFETY: the request takes no argument.
    let fd = unsafe { get_stats_fd(file.as_raw_fd()) }.ok()?;
    // SAFETY: the descriptor is new, and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    let mut bytes = vec![0; ENOUGH];
    let size = file.read_at(&mut bytes, 0).ok()?;
    bytes.truncate(size);
    parse(&bytes)
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    usize::try_from(u32::from_ne_bytes(bytes.try_into().ok()?)).ok()
}

/// `struct kvm_stats_header`: flags, name size, number of descriptors, and the offsets of id, descriptors and data. Each
/// `struct kvm_stats_desc`: flags; exponent and number of values, 16 bits each; offset in the data; bucket size; name.
fn parse(bytes: &[u8]) -> Option<Vec<(String, u64)>> {
    let (name_size, count) = (word(bytes, 4)?, word(bytes, 8)?);
    let (descriptors, data) = (word(bytes, 16)?, word(bytes, 20)?);
    let mut counters = Vec::new();
    for i in 0..count {
        let at = descriptors.checked_add(i.checked_mul(16 + name_size)?)?;
        let kind = word(bytes, at)? as u32 & KVM_STATS_TYPE_MASK;
        let values = word(bytes, at + 4)? >> 16;
        // Histograms and peaks say nothing in one number.
        if !matches!(kind, KVM_STATS_TYPE_CUMULATIVE | KVM_STATS_TYPE_INSTANT) || values != 1 {
            continue;
        }
        let value = data.checked_add(word(bytes, at + 8)?)?;
        let value = bytes.get(value..value.checked_add(8)?)?;
        let name = bytes.get(at + 16..at + 16 + name_size)?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or(name);
        let name = String::from_utf8_lossy(name).into_owned();
        counters.push((name, u64::from_ne_bytes(value.try_into().ok()?)));
    }
    Some(counters)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with counters of the given types, numbers of values, names and (first) values.
    fn file(counters: &[(u32, u16, &str, u64)]) -> Vec<u8> {
        let (id, name_size) = (24, 16);
        let descriptors = id + name_size;
        let data = descriptors + counters.len() * (16 + name_size);
        let header = [0, name_size, counters.len(), id, descriptors, data];
        let mut bytes: Vec<u8> = header.iter().flat_map(|word| (*word as u32).to_ne_bytes()).collect();
        bytes.resize(descriptors, b'x');
        for (i, (kind, values, name, _)) in counters.iter().enumerate() {
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(0i16.to_ne_bytes());
            bytes.extend(values.to_ne_bytes());
            bytes.extend((8 * i as u32).to_ne_bytes());
            bytes.extend(0u32.to_ne_bytes());
            bytes.extend(name.as_bytes());
            bytes.resize(descriptors + (i + 1) * (16 + name_size), 0);
        }
        bytes.extend(counters.iter().flat_map(|(.., value)| value.to_ne_bytes()));
        bytes
    }

    #[test]
    fn plain_counters_are_found_and_others_left_out() {
        let histogram = kvm_bindings::KVM_STATS_TYPE_LOG_HIST;
        let bytes =
            file(&[(0, 1, "exits", 7), (histogram, 1, "halt_wait_hist", 3), (0, 2, "two", 4), (1, 1, "blocking", 1)]);
        assert_eq!(parse(&bytes), Some(vec![("exits".into(), 7), ("blocking".into(), 1)]));
    }

    #[test]
    fn files_that_end_early_are_none() {
        let bytes = file(&[(0, 1, "exits", 7)]);
        for size in 0..bytes.len() {
            assert_eq!(parse(&bytes[..size]), None, "{size} bytes");
        }
        let mut huge = bytes;
        huge[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(parse(&huge), None);
    }
}
