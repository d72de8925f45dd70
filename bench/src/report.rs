// SPDX-License-Identifier: MIT OR Apache-2.0
//! From lines of results to a table in Markdown.
//!
//! A line is made of fields with tabs between: `bench`, hypervisor, row, samples; `failed`, hypervisor, row, reason; `fact`,
//! key, value; `note`, a remark; and `lab`, name, for what follows. Several lines of samples for the same thing are taken
//! together.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;

use crate::machine::{Hypervisor, Result};
use crate::measure::median;
use crate::rows::Row;

/// Ticks that are none: less than an instruction, or less than the loop around it varies by.
const NOTHING: f64 = 2.0;

/// A line of samples.
pub(crate) fn line(hypervisor: Hypervisor, row: Row, samples: &[f64]) -> String {
    let samples: Vec<String> = samples.iter().map(|sample| format!("{sample:.1}")).collect();
    format!("bench\t{}\t{}\t{}", key(hypervisor), key(row), samples.join(" "))
}

/// A line for a row that could not be measured.
pub(crate) fn failure(hypervisor: Hypervisor, row: Row, why: &str) -> String {
    format!("failed\t{}\t{}\t{}", key(hypervisor), key(row), why.replace(['\t', '\n'], " "))
}

/// A line about the host.
pub(crate) fn fact(key: &str, value: &str) -> String {
    format!("fact\t{key}\t{value}")
}

/// The word for a value on the command line, which lines use too.
pub(crate) fn key(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// What was found out in one lab.
#[derive(Default)]
struct Lab {
    name: String,
    facts: Vec<(String, String)>,
    samples: BTreeMap<(Row, Hypervisor), Vec<f64>>,
    failures: BTreeMap<(Row, Hypervisor), String>,
    notes: Vec<String>,
}

impl Lab {
    /// From its lines; any other lines are somebody else's.
    fn parse(text: &str) -> Self {
        let mut lab = Self::default();
        for line in text.lines() {
            let mut fields = line.splitn(4, '\t');
            match [fields.next(), fields.next(), fields.next(), fields.next()] {
                [Some("lab"), Some(name), None, None] => lab.name = name.to_owned(),
                [Some("note"), Some(note), None, None] => lab.notes.push(note.to_owned()),
                [Some("fact"), Some(key), Some(value), None] => lab.facts.push((key.to_owned(), value.to_owned())),
                [Some("bench"), Some(hypervisor), Some(row), Some(samples)] => {
                    if let Some(place) = place(row, hypervisor) {
                        let samples = samples.split(' ').filter_map(|sample| sample.parse::<f64>().ok());
                        lab.samples.entry(place).or_default().extend(samples);
                    }
                }
                [Some("failed"), Some(hypervisor), Some(row), Some(why)] => {
                    if let Some(place) = place(row, hypervisor) {
                        lab.failures.insert(place, why.to_owned());
                    }
                }
                _ => {}
            }
        }
        lab
    }

    /// The median of a row.
    fn figure(&self, row: Row, hypervisor: Hypervisor) -> Option<f64> {
        median(self.samples.get(&(row, hypervisor))?)
    }

    /// Median and spread for the table, that it failed, or a dash.
    fn cell(&self, row: Row, hypervisor: Hypervisor) -> String {
        let nothing = if self.failures.contains_key(&(row, hypervisor)) { "failed" } else { "–" };
        let Some(samples) = self.samples.get(&(row, hypervisor)) else { return nothing.to_owned() };
        let Some(middle) = median(samples) else { return nothing.to_owned() };
        let low = samples.iter().copied().fold(f64::INFINITY, f64::min);
        let high = samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if grouped(low) == grouped(high) {
            grouped(middle)
        } else {
            format!("{} ({} to {})", grouped(middle), grouped(low), grouped(high))
        }
    }

    /// axvcpu's part of KVM's figure. There is none where KVM needs nothing, as no exit does.
    fn ratio(&self, row: Row) -> Option<f64> {
        let (ours, kvm) = (self.figure(row, Hypervisor::Axvcpu)?, self.figure(row, Hypervisor::Kvm)?);
        (kvm >= NOTHING).then(|| ours / kvm)
    }

    /// Whether a row meets its target, if it has one and both sides. Where axvcpu needs nothing it does, and where only KVM
    /// does not it cannot.
    fn meets(&self, row: Row) -> Option<bool> {
        let limit = row.target().limit()?;
        let ours = self.figure(row, Hypervisor::Axvcpu)?;
        self.figure(row, Hypervisor::Kvm)?;
        Some(ours < NOTHING || self.ratio(row).is_some_and(|ratio| ratio <= limit))
    }

    /// Rows of which something is known.
    fn rows(&self) -> impl Iterator<Item = Row> + '_ {
        let known = |row| {
            [Hypervisor::Axvcpu, Hypervisor::Kvm].into_iter().any(|hypervisor| {
                self.samples.contains_key(&(row, hypervisor)) || self.failures.contains_key(&(row, hypervisor))
            })
        };
        Row::ALL.iter().copied().filter(move |&row| known(row))
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "## {}\n", self.name)?;
        for (key, value) in &self.facts {
            writeln!(out, "- {key}: {value}")?;
        }
        writeln!(out, "\n| | axvcpu | KVM | ratio | target | |\n|---|---:|---:|---:|:---:|---|")?;
        for row in self.rows() {
            let ratio = self.ratio(row).map_or_else(String::new, |ratio| format!("{ratio:.2}"));
            let verdict = match self.meets(row) {
                Some(true) => "met",
                Some(false) => "**missed**",
                None => "",
            };
            let (ours, kvm) = (self.cell(row, Hypervisor::Axvcpu), self.cell(row, Hypervisor::Kvm));
            writeln!(out, "| {} | {ours} | {kvm} | {ratio} | {} | {verdict} |", row.title(), row.target().sign())?;
        }
        writeln!(out)?;
        for ((row, hypervisor), why) in &self.failures {
            writeln!(out, "- {}, {}: {why}", hypervisor.name(), row.title())?;
        }
        for note in &self.notes {
            writeln!(out, "- {note}")?;
        }
        if !self.failures.is_empty() || !self.notes.is_empty() {
            writeln!(out)?;
        }
        Ok(())
    }
}

fn place(row: &str, hypervisor: &str) -> Option<(Row, Hypervisor)> {
    Some((Row::from_str(row, false).ok()?, Hypervisor::from_str(hypervisor, false).ok()?))
}

/// A whole number with a comma between each three digits.
fn grouped(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index != 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    if value.round() < 0.0 {
        text.insert(0, '-');
    }
    text
}

/// Prints the tables of all labs.
///
/// # Errors
/// A file that cannot be read, or that has no result.
pub(crate) fn print(files: &[PathBuf], strict: bool) -> Result<ExitCode> {
    let mut out = String::new();
    let mut missed = false;
    for file in files {
        let text = fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        let lab = Lab::parse(&text);
        if lab.samples.is_empty() {
            return Err(format!("{} has no results", file.display()).into());
        }
        missed |= lab.rows().any(|row| lab.meets(row) == Some(false));
        lab.write(&mut out)?;
    }
    print!("{out}");
    Ok(if strict && missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_grouped() {
        for (value, text) in [(0.0, "0"), (999.4, "999"), (1000.0, "1,000"), (-1234567.0, "-1,234,567"), (-0.3, "0")] {
            assert_eq!(grouped(value), text);
        }
    }

    #[test]
    fn lines_come_back_as_a_table() {
        let lines = [
            "lab\tBochs".to_owned(),
            "a word of somebody else".to_owned(),
            fact("kernel", "7.3"),
            line(Hypervisor::Axvcpu, Row::Cpuid, &[300.0, 310.0]),
            line(Hypervisor::Axvcpu, Row::Cpuid, &[320.0]),
            line(Hypervisor::Kvm, Row::Cpuid, &[900.0]),
            line(Hypervisor::Axvcpu, Row::Out, &[600.0]),
            line(Hypervisor::Kvm, Row::Out, &[1000.0]),
            failure(Hypervisor::Axvcpu, Row::Irqfd, "no\tsuch thing"),
        ];
        let lab = Lab::parse(&lines.join("\n"));
        assert_eq!((lab.meets(Row::Cpuid), lab.meets(Row::Out), lab.meets(Row::In)), (Some(false), Some(false), None));
        let mut out = String::new();
        lab.write(&mut out).unwrap();
        for text in [
            "## Bochs\n",
            "- kernel: 7.3\n",
            "| CPUID, leaf 1 | 310 (300 to 320) | 900 | 0.34 | ⅓ | **missed** |\n",
            "| OUT to userspace and back | 600 | 1,000 | 0.60 | ½ | **missed** |\n",
            "- axvcpu, the same, woken by an irqfd: no such thing\n",
        ] {
            assert!(out.contains(text), "{text:?} is not in {out}");
        }
    }

    #[test]
    fn no_exit_at_all_is_the_best() {
        let lab = |ours, kvm| Lab::parse(&format!("bench\taxvcpu\teoi\t{ours}\nbench\tkvm\teoi\t{kvm}"));
        for (ours, kvm, meets) in [("0", "0", true), ("-0.1", "0.0", true), ("700", "0", false), ("0", "700", true)] {
            assert_eq!(lab(ours, kvm).meets(Row::Eoi), Some(meets), "{ours} and {kvm}");
        }
        assert_eq!(lab("0", "0").ratio(Row::Eoi), None);
    }

    #[test]
    fn what_failed_is_told() {
        let text = "failed\tkvm\tout\tit crashed\nbench\taxvcpu\tout\t5\nnote\tthe second turn is missing";
        let mut out = String::new();
        Lab::parse(text).write(&mut out).unwrap();
        for text in [
            "| 5 | failed |  | ½ |  |\n",
            "- KVM, OUT to userspace and back: it crashed\n- the second turn is missing\n",
        ] {
            assert!(out.contains(text), "{text:?} is not in {out}");
        }
    }

    #[test]
    fn a_third_is_a_third() {
        let lab = |ours| Lab::parse(&format!("bench\taxvcpu\tcpuid\t{ours}\nbench\tkvm\tcpuid\t900"));
        assert_eq!(lab("300").meets(Row::Cpuid), Some(true));
        assert_eq!(lab("301").meets(Row::Cpuid), Some(false));
    }
}
