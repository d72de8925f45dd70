// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The mailbox of a vCPU: what anybody may post to it from any context, hard interrupts included, and the identity that the
//! vCPU publishes for routing. Atomics only, so there is no lock to order and nothing to wait for.
//!
//! # Memory ordering
//!
//! *Posting.* An interrupt is three steps: its trigger mode in `levels`, its bit in `irr`, then [`INTERRUPTS`] in `state`.
//! Each later step is a release operation, so whoever sees it by an acquire operation sees the earlier ones.
//!
//! *Collecting.* The vCPU's thread swaps `state` for 0 first and the words of `irr` after that. An interrupt posted meanwhile
//! is either in the words swapped, and its `INTERRUPTS` then makes the next collection find nothing, which is harmless; or it
//! is not, and then its `INTERRUPTS`, set after its bit, was not in the state swapped and stays for the next collection.
//! Nothing is lost, nothing is delivered twice.
//!
//! *Posting to the hardware.* On a CPU that can, edge-triggered interrupts go to a [`Descriptor`] instead, from which the CPU
//! takes them without leaving the guest. The trigger mode must be in the registers before the interrupt, so whatever is or
//! was level-triggered goes the other way.
//!
//! *Sleeping.* A thread about to sleep marks itself so and then asks [`Mailbox::pending`]; a poster posts and then looks
//! whether the thread sleeps or runs the guest and must be kicked. Each side writes before it reads what the other writes, so
//! each needs its write ordered before its read: the last step of posting is a sequentially consistent read-modify-write
//! (a full barrier on x86), `pending` a sequentially consistent load, and the kernel's wait queues and run-state changes
//! bring the barrier on the other side.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use vcpu_core::{AxResult, AxVCpuHal, HostPhysAddr};

use super::posted::Descriptor;
use super::{Mode, FIRST_VECTOR};
use crate::frame::Framed;

/// [`Mailbox::state`]: number of NMIs, 0 to 2. One can be in service and one latched behind it; hardware collapses more.
const NMI_MASK: u32 = 0x3;
/// [`Mailbox::state`]: INIT.
const INIT: u32 = 1 << 2;
/// [`Mailbox::state`]: start-up IPI, with its vector in [`SIPI_VECTOR`].
const SIPI: u32 = 1 << 3;
/// [`Mailbox::state`]: the timer expired.
const TIMER: u32 = 1 << 4;
/// [`Mailbox::state`]: there are bits in [`Mailbox::irr`].
const INTERRUPTS: u32 = 1 << 5;
/// [`Mailbox::state`]: vector of the start-up IPI.
const SIPI_VECTOR: u32 = 0xff << SIPI_SHIFT;
const SIPI_SHIFT: u32 = 8;

/// Who a vCPU's local APIC is to the interrupt network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// APIC id. In xAPIC mode only the low 8 bits take part in routing.
    pub id: u32,
    /// The logical id of xAPIC mode: bits 31:24 of LDR. In x2APIC mode the logical id follows from `id`.
    pub logical: u8,
    /// xAPIC mode's destination format: cluster rather than flat.
    pub cluster: bool,
    /// Mode.
    pub mode: Mode,
    /// Enabled by software (SVR bit 8): accepts fixed and lowest-priority interrupts.
    pub enabled: bool,
    /// Processor priority (PPR), for lowest-priority arbitration.
    pub priority: u8,
}

impl Identity {
    #[inline]
    const fn encode(self) -> u64 {
        self.id as u64
            | ((self.logical as u64) << 32)
            | ((self.priority as u64) << 40)
            | ((self.mode as u64) << 48)
            | ((self.enabled as u64) << 50)
            | ((self.cluster as u64) << 51)
    }

    const fn decode(bits: u64) -> Self {
        Self {
            id: bits as u32,
            logical: (bits >> 32) as u8,
            priority: (bits >> 40) as u8,
            mode: match (bits >> 48) & 3 {
                1 => Mode::XApic,
                2 => Mode::X2Apic,
                _ => Mode::Disabled,
            },
            enabled: (bits >> 50) & 1 != 0,
            cluster: (bits >> 51) & 1 != 0,
        }
    }
}

/// What [`Mailbox::take`] found, apart from the interrupts. INIT comes before the start-up IPI: a start-up IPI posted before
/// an INIT is void.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Posted {
    /// NMIs: 0, 1 or 2.
    pub nmis: u8,
    /// Reset the vCPU as INIT does.
    pub init: bool,
    /// Start at physical address `vector << 12`, if the vCPU waits for that (after `init`).
    pub sipi: Option<u8>,
    /// The host's timer fired.
    pub timer: bool,
}

/// What a poster owes the vCPU, in any context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Make it look: out of the guest, or out of its sleep.
    Look,
    /// Send the notification vector to its CPU if it is in the guest, which it does not leave then; or wake it.
    Posted,
    /// Nothing: another poster is about to.
    Nothing,
}

/// The mailbox of one vCPU.
pub struct Mailbox<H: AxVCpuHal> {
    /// Posted events: the flags above.
    state: AtomicU32,
    /// Posted vectors: vector `64 * i + b` is bit `b` of word `i`.
    irr: [AtomicU64; 4],
    /// Trigger mode of each vector's latest posting: set for level.
    levels: [AtomicU64; 4],
    /// [`Identity`], in one word so that routing never sees half of a change.
    identity: AtomicU64,
    /// What goes to the hardware, if [`posting`](Self::posting). In a frame of its own, whose physical address
    /// the hardware is given.
    descriptor: Option<Framed<Descriptor, H>>,
    posting: AtomicBool,
}

impl<H: AxVCpuHal> Default for Mailbox<H> {
    fn default() -> Self {
        Self::new()
    }
}

impl<H: AxVCpuHal> Mailbox<H> {
    /// An empty mailbox of a vCPU that receives nothing yet: its APIC counts as disabled until it [publishes](Self::publish).
    pub const fn new() -> Self {
        Self {
            state: AtomicU32::new(0),
            irr: [const { AtomicU64::new(0) }; 4],
            levels: [const { AtomicU64::new(0) }; 4],
            identity: AtomicU64::new(0),
            descriptor: None,
            posting: AtomicBool::new(false),
        }
    }

    /// The same, of a vCPU whose hardware may take interrupts by itself. May sleep.
    ///
    /// # Errors
    /// [`AxError::NoMemory`](vcpu_core::AxError::NoMemory).
    pub fn with_descriptor() -> AxResult<Self> {
        Ok(Self { descriptor: Some(Framed::zeroed()?), ..Self::new() })
    }

    /// Address of the posted-interrupt descriptor, if there is one. It stays the same.
    pub fn descriptor(&self) -> Option<HostPhysAddr> {
        self.descriptor.as_ref().map(Framed::phys)
    }

    /// Edge-triggered interrupts go to the descriptor from now on, if there is one.
    pub fn post_to_hardware(&self) {
        self.posting.store(true, Ordering::Relaxed);
    }

    /// The descriptor, if interrupts go there.
    fn hardware(&self) -> Option<&Descriptor> {
        self.descriptor.as_deref().filter(|_| self.posting.load(Ordering::Relaxed))
    }

    /// Posts a fixed interrupt; `level` for level-triggered, whose end the guest's EOI reports.
    pub fn post_interrupt(&self, vector: u8, level: bool) -> Notice {
        let (word, bit) = ((vector >> 6) as usize, 1u64 << (vector & 63));
        let (Some(irr), Some(levels)) = (self.irr.get(word), self.levels.get(word)) else {
            return Notice::Nothing; // Not reached: a u8 has four words of vectors.
        };
        if level {
            levels.fetch_or(bit, Ordering::Relaxed);
        } else if levels.load(Ordering::Relaxed) & bit != 0 {
            levels.fetch_and(!bit, Ordering::Relaxed);
        } else if let Some(descriptor) = self.hardware().filter(|_| vector >= FIRST_VECTOR) {
            return if descriptor.post(vector) { Notice::Posted } else { Notice::Nothing };
        }
        irr.fetch_or(bit, Ordering::Release);
        self.state.fetch_or(INTERRUPTS, Ordering::SeqCst);
        Notice::Look
    }

    /// Posts a non-maskable interrupt.
    pub fn post_nmi(&self) {
        self.update(|state| if state & NMI_MASK < 2 { state + 1 } else { state });
    }

    /// Posts INIT. A start-up IPI that still waits is void: it came before.
    pub fn post_init(&self) {
        self.update(|state| state & !(SIPI | SIPI_VECTOR) | INIT);
    }

    /// Posts a start-up IPI. The first one counts: a CPU that has started ignores the second.
    pub fn post_sipi(&self, vector: u8) {
        self.update(|state| if state & SIPI != 0 { state } else { state | SIPI | (u32::from(vector) << SIPI_SHIFT) });
    }

    /// Posts the expiry of the host's timer.
    pub fn post_timer(&self) {
        self.state.fetch_or(TIMER, Ordering::SeqCst);
    }

    /// Changes `state` by a compare-and-exchange loop. Each failed round means that another poster or the collector made
    /// progress, and every change leads towards a state in which nothing more can be added: the loop is short.
    fn update(&self, change: impl Fn(u32) -> u32) {
        // The closure always returns Some, so the update cannot fail. It is a read-modify-write even when nothing changes, for
        // the barrier described above.
        let _ = self.state.fetch_update(Ordering::SeqCst, Ordering::Relaxed, |state| Some(change(state)));
    }

    /// Whether anything waits to be collected.
    #[inline]
    pub fn pending(&self) -> bool {
        self.state.load(Ordering::SeqCst) != 0 || self.hardware().is_some_and(Descriptor::pending)
    }

    /// Takes everything out: vectors go to `accept` as (word index, vectors, those of them that are level-triggered), where
    /// vector `64 * i + b` is bit `b` of word `i`; the rest is returned. For the vCPU's thread only.
    pub fn take(&self, mut accept: impl FnMut(usize, u64, u64)) -> Posted {
        // A plain load first: the common case is an empty mailbox, and a load leaves the line shared.
        let state = match self.state.load(Ordering::Relaxed) {
            0 => 0,
            // Acquire pairs with the last step of posting; SeqCst because the next thing may be a decision to sleep.
            _ => self.state.swap(0, Ordering::SeqCst),
        };
        // After the state, so that what was posted before an INIT is taken no later than that.
        if let Some(descriptor) = self.hardware() {
            descriptor.take(|index, vectors| accept(index, vectors, 0));
        }
        if state & INTERRUPTS != 0 {
            for (index, (irr, levels)) in (0..self.irr.len()).zip(self.irr.iter().zip(&self.levels)) {
                if irr.load(Ordering::Relaxed) != 0 {
                    // Acquire pairs with the release of the vector's bit, so its trigger mode is visible.
                    let vectors = irr.swap(0, Ordering::Acquire);
                    accept(index, vectors, vectors & levels.load(Ordering::Relaxed));
                }
            }
        }
        Posted {
            nmis: (state & NMI_MASK) as u8,
            init: state & INIT != 0,
            sipi: (state & SIPI != 0).then_some((state >> SIPI_SHIFT) as u8),
            timer: state & TIMER != 0,
        }
    }

    /// Publishes who the vCPU is. For the vCPU's thread only.
    #[inline]
    pub fn publish(&self, identity: Identity) {
        let bits = identity.encode();
        // Only this thread writes it, so a relaxed load sees its own last store; the usual case is no change.
        if self.identity.load(Ordering::Relaxed) != bits {
            self.identity.store(bits, Ordering::Release);
        }
    }

    /// Who the vCPU was when it published last. As on hardware, a message sent while the receiver changes its registers may be
    /// routed by the old or by the new ones.
    pub fn identity(&self) -> Identity {
        Identity::decode(self.identity.load(Ordering::Acquire))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHal;
    use std::{collections::BTreeMap, sync::atomic::AtomicBool, thread, vec::Vec};

    type Mailbox = super::Mailbox<TestHal>;

    fn drain(mailbox: &Mailbox) -> (Posted, BTreeMap<u8, bool>) {
        let mut vectors = BTreeMap::new();
        let posted = mailbox.take(|index, added, levels| {
            for bit in (0..64).filter(|bit| (added >> bit) & 1 != 0) {
                vectors.insert((index * 64 + bit) as u8, (levels >> bit) & 1 != 0);
            }
        });
        (posted, vectors)
    }

    #[test]
    fn everything_posted_comes_out_once() {
        let mailbox = Mailbox::new();
        assert!(!mailbox.pending());
        for (vector, level) in [(0, false), (63, true), (64, false), (255, true), (128, true)] {
            mailbox.post_interrupt(vector, level);
        }
        mailbox.post_timer();
        assert!(mailbox.pending());
        let (posted, vectors) = drain(&mailbox);
        assert_eq!(posted, Posted { timer: true, ..Posted::default() });
        assert_eq!(vectors, BTreeMap::from([(0, false), (63, true), (64, false), (255, true), (128, true)]));
        assert!(!mailbox.pending());
        assert_eq!(drain(&mailbox), (Posted::default(), BTreeMap::new()));
    }

    #[test]
    fn the_latest_trigger_mode_counts() {
        let mailbox = Mailbox::new();
        mailbox.post_interrupt(77, true);
        mailbox.post_interrupt(77, false);
        mailbox.post_interrupt(78, false);
        mailbox.post_interrupt(78, true);
        assert_eq!(drain(&mailbox).1, BTreeMap::from([(77, false), (78, true)]));
        mailbox.post_interrupt(78, false);
        assert_eq!(drain(&mailbox).1, BTreeMap::from([(78, false)]), "an old level mark does not stick");
    }

    #[test]
    fn edges_go_to_the_hardware_but_what_is_or_was_level_does_not() {
        let mailbox = Mailbox::with_descriptor().unwrap();
        assert_eq!(mailbox.post_interrupt(77, false), Notice::Look, "not yet");
        drain(&mailbox);
        mailbox.post_to_hardware();
        assert!(mailbox.descriptor().is_some_and(|at| at.is_aligned(4096)));
        assert_eq!(mailbox.post_interrupt(77, false), Notice::Posted);
        assert_eq!(mailbox.post_interrupt(200, false), Notice::Nothing, "a notification is on its way");
        assert_eq!(mailbox.state.load(Ordering::Relaxed), 0);
        assert!(mailbox.pending());
        assert_eq!(mailbox.post_interrupt(78, true), Notice::Look);
        assert_eq!(drain(&mailbox).1, BTreeMap::from([(77, false), (78, true), (200, false)]));
        assert!(!mailbox.pending());
        assert_eq!(mailbox.post_interrupt(78, false), Notice::Look, "the registers still say level");
        assert_eq!(drain(&mailbox).1, BTreeMap::from([(78, false)]));
        assert_eq!(mailbox.post_interrupt(78, false), Notice::Posted);
        assert_eq!(mailbox.post_interrupt(15, false), Notice::Look, "an error, which the hardware does not see");
    }

    #[test]
    fn nmis_collapse_to_two() {
        let mailbox = Mailbox::new();
        for count in [1, 2, 2, 2] {
            (0..count).for_each(|_| mailbox.post_nmi());
            assert_eq!(drain(&mailbox).0.nmis, count);
        }
        (0..5).for_each(|_| mailbox.post_nmi());
        mailbox.post_timer();
        assert_eq!(
            drain(&mailbox).0,
            Posted { nmis: 2, timer: true, ..Posted::default() },
            "no carry into other flags"
        );
    }

    #[test]
    fn init_voids_an_earlier_sipi_and_precedes_a_later_one() {
        let mailbox = Mailbox::new();
        mailbox.post_sipi(0x9a);
        mailbox.post_init();
        assert_eq!(drain(&mailbox).0, Posted { init: true, ..Posted::default() });
        mailbox.post_init();
        mailbox.post_sipi(0x12);
        mailbox.post_sipi(0x34);
        assert_eq!(drain(&mailbox).0, Posted { init: true, sipi: Some(0x12), ..Posted::default() });
        mailbox.post_sipi(0);
        assert_eq!(drain(&mailbox).0.sipi, Some(0));
    }

    #[test]
    fn identity_round_trips() {
        let mailbox = Mailbox::new();
        assert_eq!(mailbox.identity().mode, Mode::Disabled);
        for mode in [Mode::XApic, Mode::X2Apic, Mode::Disabled] {
            for (id, logical, priority) in [(0, 0, 0), (u32::MAX, 0xff, 0xff), (0x1234_5678, 0x81, 0x7e)] {
                for (cluster, enabled) in [(false, true), (true, false)] {
                    let identity = Identity { id, logical, cluster, mode, enabled, priority };
                    mailbox.publish(identity);
                    assert_eq!(mailbox.identity(), identity);
                }
            }
        }
    }

    /// Three threads post distinct vectors while one collects: each posting is seen, with its own trigger mode.
    #[test]
    fn concurrent_posts_are_not_lost() {
        const PER_THREAD: u8 = if cfg!(miri) { 8 } else { 64 };
        let (mailbox, done) = (Mailbox::new(), AtomicBool::new(false));
        let rounds = if cfg!(miri) { 2 } else { 200 };
        thread::scope(|scope| {
            let posters: Vec<_> = (0..3u8)
                .map(|thread| {
                    let mailbox = &mailbox;
                    scope.spawn(move || {
                        for round in 0..rounds {
                            for vector in 0..PER_THREAD {
                                // Wait until the previous round's posting of the vector was collected.
                                let vector = 64 * thread + vector;
                                while round > 0
                                    && (mailbox.irr[usize::from(vector / 64)].load(Ordering::Relaxed) >> (vector % 64))
                                        & 1
                                        != 0
                                {
                                    thread::yield_now();
                                }
                                mailbox.post_interrupt(vector, vector % 2 == 0);
                            }
                        }
                    })
                })
                .collect();
            let collector = scope.spawn(|| {
                let mut seen = BTreeMap::<u8, usize>::new();
                loop {
                    let last = done.load(Ordering::Acquire);
                    let (_, vectors) = drain(&mailbox);
                    for (vector, level) in vectors {
                        assert_eq!(level, vector % 2 == 0, "trigger mode of {vector}");
                        *seen.entry(vector).or_default() += 1;
                    }
                    if last {
                        return seen;
                    }
                    thread::yield_now();
                }
            });
            posters.into_iter().for_each(|poster| poster.join().unwrap());
            done.store(true, Ordering::Release);
            let seen = collector.join().unwrap();
            assert_eq!(seen.len(), 3 * usize::from(PER_THREAD));
            assert!(seen.values().all(|count| *count == rounds), "{seen:?}");
            assert!(!mailbox.pending());
        });
    }
}
