// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Interrupt messages: their decoding from an MSI or an interrupt command, and the rules of who receives them
//! (SDM vol. 3 sections 12.6, 12.11, 12.12.9 and 12.12.10; APM vol. 2 sections 16.5, 16.6 and 16.11).

use vcpu_core::{AxError, AxResult, AxVCpuHal};

use super::{Identity, Mailbox, Mode, Notice};

/// What a message does at its receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// An interrupt at every receiver.
    Fixed,
    /// An interrupt at the receiver of lowest priority.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI.
    StartUp,
    /// An interrupt whose vector comes from the 8259.
    External,
}

/// Receivers named by relation to the sender instead of by a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// None: the destination counts.
    None,
    /// The sender.
    Myself,
    /// Everybody.
    All,
    /// Everybody but the sender.
    Others,
}

/// An interrupt on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// What it does.
    pub delivery: Delivery,
    /// Its vector; the page number of the entry point for [`Delivery::StartUp`].
    pub vector: u8,
    /// Level-triggered.
    pub level: bool,
    /// `destination` is a logical id rather than an APIC id.
    pub logical: bool,
    /// To everybody, by a destination of all ones.
    pub broadcast: bool,
    /// Shorthand, instead of a destination.
    pub shorthand: Shorthand,
    /// APIC id or logical id.
    pub destination: u32,
}

/// Trigger mode, in an interrupt command and in the data of an MSI: level.
const TRIGGER_LEVEL: u64 = 1 << 15;
/// Level: assert. Interrupt command and MSI data.
const LEVEL_ASSERT: u64 = 1 << 14;
/// Interrupt command: logical destination.
const ICR_LOGICAL: u64 = 1 << 11;
/// MSI address: logical destination.
const MSI_LOGICAL: u64 = 1 << 2;
/// MSI address: redirection hint.
const MSI_REDIRECTION: u64 = 1 << 3;

impl Delivery {
    /// From bits 10:8 of an interrupt command or of MSI data. 3 (AMD: remote read) is nothing that is supported.
    const fn decode(bits: u64) -> Option<Self> {
        Some(match (bits >> 8) & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::External,
            _ => return None,
        })
    }
}

impl Message {
    /// Decodes a message-signalled interrupt.
    ///
    /// Bits 19:12 of the address are destination bits 7:0. Two extensions carry wider destinations: bits 11:5 of the address
    /// are destination bits 14:8 (the convention that CPUID 0x40000001 announces to a Linux guest as
    /// `KVM_FEATURE_MSI_EXT_DEST_ID`), and bits 63:40 are destination bits 31:8 (what the axvcpu ABI offers besides).
    ///
    /// The redirection hint makes a fixed interrupt one for the receiver of lowest priority. The destination mode counts
    /// without the hint, too: devices ignore that it then should not, and so does everybody who emulates them.
    ///
    /// # Errors
    /// [`AxError::InvalidInput`] if the address is not one of the interrupt range or has reserved bits 39:32 set, or if the
    /// delivery mode is one that an MSI cannot have (start-up, reserved).
    pub fn from_msi(address: u64, data: u32) -> AxResult<Self> {
        if (address >> 20) & 0xfff != 0xfee || (address >> 32) & 0xff != 0 {
            return Err(AxError::InvalidInput);
        }
        let data = u64::from(data);
        let mut delivery = match Delivery::decode(data) {
            None | Some(Delivery::StartUp) => return Err(AxError::InvalidInput),
            Some(delivery) => delivery,
        };
        if delivery == Delivery::Fixed && address & MSI_REDIRECTION != 0 {
            delivery = Delivery::LowestPriority;
        }
        let low = ((address >> 12) & 0xff) as u32;
        let high = (((address >> 40) << 8) | (((address >> 5) & 0x7f) << 8)) as u32;
        Ok(Self {
            delivery,
            vector: data as u8,
            level: data & TRIGGER_LEVEL != 0,
            logical: address & MSI_LOGICAL != 0,
            broadcast: (high == 0 && low == 0xff) || (high | low) == u32::MAX,
            shorthand: Shorthand::None,
            destination: high | low,
        })
    }

    /// Decodes an interrupt command: the destination is in bits 63:32 in x2APIC mode, in bits 63:56 in xAPIC mode.
    ///
    /// `None` for commands that send nothing: INIT level de-assert, which processors since the Pentium 4 ignore (SDM vol. 3
    /// section 12.6.1), and delivery modes that are reserved.
    pub fn from_icr(icr: u64, x2apic: bool) -> Option<Self> {
        let delivery = Delivery::decode(icr)?;
        if delivery == Delivery::External
            || (delivery == Delivery::Init && icr & TRIGGER_LEVEL != 0 && icr & LEVEL_ASSERT == 0)
        {
            return None;
        }
        let destination = (icr >> 32) as u32 >> if x2apic { 0 } else { 24 };
        Some(Self {
            delivery,
            vector: icr as u8,
            // An interrupt command sends edges only: the trigger mode is for INIT (SDM vol. 3 section 12.6.1).
            level: false,
            logical: icr & ICR_LOGICAL != 0,
            broadcast: destination == if x2apic { u32::MAX } else { 0xff },
            shorthand: match (icr >> 18) & 3 {
                0 => Shorthand::None,
                1 => Shorthand::Myself,
                2 => Shorthand::All,
                _ => Shorthand::Others,
            },
            destination,
        })
    }

    /// Whether the APIC behind `mailbox` receives the message. `sender` is the sender's APIC id, if an APIC sent it. For
    /// [`Delivery::LowestPriority`] only one of those that match gets it: see [`route`](Self::route).
    pub fn matches<H: AxVCpuHal>(&self, mailbox: &Mailbox<H>, sender: Option<u32>) -> bool {
        self.addresses(&mailbox.identity(), sender)
    }

    /// [`matches`](Self::matches), for an identity at hand.
    pub fn addresses(&self, receiver: &Identity, sender: Option<u32>) -> bool {
        if receiver.mode == Mode::Disabled {
            return false;
        }
        // An APIC that software has not enabled takes only INIT, NMI, SMI and start-up messages (SDM vol. 3 section 12.4.7.2).
        if !receiver.enabled && matches!(self.delivery, Delivery::Fixed | Delivery::LowestPriority | Delivery::External)
        {
            return false;
        }
        match self.shorthand {
            Shorthand::None => self.broadcast || self.names(receiver),
            Shorthand::Myself => sender == Some(receiver.id),
            Shorthand::All => true,
            Shorthand::Others => sender != Some(receiver.id),
        }
    }

    /// Whether the destination names `receiver`.
    fn names(&self, receiver: &Identity) -> bool {
        let destination = self.destination;
        match (receiver.mode, self.logical) {
            (Mode::Disabled, _) => false,
            (Mode::X2Apic, false) => destination == receiver.id,
            // Cluster in bits 31:16, a bit for each member in 15:0 (SDM vol. 3 section 12.12.10.2).
            (Mode::X2Apic, true) => {
                destination >> 16 == receiver.id >> 4 && destination & (1 << (receiver.id & 0xf)) != 0
            }
            (Mode::XApic, false) => destination == receiver.id & 0xff,
            (Mode::XApic, true) => match u8::try_from(destination) {
                Ok(destination) if receiver.cluster => {
                    (destination >> 4 == 0xf || destination >> 4 == receiver.logical >> 4)
                        && destination & receiver.logical & 0xf != 0
                }
                Ok(destination) => destination & receiver.logical != 0,
                Err(_) => false,
            },
        }
    }

    /// Posts the message to one receiver, and says what the caller owes it; nothing if the message is dropped.
    ///
    /// System management interrupts are dropped: a guest has no system management mode. External interrupts are dropped, too:
    /// the 8259 is not behind the interrupt network, whoever models it injects its vectors.
    pub fn deliver<H: AxVCpuHal>(&self, mailbox: &Mailbox<H>) -> Option<Notice> {
        match self.delivery {
            Delivery::Fixed | Delivery::LowestPriority => return Some(mailbox.post_interrupt(self.vector, self.level)),
            Delivery::Nmi => mailbox.post_nmi(),
            Delivery::Init => mailbox.post_init(),
            Delivery::StartUp => mailbox.post_sipi(self.vector),
            Delivery::Smi | Delivery::External => return None,
        }
        Some(Notice::Look)
    }

    /// Delivers the message to everybody of `vcpus` whom it addresses, telling `delivered` each with what is owed to it, and
    /// returns how many there were. `mailbox` finds a vCPU's mailbox.
    ///
    /// A lowest-priority message goes to the one of lowest processor priority; among equals the vector chooses, so that the
    /// interrupts of different devices spread.
    pub fn route<T, H: AxVCpuHal>(
        &self,
        sender: Option<u32>,
        vcpus: impl Iterator<Item = T> + Clone,
        mailbox: impl Fn(&T) -> &Mailbox<H>,
        mut delivered: impl FnMut(T, Notice),
    ) -> usize {
        let receivers = vcpus.filter_map(|vcpu| {
            let identity = mailbox(&vcpu).identity();
            self.addresses(&identity, sender).then_some((identity.priority >> 4, vcpu))
        });
        let mut count = 0;
        let mut send = |vcpu: T| {
            if let Some(notice) = self.deliver(mailbox(&vcpu)) {
                count += 1;
                delivered(vcpu, notice);
            }
        };
        if self.delivery != Delivery::LowestPriority {
            receivers.for_each(|(_, vcpu)| send(vcpu));
            return count;
        }
        // Identities may change between the passes below. The second pass then may find fewer candidates than the first counted:
        // the last of them is taken, and if there is none the message is lost, as it is when its receivers have just gone.
        let mut lowest = u8::MAX;
        let mut candidates = 0usize;
        for (priority, _) in receivers.clone() {
            if priority < lowest {
                (lowest, candidates) = (priority, 0);
            }
            candidates += usize::from(priority == lowest);
        }
        let chosen = usize::from(self.vector).checked_rem(candidates).unwrap_or(0);
        let last = receivers.filter(|(priority, _)| *priority <= lowest).take(chosen.saturating_add(1)).last();
        if let Some((_, vcpu)) = last {
            send(vcpu);
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHal;
    use std::{vec, vec::Vec};

    type Mailbox = super::Mailbox<TestHal>;

    fn flat(id: u32, logical: u8) -> Identity {
        Identity { id, logical, cluster: false, mode: Mode::XApic, enabled: true, priority: 0 }
    }

    fn x2(id: u32) -> Identity {
        Identity { id, logical: 0, cluster: false, mode: Mode::X2Apic, enabled: true, priority: 0 }
    }

    fn boxes(identities: &[Identity]) -> Vec<Mailbox> {
        identities
            .iter()
            .map(|identity| {
                let mailbox = Mailbox::new();
                mailbox.publish(*identity);
                mailbox
            })
            .collect()
    }

    /// APIC ids that get `message`.
    fn receivers(message: &Message, sender: Option<u32>, identities: &[Identity]) -> Vec<u32> {
        let mut ids = vec![];
        let boxes = boxes(identities);
        let count =
            message.route(sender, boxes.iter(), |mailbox| mailbox, |mailbox, _| ids.push(mailbox.identity().id));
        assert_eq!(count, ids.len());
        for mailbox in &boxes {
            let got = ids.contains(&mailbox.identity().id);
            assert_eq!(mailbox.pending(), got);
            assert!(!got || message.matches(mailbox, sender));
        }
        ids
    }

    #[test]
    fn msi_fields() {
        let message = Message::from_msi(0xfee0_3000, 0x0000_0041).unwrap();
        assert_eq!(
            message,
            Message {
                delivery: Delivery::Fixed,
                vector: 0x41,
                level: false,
                logical: false,
                broadcast: false,
                shorthand: Shorthand::None,
                destination: 3,
            }
        );
        let message = Message::from_msi(0xfee0_f00c, 0x0000_c1fe).unwrap();
        assert_eq!((message.delivery, message.level, message.logical), (Delivery::LowestPriority, true, true));
        assert_eq!((message.vector, message.destination), (0xfe, 0xf));
        assert_eq!(
            Message::from_msi(0xfee0_1008, 0x41).unwrap().delivery,
            Delivery::LowestPriority,
            "redirection hint"
        );
        assert_eq!(
            Message::from_msi(0xfee0_1008, 0x400).unwrap().delivery,
            Delivery::Nmi,
            "the hint is for interrupts"
        );
        for (data, delivery) in [(0x200, Delivery::Smi), (0x500, Delivery::Init), (0x700, Delivery::External)] {
            assert_eq!(Message::from_msi(0xfee0_0000, data).unwrap().delivery, delivery);
        }
    }

    #[test]
    fn msi_outside_the_rules_is_refused() {
        for (address, data) in [
            (0xfed0_0000, 0x41),
            (0, 0x41),
            (0x1_fee0_0000, 0x41),
            (0x80_fee0_0000, 0x41),
            (0xfee0_0000, 0x300),
            (0xfee0_0000, 0x600),
        ] {
            assert_eq!(Message::from_msi(address, data), Err(AxError::InvalidInput), "{address:#x} {data:#x}");
        }
    }

    #[test]
    fn msi_extended_destinations() {
        let destination = |address| Message::from_msi(address, 0x41).unwrap().destination;
        assert_eq!(destination(0xfee0_0000 | (0x23 << 12) | (0x01 << 5)), 0x123);
        assert_eq!(destination(0xfee0_0000 | (0xff << 12) | (0x7f << 5)), 0x7fff);
        assert_eq!(destination(0xfee0_0000 | (0x23 << 12) | (0xab_cdef << 40)), 0xabcd_ef23);
        assert!(Message::from_msi(0xfeef_f000, 0x41).unwrap().broadcast);
        assert!(!Message::from_msi(0xfeef_f020, 0x41).unwrap().broadcast, "0x1ff is an ordinary extended id");
        assert!(Message::from_msi(0xffff_ff00_feef_f000, 0x41).unwrap().broadcast);
        assert_eq!(receivers(&Message::from_msi(0xfee2_3020, 0x41).unwrap(), None, &[x2(0x23), x2(0x123)]), [0x123]);
    }

    #[test]
    fn icr_fields() {
        let message = Message::from_icr(0x0300_0000_0000_4041, false).unwrap();
        assert_eq!((message.destination, message.delivery, message.vector), (3, Delivery::Fixed, 0x41));
        let message = Message::from_icr(0x0001_0003_0000_08fd, true).unwrap();
        assert_eq!((message.destination, message.logical, message.vector), (0x0001_0003, true, 0xfd));
        assert!(Message::from_icr(0xff00_0000_0000_0041, false).unwrap().broadcast);
        assert!(!Message::from_icr(0xff00_0000_0000_0041, true).unwrap().broadcast);
        assert!(Message::from_icr(0xffff_ffff_0000_0041, true).unwrap().broadcast);
        assert_eq!(Message::from_icr(0x4600 | 0x9a, false).unwrap().delivery, Delivery::StartUp);
        assert!(!Message::from_icr(0xc041, true).unwrap().level, "an IPI is an edge");
    }

    #[test]
    fn icr_commands_that_send_nothing() {
        assert_eq!(Message::from_icr(0x8500, false), None, "INIT level de-assert");
        assert!(Message::from_icr(0xc500, false).is_some(), "INIT level assert");
        assert!(Message::from_icr(0x0500, false).is_some(), "INIT edge");
        assert_eq!(Message::from_icr(0x0300, false), None, "reserved");
        assert_eq!(Message::from_icr(0x0700, false), None, "reserved");
    }

    #[test]
    fn physical_destination() {
        let machine = [flat(0, 1), flat(1, 2), flat(2, 4)];
        let to = |icr| receivers(&Message::from_icr(icr, false).unwrap(), Some(0), &machine);
        assert_eq!(to(0x0100_0000_0000_0041), [1]);
        assert_eq!(to(0x0000_0000_0000_0041), [0]);
        assert_eq!(to(0x0700_0000_0000_0041), []);
        assert_eq!(to(0xff00_0000_0000_0041), [0, 1, 2]);
        let machine = [x2(0), x2(0x100), x2(0xffff)];
        let to = |icr| receivers(&Message::from_icr(icr, true).unwrap(), Some(0), &machine);
        assert_eq!(to(0x0000_0100_0000_0041), [0x100]);
        assert_eq!(to(0x0000_00ff_0000_0041), []);
        assert_eq!(to(0xffff_ffff_0000_0041), [0, 0x100, 0xffff]);
    }

    #[test]
    fn logical_flat_destination() {
        let machine = [flat(0, 0x01), flat(1, 0x02), flat(2, 0x80), flat(3, 0)];
        let to = |mask: u64| receivers(&Message::from_icr((mask << 56) | 0x841, false).unwrap(), Some(0), &machine);
        assert_eq!(to(0x02), [1]);
        assert_eq!(to(0x83), [0, 1, 2]);
        assert_eq!(to(0x40), []);
        assert_eq!(to(0xff), [0, 1, 2, 3]);
    }

    #[test]
    fn logical_cluster_destination() {
        let member = |id, logical| Identity { cluster: true, ..flat(id, logical) };
        let machine = [member(0, 0x11), member(1, 0x12), member(2, 0x21), member(3, 0x28)];
        let to = |mask: u64| receivers(&Message::from_icr((mask << 56) | 0x841, false).unwrap(), Some(0), &machine);
        assert_eq!(to(0x11), [0]);
        assert_eq!(to(0x13), [0, 1]);
        assert_eq!(to(0x2f), [2, 3]);
        assert_eq!(to(0x31), []);
        assert_eq!(to(0xf1), [0, 2], "cluster 15 is every cluster");
    }

    #[test]
    fn x2apic_cluster_destination() {
        let machine = [x2(0), x2(1), x2(15), x2(16), x2(0x123)];
        let to = |mask: u64| receivers(&Message::from_icr((mask << 32) | 0x841, true).unwrap(), Some(0), &machine);
        assert_eq!(to(0x0000_0003), [0, 1]);
        assert_eq!(to(0x0000_8001), [0, 15]);
        assert_eq!(to(0x0001_0001), [16]);
        assert_eq!(to(0x0012_0008), [0x123]);
        assert_eq!(to(0x0002_ffff), []);
    }

    #[test]
    fn wide_destinations_miss_xapic_receivers() {
        assert_eq!(receivers(&Message::from_msi(0xfee0_1020, 0x41).unwrap(), None, &[flat(1, 1)]), []);
        assert_eq!(receivers(&Message::from_msi(0xfee0_1024, 0x41).unwrap(), None, &[flat(1, 1)]), []);
    }

    #[test]
    fn shorthands() {
        let machine = [flat(0, 1), flat(1, 2), flat(2, 4)];
        let to = |shorthand: u64, sender| {
            receivers(&Message::from_icr(0x0200_0000_0000_0041 | (shorthand << 18), false).unwrap(), sender, &machine)
        };
        assert_eq!(to(0, Some(1)), [2]);
        assert_eq!(to(1, Some(1)), [1]);
        assert_eq!(to(2, Some(1)), [0, 1, 2]);
        assert_eq!(to(3, Some(1)), [0, 2]);
    }

    #[test]
    fn disabled_receivers() {
        let off = Identity { mode: Mode::Disabled, ..flat(0, 1) };
        let asleep = Identity { enabled: false, ..flat(1, 2) };
        let machine = [off, asleep, flat(2, 4)];
        let all = |delivery: u64| {
            receivers(&Message::from_icr(0xff00_0000_0000_4041 | (delivery << 8), false).unwrap(), Some(2), &machine)
        };
        assert_eq!(all(0), [2]);
        assert_eq!(all(4), [1, 2], "NMI");
        assert_eq!(all(5), [1, 2], "INIT");
        assert_eq!(all(6), [1, 2], "start-up");
    }

    #[test]
    fn smi_and_extint_are_dropped() {
        assert_eq!(receivers(&Message::from_msi(0xfeef_f000, 0x200).unwrap(), None, &[flat(0, 1)]), []);
        assert_eq!(receivers(&Message::from_msi(0xfeef_f000, 0x700).unwrap(), None, &[flat(0, 1)]), []);
    }

    #[test]
    fn lowest_priority_takes_one() {
        let at = |id, priority| Identity { priority, ..flat(id, 1 << id) };
        let message = |vector: u32| Message::from_msi(0xfeef_f00c, 0x100 | vector).unwrap();
        assert_eq!(receivers(&message(0x41), None, &[at(0, 0x50), at(1, 0x20), at(2, 0x30)]), [1]);
        let equal = [at(0, 0x20), at(1, 0x2f), at(2, 0x20), at(3, 0x30)];
        let mut seen: Vec<u32> = (0x40..0x43).flat_map(|vector| receivers(&message(vector), None, &equal)).collect();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2], "equals take turns by vector, and only the class counts");
        let after_busy = [at(0, 0x50), at(1, 0x20), at(2, 0x20)];
        let seen: Vec<u32> = (0x40..0x46).flat_map(|vector| receivers(&message(vector), None, &after_busy)).collect();
        assert_eq!(seen, [1, 2, 1, 2, 1, 2]);
        assert_eq!(receivers(&message(0x41), None, &[]), []);
        let asleep = Identity { enabled: false, ..at(0, 0) };
        assert_eq!(receivers(&message(0x41), None, &[asleep, at(1, 0xf0)]), [1]);
    }
}
