// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The interface with a model of the CPU's side, which takes interrupts out of list registers and ends them as IHI 0069
//! says.

use super::super::bank::assign;
use super::super::distributor::tests::new;
use super::super::distributor::CONTROL_GROUPS;
use super::*;
use std::boxed::Box;
use std::vec;
use std::vec::Vec;

mod order;

/// List registers of the model.
const LISTS: usize = 4;
const ALL_BITS: u32 = u32::MAX;

fn interface() -> Interface {
    Interface {
        vmcr: 0xff << 24 | 2,
        active_priorities: [[0; 4]; 2],
        lists: [0; MAX_LISTS],
        control: 0,
        used: 0,
        latched: 0,
        was_active: 0,
        held: [0; SPI_BANKS],
        timer: 0,
        reserved: 0,
        preemption_bits: 5,
    }
}

/// A distributor with everything enabled, in group 1, edges but for the odd SPIs.
fn distributor() -> Box<Distributor> {
    let gic = new();
    gic.control.store(CONTROL_GROUPS, SeqCst);
    for cpu in 0..gic.cpus() {
        let bank = gic.private(cpu).unwrap();
        bank.group.store(ALL_BITS, SeqCst);
        bank.enabled.store(ALL_BITS, SeqCst);
    }
    for bank in &gic.spis {
        bank.group.store(ALL_BITS, SeqCst);
        bank.enabled.store(ALL_BITS, SeqCst);
        bank.edge.store(0x5555_5555, SeqCst);
    }
    gic
}

/// A vCPU and its CPU. The list registers are `interface.lists` while it is in the guest.
struct Cpu {
    number: usize,
    interface: Interface,
    inside: bool,
    /// It waits, and looks at its interrupts only when told to.
    asleep: bool,
    /// Interrupts that the guest has acknowledged and not ended, the last one last.
    taken: Vec<(usize, u8)>,
    notices: Notices,
}

impl Cpu {
    fn new(number: usize) -> Self {
        Self {
            number,
            interface: interface(),
            inside: false,
            asleep: false,
            taken: vec![],
            notices: Notices::default(),
        }
    }

    fn enter(&mut self, gic: &Distributor) {
        assert!(!self.inside);
        self.interface.fill(gic, self.number, LISTS, &mut self.notices);
        assert!(self.interface.used as usize <= LISTS);
        self.inside = true;
    }

    fn leave(&mut self, gic: &Distributor) {
        assert!(self.inside);
        self.interface.fold(gic, self.number, &mut self.notices);
        assert_eq!((self.interface.used, self.interface.lists), (0, [0; MAX_LISTS]));
        self.inside = false;
    }

    /// Tells the ends, by which the lines of [`resampled`] SPIs go down, and returns what has ended.
    fn tell(&mut self, gic: &Distributor) -> Vec<u8> {
        let told = core::mem::take(&mut self.notices);
        let ended: Vec<u8> = told.ended().collect();
        for intid in ended.iter().map(|intid| usize::from(*intid)).filter(|intid| resampled(*intid)) {
            gic.signal(intid, false, |_| unreachable!());
        }
        self.interface.told(gic, self.number, &told, &mut self.notices);
        self.notices.wake |= told.wake;
        ended
    }

    fn refresh(&mut self, gic: &Distributor) {
        self.leave(gic);
        self.enter(gic);
    }

    fn lists(&mut self) -> &mut [u64] {
        &mut self.interface.lists[..LISTS]
    }

    /// Whether the CPU asks for maintenance.
    fn wants_maintenance(&self) -> bool {
        let none_pending = self.interface.lists.iter().all(|value| value & PENDING == 0);
        let control = self.interface.control;
        control & TELL_NONE_PENDING != 0 && none_pending || control & TELL_COUNTED != 0 && control & COUNT != 0
    }

    /// ICC_IAR1_EL1.
    fn acknowledge(&mut self) -> Option<usize> {
        let running = self.taken.last().map_or(0xff, |(_, priority)| *priority);
        let best = self
            .lists()
            .iter_mut()
            .filter(|value| **value & (PENDING | ACTIVE) == PENDING)
            .min_by_key(|value| **value >> 48 & 0xff)?;
        let priority = (*best >> 48 & 0xff) as u8;
        if priority >= running {
            return None;
        }
        *best = *best & !PENDING | ACTIVE;
        let intid = (*best & 0xff) as usize;
        self.interface.active_priorities[1][0] |= 1 << (priority >> 3);
        self.taken.push((intid, priority));
        Some(intid)
    }

    /// ICC_EOIR1_EL1, of the last one.
    fn end(&mut self) -> Option<usize> {
        let (intid, priority) = self.taken.pop()?;
        self.interface.active_priorities[1][0] &= !(1 << (priority >> 3));
        match self.lists().iter_mut().find(|value| **value & ACTIVE != 0 && **value & 0xff == intid as u64) {
            Some(value) => *value &= !ACTIVE,
            None => self.interface.control += 1 << COUNT_SHIFT,
        }
        Some(intid)
    }

    /// ICC_EOIR1_EL1 with EOImode 1: the last one's priority is dropped.
    fn lower(&mut self) -> Option<usize> {
        let (intid, priority) = self.taken.pop()?;
        self.interface.active_priorities[1][0] &= !(1 << (priority >> 3));
        Some(intid)
    }

    /// ICC_DIR_EL1, which is trapped.
    fn deactivate(&mut self, gic: &Distributor, intid: usize) {
        assert_ne!(self.interface.control & TRAP_DEACTIVATION, 0);
        self.leave(gic);
        self.interface.deactivate(gic, self.number, intid as u64, &mut self.notices);
        self.enter(gic);
    }

    /// Takes and ends all there is, and returns it in this order.
    fn drain(&mut self, gic: &Distributor) -> Vec<usize> {
        if !self.inside {
            self.enter(gic);
        }
        self.refresh(gic);
        let mut order = vec![];
        loop {
            while self.end().is_some() {}
            if self.wants_maintenance() {
                self.refresh(gic);
            }
            match self.acknowledge() {
                Some(intid) => order.push(intid),
                None if self.taken.is_empty() => return order,
                None => {}
            }
            assert!(order.len() < 1000, "an interrupt storm: {order:?}");
        }
    }
}

#[test]
fn the_best_priority_comes_first_however_many_there_are() {
    let gic = distributor();
    let mut cpu = Cpu::new(0);
    for bit in 0..32 {
        gic.spis[1].set_priority(bit, 0xf8 - 8 * bit as u8);
    }
    gic.spis[1].edge.store(ALL_BITS, SeqCst);
    gic.spis[1].latch.store(ALL_BITS, SeqCst);
    cpu.enter(&gic);
    assert_eq!(cpu.drain(&gic), (64..96).rev().collect::<Vec<_>>());
}

#[test]
fn more_active_than_list_registers_end_in_their_order() {
    let gic = distributor();
    let mut cpu = Cpu::new(0);
    cpu.enter(&gic);
    for depth in 0..12u8 {
        let intid = 64 + 2 * usize::from(depth);
        gic.spis[1].set_priority(2 * usize::from(depth), 0xf0 - 8 * depth);
        gic.signal(intid, true, |_| ());
        cpu.refresh(&gic);
        assert_eq!(cpu.acknowledge(), Some(intid), "it preempts those before");
    }
    cpu.refresh(&gic);
    assert_ne!(cpu.interface.control & TRAP_DEACTIVATION, 0);
    for _ in 0..12 {
        cpu.end().unwrap();
        if cpu.wants_maintenance() {
            cpu.refresh(&gic);
        }
    }
    cpu.leave(&gic);
    assert_eq!(gic.spis[1].active.load(SeqCst), 0);
    assert_eq!(cpu.interface.held, [0; SPI_BANKS]);
}

#[test]
fn a_level_comes_again_until_it_is_lowered_and_its_end_is_told() {
    let gic = distributor();
    let mut cpu = Cpu::new(0);
    gic.signal(33, true, |_| ());
    for _ in 0..3 {
        cpu.enter(&gic);
        assert_ne!(cpu.interface.lists[0] & TELL_END, 0);
        assert_eq!(cpu.acknowledge(), Some(33));
        cpu.refresh(&gic);
        assert_eq!(cpu.interface.lists[0] & (PENDING | ACTIVE), ACTIVE, "not pending while it is active");
        assert!(cpu.notices.is_empty());
        cpu.end();
        cpu.leave(&gic);
        assert_eq!(core::mem::take(&mut cpu.notices).ended().collect::<Vec<_>>(), [33]);
    }
    gic.signal(33, false, |_| ());
    cpu.enter(&gic);
    assert_eq!(cpu.interface.used, 0);
}

#[test]
fn the_timer_stands_for_its_physical_interrupt() {
    let gic = distributor();
    let mut cpu = Cpu::new(0);
    cpu.interface.timer = 30;
    gic.private(0).unwrap().edge.store(0xffff, SeqCst);
    gic.set_private_line(0, 27, true);
    cpu.enter(&gic);
    assert_eq!(cpu.interface.lists[0] & (0x1fff << 32 | PHYSICAL | 0xff), PHYSICAL | 30 << 32 | 27);
    cpu.acknowledge();
    cpu.end();
    cpu.leave(&gic);
    assert!(cpu.notices.is_empty());
}

#[test]
fn waiting_ends_for_what_would_be_taken() {
    let gic = distributor();
    let mut cpu = Cpu::new(1);
    let wants = |cpu: &Cpu| cpu.interface.wants(&gic, 1);
    assert!(!wants(&cpu));
    gic.spis[0].set_priority(8, 0x80);
    gic.signal(40, true, |_| ());
    assert!(!wants(&cpu), "it is another one's");
    gic.routes[8].store(1, SeqCst);
    assert!(wants(&cpu));
    cpu.interface.vmcr = 0x80 << 24 | 2;
    assert!(!wants(&cpu), "the priority mask");
    cpu.interface.vmcr = 0x88 << 24 | 1;
    assert!(!wants(&cpu), "the other group");
    cpu.interface.vmcr = 0x88 << 24 | 2;
    assert!(wants(&cpu));
    cpu.interface.active_priorities[1][0] = 1 << 16;
    assert!(!wants(&cpu), "one of the same priority runs");
    cpu.interface.active_priorities[0][0] = 1 << 17;
    cpu.interface.active_priorities[1][0] = 0;
    assert!(wants(&cpu), "one that is less urgent runs");
    // With a binary point of 5 for group 1, 0x80 and 0x88 are of one group of priorities.
    cpu.interface.vmcr |= 5 << 18;
    assert!(!wants(&cpu));
    cpu.interface.active_priorities[0][0] = 0;
    gic.control.store(1, SeqCst);
    assert!(!wants(&cpu), "the distributor keeps the group");
    gic.control.store(3, SeqCst);
    gic.spis[0].active.store(1 << 8, SeqCst);
    assert!(!wants(&cpu), "it is active");
}

#[test]
fn with_seven_bits_of_preemption_priorities_are_in_four_words() {
    let mut this = Interface { preemption_bits: 7, ..interface() };
    this.active_priorities[1][2] = 1 << 5;
    assert_eq!(this.running_priority(), Some((2 * 32 + 5) << 1));
    this.active_priorities[0][1] = 1 << 31;
    assert_eq!(this.running_priority(), Some(63 << 1));
}

#[test]
fn deactivation_is_for_mode_1_and_for_what_exists() {
    let gic = distributor();
    let mut cpu = Cpu::new(0);
    gic.signal(40, true, |_| ());
    cpu.enter(&gic);
    cpu.acknowledge();
    cpu.leave(&gic);
    let deactivate = |cpu: &mut Cpu, value| cpu.interface.deactivate(&gic, 0, value, &mut Notices::default());
    deactivate(&mut cpu, 40);
    assert_ne!(gic.spis[0].active.load(SeqCst), 0, "in mode 0 it means nothing");
    cpu.interface.vmcr |= EOI_MODE;
    for nothing in [1023, 256, 0xff_ffff, 41] {
        deactivate(&mut cpu, nothing);
    }
    assert_ne!(gic.spis[0].active.load(SeqCst), 0);
    deactivate(&mut cpu, 40);
    assert_eq!((gic.spis[0].active.load(SeqCst), gic.holder(40)), (0, None));
}

/// vCPUs 0 and 1 with EOImode 1; vCPU 0 has taken SPI `intid` and dropped its priority.
fn one_has_taken(gic: &Distributor, intid: usize) -> (Cpu, Cpu) {
    let mut cpus = (Cpu::new(0), Cpu::new(1));
    cpus.0.interface.vmcr |= EOI_MODE;
    cpus.1.interface.vmcr |= EOI_MODE;
    gic.signal(intid, true, |_| ());
    cpus.0.enter(gic);
    cpus.1.enter(gic);
    assert_eq!((cpus.0.acknowledge(), cpus.0.lower()), (Some(intid), Some(intid)));
    cpus
}

#[test]
fn an_spi_may_be_deactivated_on_another_vcpu() {
    for (intid, ends) in [(40, vec![]), (41, vec![41])] {
        let gic = distributor();
        // Only the list register of vCPU 0, which runs, knows that it is active.
        let (mut one, mut other) = one_has_taken(&gic, intid);
        other.deactivate(&gic, intid);
        assert_eq!(core::mem::take(&mut other.notices).wake, 1);
        one.refresh(&gic);
        assert_eq!((gic.spis[0].active.load(SeqCst), one.acknowledge()), (0, None), "{intid}");
        assert_eq!(one.tell(&gic), ends);
        assert_eq!(gic.holder(intid), None, "{intid}");
        // The next one comes, and is not deactivated by what was asked for.
        gic.signal(intid, true, |_| ());
        one.refresh(&gic);
        assert_eq!((one.acknowledge(), one.lower()), (Some(intid), Some(intid)));
        one.refresh(&gic);
        assert_ne!(gic.spis[0].active.load(SeqCst), 0);
        // Now the distributor knows. It does not come once more, however soon vCPU 0 looks.
        other.deactivate(&gic, intid);
        one.refresh(&gic);
        assert_eq!(one.acknowledge(), None, "{intid}");
        assert_eq!(other.tell(&gic), ends);
        assert_eq!(core::mem::take(&mut other.notices).wake, 1);
        one.refresh(&gic);
        assert_eq!((gic.spis[0].active.load(SeqCst), gic.holder(intid)), (0, None), "{intid}");
    }
}

#[test]
fn a_level_that_has_ended_does_not_come_again_before_its_end_is_told() {
    let gic = distributor();
    let (mut one, mut other) = (Cpu::new(0), Cpu::new(1));
    gic.signal(41, true, |_| ());
    one.enter(&gic);
    assert_eq!((one.acknowledge(), one.end()), (Some(41), Some(41)));
    one.refresh(&gic);
    assert_eq!(one.acknowledge(), None);
    gic.routes[9].store(1, SeqCst);
    other.enter(&gic);
    assert_eq!((other.acknowledge(), gic.holder(41)), (None, Some(0)));
    assert_eq!(one.tell(&gic), [41]);
    assert_eq!(gic.holder(41), None);
    // Its device asks again.
    gic.signal(41, true, |_| ());
    other.refresh(&gic);
    assert_eq!(other.acknowledge(), Some(41));
}

#[test]
fn a_deactivation_is_not_lost_if_the_vcpu_leaves_at_this_moment() {
    for (intid, ends) in [(40, vec![]), (41, vec![41])] {
        let gic = distributor();
        let (mut one, _) = one_has_taken(&gic, intid);
        one.leave(&gic);
        // Found retired when it is active in no list register any more.
        gic.spis[0].retired.fetch_or(1 << (intid - 32), SeqCst);
        one.enter(&gic);
        assert_eq!((gic.spis[0].active.load(SeqCst), one.acknowledge()), (0, None));
        assert_eq!(one.tell(&gic), ends);
    }
}

#[test]
fn what_was_not_active_when_it_was_deactivated_is_taken_later() {
    let gic = distributor();
    let (mut one, mut other) = one_has_taken(&gic, 40);
    other.deactivate(&gic, 40);
    one.refresh(&gic);
    other.deactivate(&gic, 40);
    gic.spis[0].deactivate(1 << 8);
    gic.signal(40, true, |_| ());
    one.refresh(&gic);
    assert_eq!((one.acknowledge(), one.lower()), (Some(40), Some(40)));
    one.leave(&gic);
    assert_ne!(gic.spis[0].active.load(SeqCst), 0);
}

#[test]
fn a_vcpu_that_waits_lets_go_of_what_another_one_has_deactivated() {
    let gic = distributor();
    let (mut one, mut other) = one_has_taken(&gic, 40);
    one.leave(&gic);
    // It would not be interrupted by it.
    one.interface.vmcr &= 0xff_ffff;
    assert!(!one.interface.wants(&gic, 0));
    gic.signal(40, true, |_| ());
    gic.routes[8].store(1, SeqCst);
    other.deactivate(&gic, 40);
    assert_eq!((other.notices.wake, other.acknowledge()), (1, None), "it is held");
    assert!(one.interface.wants(&gic, 0));
    one.enter(&gic);
    assert_eq!(one.notices.wake, 1 << 1);
    other.refresh(&gic);
    assert_eq!(other.acknowledge(), Some(40));
}

/// Whether SPI `intid` is a level that an eventfd raises, and that goes down when its end is told.
fn resampled(intid: usize) -> bool {
    intid % 4 == 1
}
