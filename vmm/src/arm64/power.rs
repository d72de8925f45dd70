// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which vCPUs are on, for hypervisors that leave CPU_ON, CPU_OFF and AFFINITY_INFO of PSCI (Arm DEN 0022, section 5) to
//! us. A vCPU that is off waits here, on its own thread.
//!
//! One lock, under which nothing else is locked.

use std::sync::{Arc, Condvar, Mutex};

use axvcpu_uapi::addr::GuestPhysAddr;

use crate::arm64::layout::affinity;
use crate::device::lock;
use crate::hypervisor::Kick;

/// PSCI's return values.
pub mod answer {
    /// Done.
    pub const SUCCESS: i64 = 0;
    /// There is no such function.
    pub const NOT_SUPPORTED: i64 = -1;
    /// There is no such CPU, or no such level.
    pub const INVALID_PARAMETERS: i64 = -2;
    /// The CPU is on.
    pub const ALREADY_ON: i64 = -4;
    /// The CPU is about to start.
    pub const ON_PENDING: i64 = -5;
    /// A CPU cannot start there.
    pub const INVALID_ADDRESS: i64 = -9;
}

/// Functions that come to us as hypercalls: AFFINITY_INFO, 32 and 64 bits wide.
pub const AFFINITY_INFO: [u64; 2] = [0x8400_0004, 0xc400_0004];

/// Bits of a target that name a CPU: Aff3 and Aff2 to Aff0 of MPIDR_EL1.
const AFFINITY_BITS: u64 = 0xff_00ff_ffff;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Off,
    /// Was started, and does not run yet.
    Pending {
        entry: GuestPhysAddr,
        arg: u64,
    },
    On,
}

/// What became of waiting to be on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It is on, as it was.
    GoesOn,
    /// It has been started: with the argument in X0 at the entry point.
    Starts {
        /// First instruction.
        entry: GuestPhysAddr,
        /// X0.
        arg: u64,
    },
    /// The VM stops.
    Stops,
}

/// The power states of all vCPUs.
#[derive(Debug)]
pub struct Power {
    states: Mutex<Vec<State>>,
    changed: Condvar,
}

impl Power {
    /// For `count` vCPUs, of which the first is on.
    #[must_use]
    pub fn new(count: usize) -> Arc<Self> {
        let mut states = vec![State::Off; count];
        states.iter_mut().take(1).for_each(|state| *state = State::On);
        Arc::new(Self { states: Mutex::new(states), changed: Condvar::new() })
    }

    /// Waits until vCPU `id` is on, or until `stopping`, which is asked again after every kick.
    #[must_use]
    pub fn wait(&self, id: usize, stopping: impl Fn() -> bool) -> Turn {
        let mut states = lock(&self.states);
        loop {
            if stopping() {
                return Turn::Stops;
            }
            let Some(state) = states.get_mut(id) else { return Turn::Stops };
            match *state {
                State::On => return Turn::GoesOn,
                State::Pending { entry, arg } => {
                    *state = State::On;
                    return Turn::Starts { entry, arg };
                }
                State::Off => {
                    states = self.changed.wait(states).unwrap_or_else(std::sync::PoisonError::into_inner);
                }
            }
        }
    }

    /// CPU_ON: starts the vCPU with the affinity `target`, if it is off. `possible` says whether a CPU can start at the
    /// entry point. The answer to the guest.
    #[must_use]
    pub fn on(&self, target: u64, entry: GuestPhysAddr, arg: u64, possible: bool) -> i64 {
        let mut states = lock(&self.states);
        let id = (0..states.len()).find(|id| affinity(*id as u32) == target);
        match id.and_then(|id| states.get_mut(id)) {
            None => answer::INVALID_PARAMETERS,
            Some(_) if !possible => answer::INVALID_ADDRESS,
            Some(State::On) => answer::ALREADY_ON,
            Some(State::Pending { .. }) => answer::ON_PENDING,
            Some(state) => {
                *state = State::Pending { entry, arg };
                self.changed.notify_all();
                answer::SUCCESS
            }
        }
    }

    /// CPU_OFF of vCPU `id`. Says whether none is on any more.
    #[must_use]
    pub fn off(&self, id: usize) -> bool {
        let mut states = lock(&self.states);
        if let Some(state) = states.get_mut(id) {
            *state = State::Off;
        }
        states.iter().all(|state| *state == State::Off)
    }

    /// AFFINITY_INFO of all CPUs that have the fields of `target` from `level` on: 0 one of them is on, 1 all are off, 2
    /// one is about to start. The answer to the guest.
    #[must_use]
    pub fn info(&self, target: u64, level: u64) -> i64 {
        let ignored = match level {
            0 => 0,
            1 => 0xff,
            2 => 0xffff,
            3 => 0xff_ffff,
            _ => return answer::INVALID_PARAMETERS,
        };
        if target & !AFFINITY_BITS != 0 {
            return answer::INVALID_PARAMETERS;
        }
        let states = lock(&self.states);
        let matches = |id: u32| (affinity(id) ^ target) & !ignored == 0;
        let matching: Vec<State> =
            (0..).zip(&*states).filter(|(id, _)| matches(*id)).map(|(_, state)| *state).collect();
        if matching.is_empty() {
            answer::INVALID_PARAMETERS
        } else if matching.contains(&State::On) {
            0
        } else if matching.iter().all(|state| *state == State::Off) {
            1
        } else {
            2
        }
    }
}

/// Kicks a vCPU that may wait here.
pub struct Kicker {
    /// What kicks it while it runs.
    pub vcpu: Box<dyn Kick>,
    /// Where it may wait.
    pub power: Arc<Power>,
}

impl Kick for Kicker {
    fn kick(&self) {
        self.vcpu.kick();
        // With the lock, so that whoever is about to wait has seen what the kick is for, or gets the notice.
        let _states = lock(&self.power.states);
        self.power.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    const ENTRY: GuestPhysAddr = GuestPhysAddr::new(0x4000_0000);

    #[test]
    fn a_cpu_is_started_once() {
        let power = Power::new(18);
        assert_eq!(power.on(0, ENTRY, 0, true), answer::ALREADY_ON);
        assert_eq!(power.on(0x10, ENTRY, 0, true), answer::INVALID_PARAMETERS, "16 is 1.0");
        assert_eq!(power.on(0x102, ENTRY, 0, true), answer::INVALID_PARAMETERS);
        assert_eq!(power.on(0x101, ENTRY, 0, false), answer::INVALID_ADDRESS);
        assert_eq!(power.info(0x101, 0), 1);
        assert_eq!(power.on(0x101, ENTRY, 77, true), answer::SUCCESS);
        assert_eq!((power.on(0x101, ENTRY, 0, true), power.info(0x101, 0)), (answer::ON_PENDING, 2));
        assert_eq!(power.wait(17, || false), Turn::Starts { entry: ENTRY, arg: 77 });
        assert_eq!(power.wait(17, || false), Turn::GoesOn);
        assert_eq!((power.on(0x101, ENTRY, 0, true), power.info(0x101, 0)), (answer::ALREADY_ON, 0));
        assert!(!power.off(17));
        assert_eq!(power.info(0x101, 0), 1);
        assert!(power.off(0), "nobody is left");
    }

    #[test]
    fn a_group_is_off_when_all_of_it_are() {
        let power = Power::new(18);
        assert_eq!((power.info(0, 1), power.info(0x100, 1), power.info(0, 3)), (0, 1, 0));
        assert_eq!(power.on(0x100, ENTRY, 0, true), answer::SUCCESS);
        assert_eq!(power.info(0x1ff, 1), 2);
        for (target, level) in [(0x200, 1), (0, 4), (1 << 31, 0), (1 << 24, 3), (0x1_0000, 2)] {
            assert_eq!(power.info(target, level), answer::INVALID_PARAMETERS, "{target:#x} {level}");
        }
    }

    struct Nothing;
    impl Kick for Nothing {
        fn kick(&self) {}
    }

    #[test]
    fn one_that_waits_hears_of_its_start_and_of_the_end() {
        let power = Power::new(2);
        let stopping = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waits = || scope.spawn(|| power.wait(1, || stopping.load(Ordering::Acquire)));
            let waiter = waits();
            assert_eq!(power.on(1, ENTRY, 3, true), answer::SUCCESS);
            assert_eq!(waiter.join().unwrap(), Turn::Starts { entry: ENTRY, arg: 3 });
            assert!(!power.off(1));
            let waiter = waits();
            stopping.store(true, Ordering::Release);
            Kicker { vcpu: Box::new(Nothing), power: Arc::clone(&power) }.kick();
            assert_eq!(waiter.join().unwrap(), Turn::Stops);
        });
    }
}
