// SPDX-License-Identifier: MIT OR Apache-2.0
//! Finding out that a guest is over: every vCPU is halted with interrupts off, or was never started.
//!
//! Only NMI, INIT and start-up messages end such a state, and only another vCPU sends those, so when none can run nothing
//! happens any more. A vCPU's thread says when it halts so, but not when it wakes: that is done in the kernel. Therefore,
//! when all seem to be halted, there is a roll call: the one that noticed kicks the others, and each looks whether it still
//! is. A kick is handled after what was posted before it, and the last to halt has posted all it ever will, so that a vCPU
//! which answers cannot have been sent anything that it does not know of.
//!
//! One lock, under which vCPUs are kicked and nothing is locked.

use std::sync::{Arc, Mutex};

use crate::device::lock;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Runs, or sleeps until an interrupt.
    Awake,
    /// Was halted for good when it was last seen.
    Halted,
    /// Was halted for good in the roll call under way.
    Confirmed,
}

/// Which vCPUs are halted for good.
#[derive(Debug)]
pub(super) struct Halted(Mutex<Vec<State>>);

impl Halted {
    /// For `vcpus` vCPUs, of which the first is about to run and the others wait to be started.
    #[must_use]
    pub(super) fn new(vcpus: usize) -> Arc<Self> {
        let mut states = vec![State::Halted; vcpus];
        states.iter_mut().take(1).for_each(|state| *state = State::Awake);
        Arc::new(Self(Mutex::new(states)))
    }

    /// Whether vCPU `id` starts out halted.
    #[must_use]
    pub(super) fn at_start(&self, id: usize) -> bool {
        lock(&self.0).get(id) == Some(&State::Halted)
    }

    /// vCPU `id` has just halted for good. Says whether the guest is over; if that is yet to be found out, the other vCPUs are
    /// kicked.
    #[must_use]
    pub(super) fn halts(&self, id: usize, kick: impl Fn(usize)) -> bool {
        let mut states = lock(&self.0);
        // Others may owe their being awake to this one, so what they have said before counts no more.
        for state in states.iter_mut().filter(|state| **state == State::Confirmed) {
            *state = State::Halted;
        }
        Self::set(&mut states, id, State::Confirmed);
        if !states.contains(&State::Awake) {
            (0..states.len()).filter(|other| *other != id).for_each(kick);
        }
        Self::over(&states)
    }

    /// vCPU `id` was kicked and is still halted. Says whether the guest is over.
    #[must_use]
    pub(super) fn stays(&self, id: usize) -> bool {
        let mut states = lock(&self.0);
        Self::set(&mut states, id, State::Confirmed);
        Self::over(&states)
    }

    /// vCPU `id` is not halted any more.
    pub(super) fn wakes(&self, id: usize) {
        Self::set(&mut lock(&self.0), id, State::Awake);
    }

    fn set(states: &mut [State], id: usize, to: State) {
        if let Some(state) = states.get_mut(id) {
            *state = to;
        }
    }

    fn over(states: &[State]) -> bool {
        states.iter().all(|state| *state == State::Confirmed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// The vCPUs that are kicked when `id` halts, and whether the guest is over.
    fn halts(halted: &Halted, id: usize) -> (Vec<usize>, bool) {
        let kicked = RefCell::new(vec![]);
        let over = halted.halts(id, |other| kicked.borrow_mut().push(other));
        (kicked.into_inner(), over)
    }

    #[test]
    fn one_vcpu_needs_no_roll_call() {
        assert_eq!(halts(&Halted::new(1), 0), (vec![], true));
    }

    #[test]
    fn vcpus_that_were_never_started_count() {
        let halted = Halted::new(3);
        assert!(!halted.at_start(0) && halted.at_start(2));
        assert_eq!(halts(&halted, 0), (vec![1, 2], false));
        assert!(!halted.stays(2));
        assert!(halted.stays(1));
    }

    #[test]
    fn one_that_was_started_unnoticed_keeps_the_guest_going() {
        let halted = Halted::new(2);
        assert_eq!(halts(&halted, 0), (vec![1], false));
        halted.wakes(1);
        assert_eq!(halts(&halted, 0), (vec![], false), "an NMI and back");
        assert_eq!(halts(&halted, 1), (vec![0], false));
        assert!(halted.stays(0));
    }

    #[test]
    fn an_answer_is_void_when_another_halts_later() {
        let halted = Halted::new(3);
        halted.wakes(1);
        halted.wakes(2);
        assert_eq!(halts(&halted, 1), (vec![], false));
        assert_eq!(halts(&halted, 2), (vec![], false));
        assert_eq!(halts(&halted, 0), (vec![1, 2], false));
        assert!(!halted.stays(1));
        // Meanwhile 2 ran, woke 1, and halted again.
        assert_eq!(halts(&halted, 2), (vec![0, 1], false));
        assert!(!halted.stays(0));
        halted.wakes(1);
        assert!(!halted.stays(2));
    }
}
