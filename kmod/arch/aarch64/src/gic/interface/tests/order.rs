// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Several vCPUs and random operations, in any order.

use super::*;

/// Xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % limit
    }
}

/// vCPUs of the model.
const CPUS: usize = 3;

/// What random operations must never break, whatever their order: an edge is taken once for each time that it was raised
/// since it was taken last, or less, but at least once; a level as long as it is up, and once if it goes down when its end is
/// told; an SPI is on one vCPU at a time. With `mode_1`, what is taken is deactivated later, on any vCPU.
fn survives(seed: u64, steps: usize, mode_1: bool) {
    let gic = distributor();
    let mut random = Random(seed);
    let mut cpus: Vec<Cpu> = (0..CPUS).map(Cpu::new).collect();
    if mode_1 {
        cpus.iter_mut().for_each(|cpu| cpu.interface.vmcr |= EOI_MODE);
    }
    // With `mode_1`: what waits to be deactivated, and who has taken it.
    let mut lowered: Vec<(usize, usize)> = vec![];
    // What is to come once: SPIs, and SGIs of each vCPU.
    let mut spis = [false; INTIDS];
    let mut sgis = [[false; 16]; CPUS];
    let mut woken = [false; CPUS];
    let took = |spis: &mut [bool; INTIDS], sgis: &mut [[bool; 16]; CPUS], cpu: usize, intid: usize| {
        let expected = match intid {
            0..=15 => &mut sgis[cpu][intid],
            _ if intid % 2 == 0 || resampled(intid) => &mut spis[intid],
            _ => return,
        };
        assert!(core::mem::take(expected), "seed {seed}: {intid} came to vCPU {cpu} and nobody has raised it");
    };
    for _ in 0..steps {
        let (number, spi) = (random.below(CPUS), 32 + random.below(12));
        let mut wake = |cpu: usize| woken[cpu] = true;
        match random.below(12) {
            0 | 1 if resampled(spi) && gic.spis[0].line.load(SeqCst) >> (spi - 32) & 1 != 0 => {}
            0 | 1 => {
                spis[spi] |= spi % 2 == 0 || resampled(spi);
                gic.signal(spi, true, &mut wake);
            }
            2 if spi % 4 == 3 => _ = gic.signal(spi, false, &mut wake),
            3 => {
                let sgi = random.below(16);
                sgis[number][sgi] = true;
                gic.send_sgi(0, (1 << number) | (sgi as u64) << 24, 1, &mut wake);
            }
            4 => {
                gic.routes[spi - 32].store(number as u32, SeqCst);
                gic.changed(0, 1 << (spi - 32), &mut wake);
            }
            5 => {
                assign(&gic.spis[0].enabled, 1 << (spi - 32), random.below(3) != 0);
                gic.changed(0, 1 << (spi - 32), &mut wake);
            }
            6 => {
                gic.spis[0].set_priority(spi - 32, 8 * random.below(31) as u8);
                gic.changed(0, 1 << (spi - 32), &mut wake);
            }
            7 => match cpus[number].inside {
                true => {
                    cpus[number].leave(&gic);
                    cpus[number].tell(&gic);
                    cpus[number].asleep = !cpus[number].interface.wants(&gic, number);
                }
                false if !cpus[number].asleep => cpus[number].enter(&gic),
                false => {}
            },
            8 | 9 if cpus[number].inside => {
                if let Some(intid) = cpus[number].acknowledge() {
                    took(&mut spis, &mut sgis, number, intid);
                    let elsewhere = cpus.iter().flat_map(|cpu| &cpu.taken).filter(|(taken, _)| *taken == intid).count();
                    let active = lowered.iter().any(|(other, cpu)| *other == intid && (intid >= 32 || *cpu == number));
                    assert!(intid < 32 || elsewhere == 1, "seed {seed}: {intid} is taken twice");
                    assert!(!active, "seed {seed}: {intid} is taken and has not been deactivated");
                }
            }
            10 if mode_1 && cpus[number].inside && !lowered.is_empty() => {
                let index = random.below(lowered.len());
                let (intid, owner) = lowered[index];
                if intid >= 32 || owner == number {
                    lowered.swap_remove(index);
                    cpus[number].deactivate(&gic, intid);
                    // The others have gone out, and in again, before the guest has gone on.
                    let wake = core::mem::take(&mut cpus[number].notices.wake);
                    for cpu in cpus.iter_mut().filter(|cpu| wake >> cpu.number & 1 != 0) {
                        woken[cpu.number] = true;
                    }
                }
            }
            _ if mode_1 && cpus[number].inside => lowered.extend(cpus[number].lower().map(|intid| (intid, number))),
            _ if cpus[number].inside => _ = cpus[number].end(),
            _ => {}
        }
        // Whoever is told in the guest looks again, as does whoever is asked for maintenance.
        for cpu in &mut cpus {
            // Sooner or later.
            if random.below(2) == 0 && !cpu.notices.is_empty() {
                cpu.tell(&gic);
                woken[cpu.number] = true;
            }
            if cpu.inside && (core::mem::take(&mut woken[cpu.number]) || cpu.wants_maintenance()) {
                cpu.refresh(&gic);
            }
            let wake = core::mem::take(&mut cpu.notices.wake);
            (0..CPUS).filter(|cpu| wake >> cpu & 1 != 0).for_each(|cpu| woken[cpu] = true);
        }
        for cpu in &mut cpus {
            let wants = cpu.interface.wants(&gic, cpu.number);
            if cpu.asleep && core::mem::take(&mut woken[cpu.number]) {
                cpu.asleep = !wants;
            }
            assert!(!cpu.asleep || !wants, "seed {seed}: vCPU {} sleeps on", cpu.number);
        }
    }
    // All lines go down, all is enabled, and everybody works off what there is.
    gic.spis[0].line.store(0, SeqCst);
    (32..INTIDS).filter(|intid| resampled(*intid)).for_each(|intid| spis[intid] = false);
    gic.spis[0].enabled.store(ALL_BITS, SeqCst);
    if mode_1 {
        for cpu in &mut cpus {
            while let Some(intid) = cpu.lower() {
                lowered.push((intid, cpu.number));
            }
        }
        for (intid, owner) in lowered {
            if !cpus[owner].inside {
                cpus[owner].enter(&gic);
            }
            cpus[owner].deactivate(&gic, intid);
        }
    }
    for cpu in &mut cpus {
        cpu.tell(&gic);
        cpu.interface.vmcr &= !EOI_MODE;
    }
    for _ in 0..2 {
        for cpu in &mut cpus {
            for intid in cpu.drain(&gic) {
                took(&mut spis, &mut sgis, cpu.number, intid);
            }
            cpu.leave(&gic);
            cpu.tell(&gic);
        }
    }
    assert!(!spis.contains(&true), "seed {seed}: lost {:?}", spis.iter().position(|lost| *lost));
    assert!(!sgis.as_flattened().contains(&true), "seed {seed}: an SGI is lost");
    for cpu in &cpus {
        assert_eq!(gic.private(cpu.number).unwrap().active.load(SeqCst), 0, "seed {seed}");
        assert_eq!((cpu.interface.held, cpu.interface.active_priorities), ([0; SPI_BANKS], [[0; 4]; 2]), "seed {seed}");
    }
    assert!((32..INTIDS).all(|intid| gic.holder(intid).is_none()), "seed {seed}");
    assert!(gic.spis.iter().all(|bank| bank.active.load(SeqCst) == 0), "seed {seed}");
}

#[test]
#[cfg_attr(miri, ignore = "minutes, of code that has nothing unsafe")]
fn nothing_is_lost_or_invented_in_any_order() {
    for seed in 1..=100u64 {
        let seed = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed);
        survives(seed, 2000, false);
        survives(seed, 2000, true);
    }
}
