// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The local APIC against a model of its priorities, and against any access.

use proptest::prelude::*;

use super::*;

/// Priorities as the manual states them, with no thought of speed.
#[derive(Default)]
struct Model {
    tpr: u8,
    requested: BTreeSet<u8>,
    in_service: BTreeSet<u8>,
    level: BTreeSet<u8>,
}

impl Model {
    fn ppr(&self) -> u8 {
        let class = self.in_service.last().map_or(0, |vector| vector / 16);
        if self.tpr / 16 >= class {
            self.tpr
        } else {
            class * 16
        }
    }

    fn pending(&self) -> Option<u8> {
        self.requested.iter().copied().filter(|vector| vector / 16 > self.ppr() / 16).max()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Post(Vec<(u8, bool)>),
    Tpr(u8),
    Cr8(u8),
    SelfIpi(u8),
    Acknowledge,
    Eoi,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        proptest::collection::vec((16u8..=255, any::<bool>()), 1..4).prop_map(Step::Post),
        any::<u8>().prop_map(Step::Tpr),
        (0u8..16).prop_map(Step::Cr8),
        (16u8..=255).prop_map(Step::SelfIpi),
        Just(Step::Acknowledge),
        Just(Step::Acknowledge),
        Just(Step::Eoi),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 1000 }) })]
    #[test]
    fn priorities_are_those_of_the_model(steps in proptest::collection::vec(step(), 1..60)) {
        let (mut lapic, mut model) = (x2apic(0), Model::default());
        for step in steps {
            match step {
                Step::Post(vectors) => {
                    post(&mut lapic, &vectors);
                    for (vector, level) in vectors {
                        model.requested.insert(vector);
                        if level { model.level.insert(vector); } else { model.level.remove(&vector); }
                    }
                }
                Step::Tpr(tpr) => {
                    lapic.write_msr(msr(reg::TPR), tpr.into(), &no_clock).unwrap();
                    model.tpr = tpr;
                }
                Step::Cr8(cr8) => {
                    lapic.set_cr8(cr8);
                    if model.tpr / 16 != cr8 { model.tpr = cr8 * 16; }
                }
                Step::SelfIpi(vector) => {
                    lapic.write_msr(msr(reg::SELF_IPI), vector.into(), &no_clock).unwrap();
                    model.requested.insert(vector);
                    model.level.remove(&vector);
                }
                Step::Acknowledge => {
                    let expected = model.pending();
                    if let Some(vector) = expected {
                        model.requested.remove(&vector);
                        model.in_service.insert(vector);
                    }
                    prop_assert_eq!(take(&mut lapic), expected);
                }
                Step::Eoi => {
                    let ended = model.in_service.pop_last().filter(|vector| model.level.contains(vector));
                    prop_assert_eq!(lapic.write_msr(msr(reg::EOI), 0, &no_clock), Ok(ended.map_or(Effect::None, Effect::InterruptEnd)));
                }
            }
            prop_assert_eq!(lapic.ppr(), model.ppr());
            prop_assert_eq!(lapic.cr8(), model.tpr / 16);
            prop_assert_eq!(lapic.pending_vector(), model.pending());
            prop_assert_eq!(lapic.highest_request(), model.requested.last().copied());
        }
    }

    /// No sequence of guest accesses, in either mode, does anything worse than be refused, and the state can always be saved
    /// and set again.
    #[test]
    fn no_access_breaks_it(
        x2 in any::<bool>(),
        accesses in proptest::collection::vec((0u16..0x41, any::<u64>(), any::<bool>(), 0u64..1 << 40), 1..60),
    ) {
        let mut lapic = if x2 { x2apic(3) } else { xapic(3) };
        for (register, value, write, now) in accesses {
            let clock = at(now);
            match (x2, write) {
                (true, true) => { let _ = lapic.write_msr(0x800 + u32::from(register), value, &clock); }
                (true, false) => { let _ = lapic.read_msr(0x800 + u32::from(register), &clock); }
                (false, true) => { lapic.write_page(register * 16, value as u32, &clock); }
                (false, false) => { lapic.read_page(register * 16, &clock); }
            }
            take(&mut lapic);
            lapic.timer_update(Watch::Nobody, &no_clock);
            let state = lapic.state(&clock);
            let mut copy = if x2 { x2apic(3) } else { xapic(3) };
            prop_assert_eq!(copy.set_state(&state, &clock), Ok(()));
            prop_assert_eq!(copy.state(&clock), state);
        }
    }
}
