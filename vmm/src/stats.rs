// SPDX-License-Identifier: MIT OR Apache-2.0
//! Counters: exits that reached this program, by kind and vCPU; and the report of `--stats`.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use axvcpu_uapi::vcpu::{ExitKind, VcpuStats};
use axvcpu_uapi::vm::VmStats;

use crate::hypervisor::Stats;

/// Declares the kinds once, for the enum, its list and its names.
macro_rules! user_exits {
    ($($(#[$meta:meta])* $name:ident = $text:literal;)+) => {
        /// Kinds of exit that this program handles.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum UserExit { $($(#[$meta])* $name,)+ }

        impl UserExit {
            /// Every kind.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];
            /// A short lower-case name for tables.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }
        }
    };
}

user_exits! {
    /// Port input.
    PortRead = "port-read";
    /// Port output.
    PortWrite = "port-write";
    /// String port I/O.
    StringIo = "string-io";
    /// Access to device memory.
    Mmio = "mmio";
    /// End of a level-triggered interrupt.
    InterruptEnd = "interrupt-end";
    /// The interrupt window opened.
    Window = "window";
    /// Kick or signal.
    Interrupted = "interrupted";
    /// Unknown MSR read.
    MsrRead = "msr-read";
    /// Unknown MSR written.
    MsrWrite = "msr-write";
    /// Hypercall.
    Hypercall = "hypercall";
    /// A CPU was started, stopped or asked for (PSCI).
    Power = "power";
    /// Halted with interrupts off.
    Halt = "halt";
    /// Nothing to do.
    Other = "other";
}

/// One vCPU's counters. Any thread may read them while its vCPU runs.
#[derive(Debug, Default)]
pub struct Counters([AtomicU64; UserExit::ALL.len()]);

impl Counters {
    /// Counts an exit.
    pub fn count(&self, kind: UserExit) {
        self.0[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Exits of a kind so far.
    #[must_use]
    pub fn get(&self, kind: UserExit) -> u64 {
        self.0[kind as usize].load(Ordering::Relaxed)
    }
}

/// The report of one vCPU.
#[must_use]
pub fn vcpu_report(id: u32, kernel: Option<&Stats<VcpuStats>>, user: &Counters) -> String {
    let mut text = String::new();
    match kernel {
        Some(Stats::Axvcpu(stats)) => {
            let _ = writeln!(
                text,
                "vCPU {id}: {} runs, {} windows, {} entries, {} injections, {} TLB flushes, {} migrations",
                stats.runs, stats.windows, stats.entries, stats.injections, stats.tlb_flushes, stats.migrations
            );
            let _ = writeln!(
                text,
                "  time: {} ms on a CPU, {} ms halted",
                stats.run_ns / 1_000_000,
                stats.halt_ns / 1_000_000
            );
            let exits = ExitKind::ALL.iter().zip(stats.exits).map(|(kind, count)| (kind.name(), count));
            table(&mut text, "exits", exits.collect());
        }
        Some(Stats::Kvm(counters)) => {
            let _ = writeln!(text, "vCPU {id}");
            named(&mut text, "  KVM's counters", "    ", counters);
        }
        None => {
            let _ = writeln!(text, "vCPU {id}");
        }
    }
    table(&mut text, "exits to axvmm", UserExit::ALL.iter().map(|kind| (kind.name(), user.get(*kind))).collect());
    text
}

/// A heading with the sum, and the counts that are not zero, largest first.
fn table(text: &mut String, title: &str, mut rows: Vec<(&str, u64)>) {
    let _ = writeln!(text, "  {title}: {}", rows.iter().map(|(_, count)| count).sum::<u64>());
    rows.retain(|(_, count)| *count > 0);
    rows.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    for (name, count) in rows {
        let _ = writeln!(text, "    {name:<16}{count:>12}");
    }
}

/// A heading, and counters under their hypervisor's names in its own order, without those that are zero.
fn named(text: &mut String, title: &str, indent: &str, counters: &[(String, u64)]) {
    let _ = writeln!(text, "{title}:");
    for (name, count) in counters.iter().filter(|(_, count)| *count > 0) {
        let _ = writeln!(text, "{indent}{name:<28}{count:>16}");
    }
}

/// The report of the VM, with how many accesses no device answered.
#[must_use]
pub fn vm_report(stats: Option<&Stats<VmStats>>, unclaimed: &str) -> String {
    let mut text = String::new();
    match stats {
        Some(Stats::Axvcpu(stats)) => {
            let _ = writeln!(
                text,
                "memory: {} pages of 4 KiB and {} of 2 MiB mapped, {} table pages, {} faults, {} invalidations, {} shoot-downs",
                stats.pages_4k, stats.pages_2m, stats.table_pages, stats.faults, stats.invalidations, stats.shootdowns
            );
        }
        Some(Stats::Kvm(counters)) => named(&mut text, "KVM's counters of the VM", "  ", counters),
        None => {}
    }
    let _ = writeln!(text, "accesses that no device answered: {unclaimed}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_lists_counts_by_size() {
        let counters = Counters::default();
        counters.count(UserExit::Mmio);
        for _ in 0..3 {
            counters.count(UserExit::PortWrite);
        }
        assert_eq!(
            vcpu_report(0, None, &counters),
            "vCPU 0\n  exits to axvmm: 4\n    port-write                 3\n    mmio                       1\n"
        );
        let mut kernel = VcpuStats { entries: 9, ..VcpuStats::default() };
        kernel.exits[ExitKind::Cpuid as usize] = 5;
        let kernel = Stats::Axvcpu(kernel);
        let report = vcpu_report(1, Some(&kernel), &counters);
        assert!(report.starts_with("vCPU 1: 0 runs, 0 windows, 9 entries") && report.contains("cpuid"), "{report}");
    }

    #[test]
    fn counters_of_kvm_keep_their_names() {
        let kvm = vec![("exits".to_owned(), 12), ("nmi_injections".to_owned(), 0)];
        let report = vcpu_report(2, Some(&Stats::Kvm(kvm.clone())), &Counters::default());
        assert!(report.starts_with("vCPU 2\n  KVM's counters:\n    exits "), "{report}");
        assert!(!report.contains("nmi"), "{report}");
        assert!(vm_report(Some(&Stats::Kvm(kvm)), "0").starts_with("KVM's counters of the VM:\n  exits "));
    }

    #[test]
    fn counters_have_a_place_for_every_kind() {
        let counters = Counters::default();
        for kind in UserExit::ALL {
            counters.count(*kind);
            assert_eq!(counters.get(*kind), 1, "{}", kind.name());
        }
    }
}
