// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest memory that is a file's: shared, private, and cut off.

use super::mapping::{map, Mapping, PAGE};
use crate::ensure_eq;
use crate::guests::programs;
use crate::harness::{CaseResult, Stop};
use nix::sys::mman::MapFlags;
use std::fs;
use std::os::unix::fs::FileExt;

fn temporary_file(size: usize) -> Result<fs::File, Stop> {
    let path = format!("/tmp/axvcpu-test-{}", std::process::id());
    let file = fs::File::options().read(true).write(true).create_new(true).open(&path)?;
    fs::remove_file(&path)?;
    file.set_len(size as u64)?;
    Ok(file)
}

fn file_word(file: &fs::File) -> Result<u64, Stop> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(u64::from_le_bytes(bytes))
}

pub(super) fn shared_file() -> CaseResult {
    let file = temporary_file(PAGE)?;
    file.write_all_at(&7u64.to_le_bytes(), 0)?;
    let mut m = programs::machine(programs::writer())?;
    let (_memory, slot) = map(&m, Mapping::file(&file, PAGE, MapFlags::MAP_SHARED)?)?;
    programs::marked(&mut m)?;
    ensure_eq!(programs::value(&m.vcpu), 7, "what the guest reads of the file");
    programs::marked(&mut m)?;
    ensure_eq!(file_word(&file)?, 0x11, "the file after the guest has written");
    file.write_all_at(&8u64.to_le_bytes(), 0)?;
    programs::marked(&mut m)?;
    ensure_eq!(programs::value(&m.vcpu), 8, "what the guest reads after the file has changed");
    drop(slot);
    Ok(())
}

/// The guest's writes stay out of a file that is mapped privately.
pub(super) fn private_file() -> CaseResult {
    let file = temporary_file(PAGE)?;
    file.write_all_at(&7u64.to_le_bytes(), 0)?;
    let mut m = programs::machine(programs::writer())?;
    let (memory, slot) = map(&m, Mapping::file(&file, PAGE, MapFlags::MAP_PRIVATE)?)?;
    programs::marked(&mut m)?;
    ensure_eq!(programs::value(&m.vcpu), 7, "what the guest reads of the file");
    programs::marked(&mut m)?;
    ensure_eq!([file_word(&file)?, memory.get(0)], [7, 0x11], "file and memory after the guest has written");
    programs::marked(&mut m)?;
    ensure_eq!(programs::value(&m.vcpu), 0x11, "what the guest reads of its own copy");
    drop(slot);
    Ok(())
}

/// Beyond the end of a file there is no memory, for the guest as for the program.
pub(super) fn truncated() -> CaseResult {
    let file = temporary_file(PAGE)?;
    file.write_all_at(&7u64.to_le_bytes(), 0)?;
    let mut m = programs::machine(programs::writer())?;
    let (_memory, slot) = map(&m, Mapping::file(&file, PAGE, MapFlags::MAP_SHARED)?)?;
    programs::marked(&mut m)?;
    file.set_len(0)?;
    match m.run() {
        Err(Stop::Fail(why)) if why.contains("EFAULT") => {}
        other => return Err(Stop::Fail(format!("a write beyond the end of a file gave {other:x?}"))),
    }
    file.set_len(PAGE as u64)?;
    programs::marked(&mut m)?;
    ensure_eq!(file_word(&file)?, 0x11, "the file after the guest has written");
    drop(slot);
    Ok(())
}
