// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host CPUs that a vCPU's thread may use: `phys_cpu_sets` of vm.toml(5), bit n for host CPU n.

use std::fs;
use std::thread;

use nix::sched::{sched_getaffinity, sched_setaffinity, CpuSet};
use nix::unistd::Pid;

use crate::error::Error;

/// The list of the host's CPUs in use, such as `0-3,6` (Linux `Documentation/admin-guide/cputopology.rst`).
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// Host CPUs in a set.
fn members(set: u64) -> impl Iterator<Item = usize> {
    (0..64).filter(move |cpu| set >> cpu & 1 != 0)
}

/// Makes sure that every vCPU can have the host CPUs of its set, all of them, and leaves everything as it is. To be called
/// before the first vCPU runs.
///
/// # Errors
/// [`Error::Affinity`] for the first vCPU and host CPU that do not go together.
pub fn check(sets: &[Option<u64>]) -> Result<(), Error> {
    if sets.iter().all(Option::is_none) {
        return Ok(());
    }
    // On a thread of its own, whose affinity ends with it.
    let trial = || (0..).zip(sets).filter_map(|(vcpu, set)| set.map(|set| restrict(vcpu, set))).collect();
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("affinity".into()).spawn_scoped(scope, trial);
        let thread = thread.map_err(|error| Error::host("start a thread", crate::error::describe_io(&error)))?;
        thread.join().unwrap_or_else(|_| Err(Error::host("check phys_cpu_sets", "the thread for it panicked")))
    })
}

/// Restricts the calling thread, that of `vcpu`, to the host CPUs in `set`.
///
/// # Errors
/// [`Error::Affinity`] if it cannot have one of them.
pub fn restrict(vcpu: u32, set: u64) -> Result<(), Error> {
    let here = Pid::from_raw(0);
    let mut wanted = CpuSet::new();
    for cpu in members(set) {
        // A set has room for more CPUs than the 64 there can be here.
        let _ = wanted.set(cpu);
    }
    let result = sched_setaffinity(here, &wanted).and_then(|()| sched_getaffinity(here));
    let got = match result {
        Ok(got) => got,
        // None of them can be had.
        Err(nix::errno::Errno::EINVAL) => CpuSet::new(),
        Err(errno) => return Err(Error::host(format!("choose the host CPUs of vCPU {vcpu}"), errno.desc())),
    };
    match members(set).find(|cpu| got.is_set(*cpu) != Ok(true)) {
        Some(cpu) => {
            Err(Error::Affinity { vcpu, cpu, reason: why_not(cpu, &fs::read_to_string(ONLINE).unwrap_or_default()) })
        }
        None => Ok(()),
    }
}

/// Why a thread cannot have `cpu`, when `online` is what [`ONLINE`] holds.
fn why_not(cpu: usize, online: &str) -> String {
    let online = online.trim();
    let number = |text: &str| text.parse::<usize>().ok();
    let has = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        number(first).zip(number(last)).is_some_and(|(first, last)| (first..=last).contains(&cpu))
    };
    if online.split(',').any(has) {
        "this process may not use it (see cpuset(7))".into()
    } else if online.is_empty() {
        "it is not there, or this process may not use it".into()
    } else {
        format!("the host has the CPUs {online}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::ExitCode;

    #[test]
    fn absent_cpus_are_named_with_their_vcpu() {
        let here = Pid::from_raw(0);
        let before = sched_getaffinity(here).unwrap();
        let first = (0..64).find(|cpu| before.is_set(*cpu) == Ok(true)).unwrap();
        // Nobody tests on a machine whose CPU 63 is the only one missing.
        for absent in [1 << 63, 1 << 63 | 1 << first] {
            let error = check(&[None, Some(1 << first), Some(absent)]).unwrap_err();
            assert!(matches!(error, Error::Affinity { vcpu: 2, cpu: 63, .. }), "{error}");
            assert_eq!(error.exit_code(), ExitCode::ConfigUnsupported);
            assert!(error.to_string().contains("vCPU 2") && error.to_string().contains("CPU 63"), "{error}");
        }
        check(&[Some(1 << first), None]).unwrap();
        assert_eq!(sched_getaffinity(here).unwrap(), before, "the caller's own affinity stays");
    }

    #[test]
    fn a_thread_gets_just_its_set() {
        thread::spawn(|| {
            let here = Pid::from_raw(0);
            let all = sched_getaffinity(here).unwrap();
            let last = (0..64).rev().find(|cpu| all.is_set(*cpu) == Ok(true)).unwrap();
            restrict(0, 1 << last).unwrap();
            let got = sched_getaffinity(here).unwrap();
            assert!((0..CpuSet::count()).all(|cpu| (got.is_set(cpu) == Ok(true)) == (cpu == last)));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn reasons() {
        assert_eq!(why_not(4, "0-3\n"), "the host has the CPUs 0-3");
        for online in ["0-7\n", "0,4", "4\n"] {
            assert!(why_not(4, online).contains("cpuset"), "{online}");
        }
        assert!(why_not(4, "").contains("or"));
    }
}
