// SPDX-License-Identifier: MIT OR Apache-2.0
//! What makes sense in a configuration, and what does not.

use std::path::{Path, PathBuf};

use toml::Spanned;

use super::size::{Bytes, Size};
use super::{
    raw, ConfigError, DeviceConfig, EntryMode, KernelConfig, MemoryRegion, ModuleConfig, Problem, SerialConfig,
    VmConfig, MAX_CMDLINE,
};
use crate::arch::{self, layout};

/// vCPUs that a configuration may ask for: as many as the module runs in a VM.
const MAX_VCPUS: u32 = 64;

/// Where guest physical addresses end: 46 bits, which every supported CPU has.
const MAX_ADDRESS: u64 = 1 << 46;

/// Everything a check needs to complain.
pub(super) struct Checker<'a> {
    pub(super) path: &'a Path,
    pub(super) text: &'a str,
    pub(super) folder: &'a Path,
}

impl Checker<'_> {
    fn error<T>(&self, problem: Problem, at: &Spanned<T>, message: impl Into<String>) -> ConfigError {
        ConfigError::new(problem, self.path, message).at(self.text, at.span())
    }

    pub(super) fn check(&self, file: raw::File) -> Result<VmConfig, ConfigError> {
        let raw::File { base, kernel, devices } = file;
        let memory = self.memory(&kernel)?;
        Ok(VmConfig {
            id: base.id,
            name: self.name(base.name.as_ref())?,
            hypervisor: base.hypervisor,
            vcpus: self.vcpus(&base)?,
            memory,
            kernel: self.kernel(kernel)?,
            devices: self.devices(&devices)?,
        })
    }

    fn name(&self, name: Option<&Spanned<String>>) -> Result<String, ConfigError> {
        let Some(spanned) = name else { return Ok("vm".into()) };
        let name = spanned.as_ref();
        if name.is_empty() || name.len() > 64 || name.chars().any(char::is_control) {
            return Err(self.error(Problem::Value, spanned, "a name has 1 to 64 printable characters"));
        }
        Ok(name.clone())
    }

    fn vcpus(&self, base: &raw::Base) -> Result<Vec<Option<u64>>, ConfigError> {
        let count = base.cpu_num.as_ref().map_or(1, |spanned| *spanned.as_ref());
        if let Some(spanned) = &base.cpu_num {
            if count == 0 {
                return Err(self.error(Problem::Value, spanned, "a VM has at least one CPU"));
            }
            if count > MAX_VCPUS {
                let message = format!("a VM has {MAX_VCPUS} CPUs at most");
                return Err(self.error(Problem::Unsupported, spanned, message));
            }
        }
        let Some(spanned) = &base.phys_cpu_sets else { return Ok(vec![None; count as usize]) };
        let sets = spanned.as_ref();
        if sets.len() != count as usize {
            let message = format!("one set of host CPUs per CPU of the guest: {count} expected, {} found", sets.len());
            return Err(self.error(Problem::Value, spanned, message));
        }
        if sets.contains(&0) {
            return Err(self
                .error(Problem::Value, spanned, "a set without any host CPU")
                .cure("Bit n of a set stands for host CPU n: 0x1 is CPU 0, 0x3 is CPUs 0 and 1."));
        }
        Ok(sets.iter().copied().map(Some).collect())
    }

    fn memory(&self, kernel: &raw::Kernel) -> Result<Vec<MemoryRegion>, ConfigError> {
        match (&kernel.memory, &kernel.memory_regions) {
            (Some(_), Some(regions)) => {
                Err(self.error(Problem::Value, regions, "give either memory or memory_regions, not both"))
            }
            (None, None) => Err(ConfigError::new(
                Problem::Type,
                self.path,
                "[kernel] says neither memory nor memory_regions: how much memory has the guest?",
            )
            .cure("Add for instance memory = \"512M\".")),
            (Some(size), None) => {
                let bytes = size.as_ref().0;
                self.check_total(size, bytes)?;
                self.check_unit(size, bytes)?;
                Ok(layout::default_regions(bytes))
            }
            (None, Some(regions)) => self.regions(regions),
        }
    }

    fn regions(&self, list: &Spanned<Vec<Spanned<raw::Region>>>) -> Result<Vec<MemoryRegion>, ConfigError> {
        let mut regions: Vec<(MemoryRegion, &Spanned<raw::Region>)> = Vec::new();
        let mut total = 0u64;
        for spanned in list.as_ref() {
            let (base, size) = (spanned.as_ref().base.0, spanned.as_ref().size.0);
            self.check_unit(spanned, base)?;
            self.check_unit(spanned, size)?;
            if size == 0 {
                return Err(self.error(Problem::Value, spanned, "a region of no size"));
            }
            let Some(end) = base.checked_add(size).filter(|end| *end <= MAX_ADDRESS) else {
                let message = format!("guest memory has to end below {MAX_ADDRESS:#x}");
                return Err(self.error(Problem::Value, spanned, message));
            };
            let devices = layout::DEVICE_HOLE;
            if base < devices.end && end > devices.start {
                let message = format!(
                    "memory at {base:#x} to {end:#x} overlaps the devices at {:#x} to {:#x}",
                    devices.start, devices.end
                );
                return Err(self
                    .error(Problem::MemoryOverlap, spanned, message)
                    .cure("Split the region, or write memory = SIZE and leave the layout to axvmm."));
            }
            for (other, _) in &regions {
                if base < other.end() && end > other.base {
                    let message = format!(
                        "memory at {base:#x} to {end:#x} overlaps another region, {:#x} to {:#x}",
                        other.base,
                        other.end()
                    );
                    return Err(self.error(Problem::MemoryOverlap, spanned, message));
                }
            }
            regions.push((MemoryRegion { base, size }, spanned));
            total = total.saturating_add(size);
        }
        self.check_total(list, total)?;
        regions.sort_by_key(|(region, _)| region.base);
        let first = regions.first().map(|(region, _)| *region);
        if first.is_none_or(|region| region.base != layout::RAM_START || region.size < layout::MIN_MEMORY) {
            let message = format!(
                "the first region has to be at address {:#x} and of at least {}",
                layout::RAM_START,
                Bytes(layout::MIN_MEMORY)
            );
            return Err(self.error(Problem::MemoryTooSmall, list, message).cure("Kernels are loaded there."));
        }
        Ok(regions.into_iter().map(|(region, _)| region).collect())
    }

    fn check_total<T>(&self, at: &Spanned<T>, bytes: u64) -> Result<(), ConfigError> {
        if bytes < layout::MIN_MEMORY {
            let message = format!("{} of memory is too small for any guest", Bytes(bytes));
            let cure = format!("At least {} are needed; a Linux guest wants 128M or more.", Bytes(layout::MIN_MEMORY));
            return Err(self.error(Problem::MemoryTooSmall, at, message).cure(cure));
        }
        if bytes > MAX_ADDRESS / 2 {
            return Err(self.error(
                Problem::Value,
                at,
                format!("{} of memory is more than a guest can have", Bytes(bytes)),
            ));
        }
        Ok(())
    }

    fn check_unit<T>(&self, at: &Spanned<T>, value: u64) -> Result<(), ConfigError> {
        if value % 4096 != 0 {
            return Err(self.error(Problem::Value, at, format!("{value:#x} is not a multiple of 4096 bytes")));
        }
        Ok(())
    }

    fn kernel(&self, kernel: raw::Kernel) -> Result<KernelConfig, ConfigError> {
        let address = |value: &Option<Spanned<Size>>| match value {
            Some(spanned) if spanned.as_ref().0 > layout::LAST_ENTRY => {
                let message = format!("a raw binary is loaded and started at {:#x} at most", layout::LAST_ENTRY);
                Err(self.error(Problem::Value, spanned, message))
            }
            Some(spanned) => Ok(Some(spanned.as_ref().0)),
            None => Ok(None),
        };
        let entry_point = address(&kernel.entry_point)?;
        let load_addr = address(&kernel.kernel_load_addr)?;
        if let (false, Some(mode)) = (arch::HAS_MODES, &kernel.entry_mode) {
            return Err(self.error(
                Problem::Unsupported,
                mode,
                format!("on {} the CPU has one mode to start in", arch::NAME),
            ));
        }
        let only_raw = kernel.kernel_load_addr.as_ref().map(Spanned::span);
        let only_raw = only_raw.or_else(|| kernel.entry_mode.as_ref().map(Spanned::span));
        if let (None, Some(span)) = (entry_point, only_raw) {
            return Err(ConfigError::new(
                Problem::Value,
                self.path,
                "this is for raw binaries, which need an entry_point",
            )
            .at(self.text, span));
        }
        Ok(KernelConfig {
            path: self.file(&kernel.kernel_path)?,
            ramdisk: kernel.ramdisk_path.as_ref().map(|path| self.file(path)).transpose()?,
            cmdline: self.cmdline(kernel.cmdline.as_ref())?,
            entry_point,
            load_addr,
            entry_mode: kernel.entry_mode.map_or_else(EntryMode::default, Spanned::into_inner),
            modules: kernel
                .modules
                .iter()
                .map(|module| {
                    Ok(ModuleConfig { path: self.file(&module.path)?, cmdline: self.cmdline(module.cmdline.as_ref())? })
                })
                .collect::<Result<_, ConfigError>>()?,
        })
    }

    fn cmdline(&self, text: Option<&Spanned<String>>) -> Result<String, ConfigError> {
        let Some(spanned) = text else { return Ok(String::new()) };
        let text = spanned.as_ref();
        if text.contains('\0') {
            return Err(self.error(Problem::Value, spanned, "a command line cannot hold a NUL"));
        }
        if text.len() > MAX_CMDLINE {
            let message = format!("the command line has {} bytes; {MAX_CMDLINE} are possible", text.len());
            return Err(self.error(Problem::Value, spanned, message));
        }
        Ok(text.clone())
    }

    fn file(&self, path: &Spanned<PathBuf>) -> Result<PathBuf, ConfigError> {
        if path.as_ref().as_os_str().is_empty() {
            return Err(self.error(Problem::Value, path, "an empty path"));
        }
        Ok(self.folder.join(path.as_ref()))
    }

    fn devices(&self, devices: &raw::Devices) -> Result<DeviceConfig, ConfigError> {
        if let (false, Some(device)) = (arch::HAS_PORTS, devices.debug_exit.as_ref().or(devices.debug_console.as_ref()))
        {
            let message = format!("the debug devices are at I/O ports, which {} has not", arch::NAME);
            return Err(self.error(Problem::Unsupported, device, message));
        }
        let debug_exit = devices.debug_exit.as_ref().map(|device| self.port(device, 0xf4, 4)).transpose()?;
        let debug_console = devices.debug_console.as_ref().map(|device| self.port(device, 0xe9, 1)).transpose()?;
        if let (Some(exit), Some(console)) = (debug_exit, debug_console) {
            if (exit..=exit.saturating_add(3)).contains(&console) {
                let at = [&devices.debug_console, &devices.debug_exit].into_iter().flatten();
                let span = at.filter_map(|device| device.as_ref().port.as_ref()).map(Spanned::span).next();
                let error = ConfigError::new(
                    Problem::Value,
                    self.path,
                    format!("debug_console at port {console:#x} overlaps debug_exit at {exit:#x}, which takes 4 ports"),
                );
                return Err(match span {
                    Some(span) => error.at(self.text, span),
                    None => error,
                });
            }
        }
        Ok(DeviceConfig {
            serial: match &devices.serial {
                None | Some(raw::Serial::Stdio) => SerialConfig::Stdio,
                Some(raw::Serial::Off) => SerialConfig::Off,
                Some(raw::Serial::File(path)) => SerialConfig::File(self.folder.join(path)),
            },
            debug_exit,
            debug_console,
        })
    }

    fn port(&self, device: &Spanned<raw::PortDevice>, default: u16, count: u16) -> Result<u16, ConfigError> {
        let Some(spanned) = &device.as_ref().port else { return Ok(default) };
        let port = *spanned.as_ref();
        if let Some(owner) = layout::port_owner(port, count) {
            return Err(self.error(Problem::Value, spanned, format!("port {port:#x} belongs to {owner}")));
        }
        Ok(port)
    }
}
