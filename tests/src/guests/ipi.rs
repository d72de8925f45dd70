// SPDX-License-Identifier: MIT OR Apache-2.0
//! Interrupts between vCPUs: every delivery mode, destination and shorthand, through the x2APIC's interrupt command and
//! through the xAPIC page; exactly those who are addressed get them.

use crate::cpus::{Cpus, IDLE};
use crate::harness::{self, Case, CaseResult, Hypervisor, Stop};
use crate::machine::{CODE, TABLES};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::exit::AxVCpuExitReason::NestedPageFault;
use axvcpu_uapi::x86::{Control, LocalApic, Segments, ACTIVITY_RUNNING, ACTIVITY_WAIT_FOR_SIPI};

pub(super) fn cases() -> Vec<Case> {
    table! {
        "ipi/x2apic-physical" => x2apic_physical;
        "ipi/x2apic-logical-cluster" => x2apic_cluster;
        "ipi/x2apic-shorthands" => x2apic_shorthands;
        "ipi/xapic-physical" => xapic_physical [abi];
        "ipi/xapic-logical-flat" => xapic_flat [abi];
        "ipi/xapic-logical-cluster" => xapic_cluster [abi];
        "ipi/xapic-shorthands" => xapic_shorthands [abi];
        "ipi/modes-mixed" => mixed [differs];
        "ipi/lowest-priority" => lowest_priority [abi];
        "ipi/nmi" => nmi;
        "ipi/init-and-start-up" => start_up;
        "ipi/start-up-of-all-others" => start_up_others;
        "ipi/disabled-apics-take-no-interrupts" => disabled;
        "ipi/commands-that-send-nothing" => nothing [differs];
    }
}

/// The vector of the interrupts here.
const VECTOR: u8 = 0x41;
/// ICR: delivery modes.
const LOWEST: u32 = 1 << 8;
const SMI: u32 = 2 << 8;
const NMI: u32 = 4 << 8;
const INIT: u32 = 5 << 8;
const STARTUP: u32 = 6 << 8;
/// ICR: logical destination.
const LOGICAL: u32 = 1 << 11;
/// ICR: assert, and level-triggered.
const ASSERT: u32 = 1 << 14;
const LEVEL: u32 = 1 << 15;
/// ICR: shorthands.
const MYSELF: u32 = 1 << 18;
const ALL: u32 = 2 << 18;
const OTHERS: u32 = 3 << 18;

/// Registers of the xAPIC page.
const TPR: u32 = 0x80;
const EOI: u32 = 0xb0;
const LDR: u32 = 0xd0;
const DFR: u32 = 0xe0;
const SVR: u32 = 0xf0;
const ESR: usize = 0x280;
const ICR: u64 = 0xfee0_0300;
const ICR_HIGH: u64 = 0xfee0_0310;
/// DFR: clusters.
const CLUSTERS: u32 = 0x0fff_ffff;

/// Code of the sender, which sends by `$send`, and of the others, which wait at [`IDLE`]; the handlers of interrupts, which end them by
/// `$end`, and of NMIs.
macro_rules! network_code {
    ($name:ident, ($($send:literal),+), ($($end:literal),*) $(,)?) => {
        code!(
            $name,
            64,
            "2: out 0x80, al",
            $($send,)+
            "jmp 2b",
            ".org 77b + 0x100",
            $($end,)*
            "mov al, 0x41",
            "out 0x90, al",
            "iretq",
            ".org 77b + 0x180",
            "out 0x91, al",
            "iretq",
            ".org 77b + 0x400",
            "2: sti",
            "hlt",
            "jmp 2b",
        )
    };
}

/// A network of vCPUs, of which the first sends.
struct Network {
    cpus: Cpus,
    x2apic: bool,
}

impl Network {
    /// vCPUs 0 and `others`, in x2APIC mode or not. vCPU 0 sends commands from R8 (low half) and R9 (destination), the others
    /// let interrupts in and wait. Handlers tell the vector.
    fn new(others: &[u32], x2apic: bool) -> Result<Self, Stop> {
        let sender = if x2apic {
            network_code!(
                send_x2apic,
                ("mov ecx, 0x830", "mov eax, r8d", "mov edx, r9d", "wrmsr"),
                ("mov ecx, 0x80b", "xor eax, eax", "xor edx, edx", "wrmsr"),
            )
        } else {
            network_code!(send_xapic, ("mov [rbx + 0x310], r9d", "mov [rbx + 0x300], r8d"), ())
        };
        assert_eq!(IDLE, CODE + 0x400);
        let mut network = Self { cpus: Cpus::new(sender, others, x2apic)?, x2apic };
        let m = &mut network.cpus.machine;
        // The xAPIC page is beyond what long mode maps here; see the case of the register page in `apic.rs`.
        m.write_u64(TABLES + 0x1018, (TABLES + 0x3000) | 7)?;
        m.write_u64(TABLES + 0x3000 + 8 * 0x1f7, 0xfee0_0000 | 0x87)?;
        m.vector(VECTOR, CODE + 0x100)?;
        m.vector(2, CODE + 0x180)?;
        m.vcpu.set_gpr(3, 0xfee0_0000)?;
        m.expect_mark(0x80)?;
        Ok(network)
    }

    /// The guest sends a command. `destination` is in the format of the mode: bits 31:24 in xAPIC mode.
    fn send(&mut self, command: u32, destination: u32) -> CaseResult {
        self.send_to_itself(command, destination, 0x80)
    }

    /// The guest sends a command, and is next seen at the mark `port`.
    fn send_to_itself(&mut self, command: u32, destination: u32, port: u16) -> CaseResult {
        let m = &mut self.cpus.machine;
        m.vcpu.modify_general(|general| (general.gpr[8], general.gpr[9]) = (command.into(), destination.into()));
        // KVM carries out accesses to the page itself.
        if !self.x2apic && harness::hypervisor() == Hypervisor::Axvcpu {
            for (register, value) in [(ICR_HIGH, destination), (ICR, command)] {
                let NestedPageFault { addr, .. } = m.run()?.reason else {
                    return Err(Stop::Fail("no exit at the xAPIC page".into()));
                };
                ensure_eq!(addr.as_u64(), register, "the register written");
                m.vcpu.apic_access(register as u32 & 0xfff, Some(value))?;
                m.step_over(7, |_| ());
            }
        }
        m.expect_mark(port).map(drop)
    }

    /// Sends a command of an interrupt, and makes sure that those in `receivers` have got it and nobody else; and that the
    /// interrupt reaches their handlers.
    fn expect(&mut self, command: u32, destination: u32, receivers: &[u32]) -> CaseResult {
        let what = format!("command {command:#x} to {destination:#x}");
        self.send(command | u32::from(VECTOR), destination).map_err(|stop| stop.context(&what))?;
        let states = self.cpus.states()?;
        let got: Vec<u32> = self
            .cpus
            .ids
            .iter()
            .zip(&states)
            .filter(|(_, state)| state.vectors == [VECTOR])
            .map(|(id, _)| *id)
            .collect();
        ensure_eq!(got, receivers, "receivers of {what}");
        ensure!(states.iter().all(|state| !state.nmi && state.activity == ACTIVITY_RUNNING), "{what}: {states:?}");
        for place in 0..self.cpus.ids.len() {
            if receivers.contains(&self.cpus.ids[place]) {
                self.deliver(place).map_err(|stop| stop.context(&what))?;
            }
        }
        let left = self.cpus.states()?;
        ensure!(left.iter().all(|state| state.vectors.is_empty()), "{what}: still there: {left:?}");
        Ok(())
    }

    /// Runs the vCPU at `place` into the interrupt's handler.
    fn deliver(&mut self, place: usize) -> CaseResult {
        if place == 0 {
            // The sender has interrupts off.
            self.cpus.machine.interrupts(true)?;
        }
        ensure_eq!(
            self.cpus.mark(place, 0x90)?,
            u64::from(VECTOR),
            "vector that vCPU {} handles",
            self.cpus.ids[place]
        );
        if !self.x2apic {
            self.cpus.write_apic(place, EOI, 0)?;
        }
        if place == 0 {
            // Back to the mark from before.
            self.cpus.machine.modify(|general| (general.rip, general.rflags) = (CODE + 2, 2))?;
        }
        Ok(())
    }

    /// Sends a command that is no ordinary interrupt, and says which vCPUs have an NMI, and which wait for a start-up message.
    fn send_special(&mut self, command: u32, destination: u32) -> Result<(Vec<u32>, Vec<u32>), Stop> {
        self.send(command, destination)?;
        let states = self.cpus.states()?;
        ensure!(states.iter().all(|state| state.vectors.is_empty()), "command {command:#x}: {states:?}");
        let ids = |condition: fn(&crate::cpus::State) -> bool| {
            let places = self.cpus.ids.iter().zip(&states).filter(move |(_, state)| condition(state));
            places.map(|(id, _)| *id).collect::<Vec<u32>>()
        };
        Ok((ids(|state| state.nmi), ids(|state| state.activity == ACTIVITY_WAIT_FOR_SIPI)))
    }

    /// Where the vCPU at `place` starts, if it runs in real mode at the start of a page.
    fn start(&mut self, place: usize) -> Result<u64, Stop> {
        let vcpu = self.cpus.vcpu(place);
        let (segments, control) = (vcpu.get::<Segments>()?, vcpu.get::<Control>()?);
        let rip = vcpu.get::<axvcpu_uapi::x86::General>()?.rip;
        ensure_eq!((control.cr0 & 1, rip), (0, 0), "CR0.PE and RIP of a vCPU that starts");
        ensure_eq!(u64::from(segments.cs.selector) << 4, segments.cs.base, "CS of a vCPU that starts");
        Ok(segments.cs.base)
    }
}

fn x2apic_physical() -> CaseResult {
    let mut network = Network::new(&[1, 2, 3], true)?;
    network.expect(ASSERT, 2, &[2])?;
    network.expect(0, 3, &[3])?;
    network.expect(ASSERT, 0, &[0])?;
    network.expect(ASSERT, 9, &[])?;
    network.expect(ASSERT, 0xff, &[])?;
    network.expect(ASSERT, 0x100, &[])?;
    network.expect(ASSERT, u32::MAX, &[0, 1, 2, 3])?;
    // An interrupt command sends edges only.
    network.expect(ASSERT | LEVEL, 1, &[1])
}

fn x2apic_cluster() -> CaseResult {
    let mut network = Network::new(&[1, 15, 16, 17, 33], true)?;
    network.expect(ASSERT | LOGICAL, 0x0000_0002, &[1])?;
    network.expect(ASSERT | LOGICAL, 0x0000_8003, &[0, 1, 15])?;
    network.expect(ASSERT | LOGICAL, 0x0001_ffff, &[16, 17])?;
    network.expect(ASSERT | LOGICAL, 0x0002_0003, &[33])?;
    network.expect(ASSERT | LOGICAL, 0x0003_ffff, &[])?;
    network.expect(ASSERT | LOGICAL, 0x0001_0000, &[])?;
    network.expect(ASSERT | LOGICAL, u32::MAX, &[0, 1, 15, 16, 17, 33])
}

fn x2apic_shorthands() -> CaseResult {
    let mut network = Network::new(&[1, 2], true)?;
    network.expect(ASSERT | MYSELF, 1, &[0])?;
    network.expect(ASSERT | ALL, 1, &[0, 1, 2])?;
    network.expect(ASSERT | OTHERS, 1, &[1, 2])
}

fn xapic_physical() -> CaseResult {
    let mut network = Network::new(&[1, 2, 3], false)?;
    network.expect(ASSERT, 2 << 24, &[2])?;
    network.expect(ASSERT, 0, &[0])?;
    network.expect(ASSERT, 9 << 24, &[])?;
    network.expect(ASSERT, 0xff << 24, &[0, 1, 2, 3])
}

fn xapic_flat() -> CaseResult {
    let mut network = Network::new(&[1, 2, 3], false)?;
    for (place, logical) in [0x01, 0x02, 0x84, 0x00].into_iter().enumerate() {
        network.cpus.write_apic(place, LDR, logical << 24)?;
    }
    network.cpus.publish()?;
    network.expect(ASSERT | LOGICAL, 0x02 << 24, &[1])?;
    network.expect(ASSERT | LOGICAL, 0x83 << 24, &[0, 1, 2])?;
    network.expect(ASSERT | LOGICAL, 0x40 << 24, &[])?;
    network.expect(ASSERT | LOGICAL, 0xff << 24, &[0, 1, 2, 3])
}

fn xapic_cluster() -> CaseResult {
    let mut network = Network::new(&[1, 2, 3], false)?;
    for (place, logical) in [0x11, 0x12, 0x21, 0x28].into_iter().enumerate() {
        network.cpus.write_apic(place, DFR, CLUSTERS)?;
        network.cpus.write_apic(place, LDR, logical << 24)?;
    }
    network.cpus.publish()?;
    network.expect(ASSERT | LOGICAL, 0x13 << 24, &[0, 1])?;
    network.expect(ASSERT | LOGICAL, 0x29 << 24, &[2, 3])?;
    network.expect(ASSERT | LOGICAL, 0x31 << 24, &[])?;
    network.expect(ASSERT | LOGICAL, 0xf1 << 24, &[0, 2])?;
    network.expect(ASSERT | LOGICAL, 0xff << 24, &[0, 1, 2, 3])
}

fn xapic_shorthands() -> CaseResult {
    let mut network = Network::new(&[1, 2], false)?;
    network.expect(ASSERT | MYSELF, 1 << 24, &[0])?;
    network.expect(ASSERT | ALL, 0, &[0, 1, 2])?;
    network.expect(ASSERT | OTHERS, 0, &[1, 2])
}

/// An x2APIC sends to CPUs that are still in xAPIC mode, as while a system changes over.
fn mixed() -> CaseResult {
    let mut network = Network::new(&[1, 2], true)?;
    let vcpu = network.cpus.vcpu(2);
    let control: Control = vcpu.get()?;
    vcpu.set(&Control { apic_base: control.apic_base & !(1 << 10), ..control })?;
    network.cpus.write_apic(2, LDR, 0x04 << 24)?;
    network.cpus.publish()?;
    let vectors = |network: &mut Network, command, destination| -> Result<Vec<usize>, Stop> {
        network.send(ASSERT | command | u32::from(VECTOR), destination)?;
        let got = network.cpus.states()?.iter().map(|state| state.vectors.len()).collect();
        for place in 0..3 {
            let vcpu = network.cpus.vcpu(place);
            let mut apic: LocalApic = vcpu.get()?;
            apic.regs[0x20 + usize::from(VECTOR / 32)] = 0;
            vcpu.set(&apic)?;
        }
        Ok(got)
    };
    ensure_eq!(vectors(&mut network, 0, 2)?, [0, 0, 1], "receivers of a message to id 2");
    ensure_eq!(vectors(&mut network, OTHERS, 0)?, [0, 1, 1], "receivers of a message to all others");
    ensure_eq!(vectors(&mut network, 0, u32::MAX)?, [1, 1, 1], "receivers of a message to everybody");
    ensure_eq!(vectors(&mut network, LOGICAL, 4)?, [0, 0, 1], "receivers of a message to the flat set 4");
    Ok(())
}

fn lowest_priority() -> CaseResult {
    let mut network = Network::new(&[1, 2, 3], false)?;
    for (place, logical) in [0x01, 0x02, 0x04, 0x08].into_iter().enumerate() {
        network.cpus.write_apic(place, LDR, logical << 24)?;
    }
    let priorities = |network: &mut Network, all: [u32; 4]| -> CaseResult {
        for (place, priority) in all.into_iter().enumerate() {
            network.cpus.write_apic(place, TPR, priority)?;
        }
        network.cpus.publish()
    };
    priorities(&mut network, [0x30, 0x20, 0x10, 0x20])?;
    network.expect(ASSERT | LOWEST | LOGICAL, 0x0f << 24, &[2])?;
    network.expect(ASSERT | LOWEST | LOGICAL, 0x03 << 24, &[1])?;
    network.expect(ASSERT | LOWEST | LOGICAL, 0x01 << 24, &[0])?;
    priorities(&mut network, [0x00, 0x20, 0x30, 0x20])?;
    network.expect(ASSERT | LOWEST | LOGICAL, 0x0f << 24, &[0])?;
    // Equals: just one of them, whichever it is.
    priorities(&mut network, [0x30, 0x10, 0x10, 0x10])?;
    network.send(ASSERT | LOWEST | LOGICAL | u32::from(VECTOR), 0x0f << 24)?;
    let got: Vec<usize> = network.cpus.states()?.iter().map(|state| state.vectors.len()).collect();
    ensure!(got[0] == 0 && got.iter().sum::<usize>() == 1, "receivers of a message to one of three equals: {got:?}");
    Ok(())
}

fn nmi() -> CaseResult {
    for x2apic in [true, false] {
        let mut network = Network::new(&[1, 2], x2apic)?;
        let to = |id: u32| if x2apic { id } else { id << 24 };
        ensure_eq!(network.send_special(ASSERT | NMI, to(2))?.0, [2], "receivers of an NMI to 2");
        network.cpus.mark(2, 0x91)?;
        ensure_eq!(network.send_special(ASSERT | NMI | OTHERS, 0)?.0, [1, 2], "receivers of an NMI to all others");
        // 2 is still in the handler of its first one: the second waits for its end.
        network.cpus.mark(1, 0x91)?;
        network.cpus.mark(2, 0x91)?;
        // To everybody, with a vector, which means nothing here. The sender is the first to see it.
        let all = if x2apic { u32::MAX } else { 0xff << 24 };
        network.send_to_itself(ASSERT | NMI | 0x55, all, 0x91)?;
        ensure_eq!(
            network.cpus.states()?.iter().map(|s| s.nmi).collect::<Vec<_>>(),
            [false, true, true],
            "NMIs that wait"
        );
        for place in 1..3 {
            network.cpus.mark(place, 0x91)?;
        }
    }
    Ok(())
}

fn start_up() -> CaseResult {
    for x2apic in [true, false] {
        let mut network = Network::new(&[1, 2], x2apic)?;
        let to = |id: u32| if x2apic { id } else { id << 24 };
        // Ignored by one that runs.
        ensure_eq!(network.send_special(STARTUP | ASSERT | 0x77, to(1))?, (vec![], vec![]), "effect on one that runs");
        ensure_eq!(network.cpus.vcpu(1).get::<Segments>()?.cs.base, 0, "CS of one that runs");
        // The old sequence: INIT asserted, de-asserted (which is nothing), start-up twice, of which one counts.
        ensure_eq!(network.send_special(INIT | ASSERT | LEVEL, to(1))?.1, [1], "CPUs that wait after INIT");
        ensure_eq!(network.send_special(INIT | LEVEL, to(2))?.1, [1], "CPUs that wait after INIT was de-asserted");
        ensure_eq!(
            network.send_special(STARTUP | ASSERT | 0x9a, to(1))?.1,
            Vec::<u32>::new(),
            "CPUs that wait after start-up"
        );
        network.send_special(STARTUP | ASSERT | 0x12, to(1))?;
        ensure_eq!(network.start(1)?, 0x9_a000, "where CPU 1 starts");
        // Both before it looks: INIT comes first, whatever it did before.
        network.send(INIT | ASSERT, to(1))?;
        ensure_eq!(
            network.send_special(STARTUP | ASSERT | 0x34, to(1))?.1,
            Vec::<u32>::new(),
            "CPUs that wait after both"
        );
        ensure_eq!(network.start(1)?, 0x3_4000, "where CPU 1 starts next");
        ensure_eq!(network.cpus.vcpu(1).get::<Control>()?.apic_base >> 10 & 1, u64::from(x2apic), "mode after INIT");
        // It really does.
        network.cpus.machine.write(0x3_4000, code!(started, 16, "mov ax, cs", "mov al, ah", "out 0x92, al", "hlt"))?;
        ensure_eq!(network.cpus.mark(1, 0x92)?, 0x34, "what CPU 1 tells");
    }
    Ok(())
}

/// How an operating system starts all others at once.
fn start_up_others() -> CaseResult {
    for x2apic in [true, false] {
        let mut network = Network::new(&[1, 2, 3], x2apic)?;
        ensure_eq!(network.send_special(INIT | ASSERT | OTHERS, 0)?.1, [1, 2, 3], "CPUs that wait after INIT");
        ensure_eq!(
            network.send_special(STARTUP | ASSERT | OTHERS | 8, 0)?.1,
            Vec::<u32>::new(),
            "CPUs that wait after start-up"
        );
        for place in 1..4 {
            ensure_eq!(network.start(place)?, 0x8000, "where CPU {place} starts");
        }
    }
    Ok(())
}

fn disabled() -> CaseResult {
    let mut network = Network::new(&[1, 2], false)?;
    // 1: disabled by software. 2: switched off by its base register.
    network.cpus.write_apic(1, SVR, 0xff)?;
    let vcpu = network.cpus.vcpu(2);
    let control: Control = vcpu.get()?;
    vcpu.set(&Control { apic_base: control.apic_base & !(1 << 11), ..control })?;
    network.cpus.publish()?;
    network.expect(ASSERT | ALL, 0, &[0])?;
    network.expect(ASSERT, 1 << 24, &[])?;
    ensure_eq!(network.send_special(ASSERT | NMI | OTHERS, 0)?.0, [1], "receivers of an NMI");
    ensure_eq!(network.send_special(ASSERT | INIT | OTHERS, 0)?.1, [1], "receivers of INIT");
    Ok(())
}

fn nothing() -> CaseResult {
    for x2apic in [true, false] {
        let mut network = Network::new(&[1], x2apic)?;
        for command in [SMI, 3 << 8, 7 << 8, INIT | LEVEL] {
            let effect = network.send_special(command | OTHERS, 0)?;
            ensure_eq!(effect, (vec![], vec![]), "effect of command {command:#x}");
        }
        // A vector that is reserved for exceptions is an error of the sender's.
        ensure_eq!(network.send_special(ASSERT | OTHERS | 15, 0)?, (vec![], vec![]), "effect of vector 15");
        network.expect(ASSERT | OTHERS, 0, &[1])?;
        if !x2apic {
            network.cpus.write_apic(0, ESR as u32, 0)?;
            let errors = network.cpus.vcpu(0).get::<LocalApic>()?.regs[ESR / 16];
            ensure_eq!(errors, 1 << 5, "error status: an illegal vector was sent");
        }
    }
    Ok(())
}
