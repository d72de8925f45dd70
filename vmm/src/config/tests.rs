// SPDX-License-Identifier: MIT OR Apache-2.0
//! Good configurations, and a table of bad ones with class, place and words of the message.

use super::*;
use crate::arch::{self, layout};

const PATH: &str = "/vms/demo/vm.toml";

fn parse(text: &str) -> Result<VmConfig, ConfigError> {
    VmConfig::parse(Path::new(PATH), text)
}

#[test]
fn a_full_configuration() {
    let base = layout::RAM_START;
    let text = format!(
        r#"
        [base]
        id = 7
        name = "demo"
        hypervisor = "kvm"
        cpu_num = 3
        phys_cpu_sets = [0x3, 1, 0x8000_0000]
        [kernel]
        kernel_path = "vmlinuz"
        ramdisk_path = "/boot/initrd"
        cmdline = "console=ttyS0 quiet"
        memory_regions = [ {{ base = 0x1_0000_0000, size = "1G" }}, {{ base = {base}, size = 0x800_0000 }} ]
        modules = [ {{ path = "../m", cmdline = "x y" }} ]
        [devices]
        serial = {{ file = "log" }}
        "#,
    );
    let config = parse(&text).unwrap();
    assert_eq!((config.id, config.name.as_str()), (7, "demo"));
    assert_eq!(config.hypervisor, Hypervisor::Kvm);
    assert_eq!(config.vcpus, [Some(3), Some(1), Some(1 << 31)]);
    assert_eq!(config.memory, [MemoryRegion { base, size: 128 << 20 }, MemoryRegion { base: 4 << 30, size: 1 << 30 }]);
    assert_eq!(config.memory_size(), (128 << 20) + (1 << 30));
    assert_eq!(config.kernel.path, Path::new("/vms/demo/vmlinuz"));
    assert_eq!(config.kernel.ramdisk.as_deref(), Some(Path::new("/boot/initrd")));
    assert_eq!(config.kernel.modules[0].path, Path::new("/vms/demo/../m"));
    assert_eq!(config.devices.serial, SerialConfig::File("/vms/demo/log".into()));
}

#[test]
fn debug_devices_are_for_machines_with_ports() {
    let kernel = "[kernel]\nkernel_path = \"k\"\nmemory = \"64M\"\n";
    let text = format!("{kernel}[devices.debug_exit]\nport = 0x501\n[devices.debug_console]");
    if arch::HAS_PORTS {
        let devices = parse(&text).unwrap().devices;
        assert_eq!((devices.debug_exit, devices.debug_console), (Some(0x501), Some(0xe9)));
    } else {
        let error = parse(&text).unwrap_err();
        assert_eq!((error.problem, error.position()), (Problem::Unsupported, Some((4, 1))), "{error}");
    }
}

#[test]
fn what_is_left_out_has_a_default() {
    let config = parse("[kernel]\nkernel_path = \"k\"\nmemory = \"512M\"").unwrap();
    assert_eq!(config.hypervisor, Hypervisor::Axvcpu);
    assert_eq!(config.vcpus, [None]);
    assert_eq!(config.kernel.cmdline, "");
    assert_eq!(config.devices, DeviceConfig::default());
    assert_eq!(config.devices.serial, SerialConfig::Stdio);
}

#[test]
fn raw_binaries() {
    let raw = "[kernel]\nkernel_path = \"k\"\nmemory = 2097152\nentry_point = 0x8000\n";
    let kernel = parse(raw).unwrap().kernel;
    assert_eq!((kernel.entry_point, kernel.load_addr), (Some(0x8000), None));
    let long = parse(&format!("{raw}entry_mode = \"long\""));
    if arch::HAS_MODES {
        assert_eq!(long.unwrap().kernel.entry_mode, EntryMode::Long);
    } else {
        assert_eq!(long.unwrap_err().problem, Problem::Unsupported);
    }
}

/// The `[kernel]` table with more in it.
fn kernel(rest: &str) -> String {
    format!("[kernel]\nkernel_path = \"k\"\n{rest}")
}

/// A configuration, its problem, where that is, and words of the message.
type Case<'a> = (String, Problem, Option<(usize, usize)>, &'a str);

#[test]
fn bad_configurations() {
    // As long on every architecture, so that the places are the same.
    let start = format!("{:#010x}", layout::RAM_START);
    let cases: &[Case<'_>] = &[
        ("[kernel\n".into(), Problem::Syntax, Some((1, 8)), "not valid TOML"),
        (kernel("memory = \"1G\"\nmemory = \"2G\""), Problem::Syntax, Some((4, 1)), "duplicate"),
        (kernel("cmdlin = \"x\""), Problem::UnknownKey, Some((3, 1)), "unknown key `cmdlin`"),
        (kernel("memory = \"1G\"\n[device]"), Problem::UnknownKey, Some((4, 2)), "`device`"),
        (kernel("memory = \"1G\"\n[devices]\nnet = 1"), Problem::UnknownKey, Some((5, 1)), "`net`"),
        (kernel("memory = true"), Problem::Type, Some((3, 10)), "a size"),
        (kernel("memory = \"1Q\""), Problem::Type, Some((3, 10)), "a size"),
        (kernel("memory = -1"), Problem::Type, Some((3, 10)), "a size"),
        (kernel("cmdline = 5"), Problem::Type, Some((3, 11)), "string"),
        (kernel("memory = \"1G\"\n[base]\ncpu_num = \"two\""), Problem::Type, Some((5, 11)), "u32"),
        (kernel("memory = \"1G\"\n[base]\nhypervisor = \"xen\""), Problem::Type, Some((5, 14)), "`axvcpu` or `kvm`"),
        (kernel("memory = \"1G\"\n[devices]\nserial = \"tty\""), Problem::Type, Some((5, 10)), "`stdio`"),
        (kernel("memory = \"1G\"\n[devices.debug_exit]\nport = 70000"), Problem::Type, Some((5, 8)), "u16"),
        ("[base]\nid = 1".into(), Problem::Type, Some((1, 1)), "missing key `kernel`"),
        ("[kernel]\nmemory = \"1G\"".into(), Problem::Type, Some((1, 1)), "missing key `kernel_path`"),
        (kernel(""), Problem::Type, None, "neither memory nor memory_regions"),
        (kernel("memory = \"64K\""), Problem::MemoryTooSmall, Some((3, 10)), "64 KiB of memory is too small"),
        (kernel("memory = 0"), Problem::MemoryTooSmall, Some((3, 10)), "too small"),
        (kernel("memory = 10000001"), Problem::Value, Some((3, 10)), "multiple of 4096"),
        (kernel("memory = \"64T\""), Problem::Value, Some((3, 10)), "more than a guest can have"),
        (kernel("memory_regions = []"), Problem::MemoryTooSmall, Some((3, 18)), "too small"),
        (
            kernel(&format!(
                "memory_regions = [{{ base = {start}, size = \"2M\" }}, {{ base = {start}, size = \"4M\" }}]"
            )),
            Problem::MemoryOverlap,
            Some((3, 55)),
            "overlaps another region, 0x",
        ),
        (
            kernel("memory_regions = [{ base = 0x48000000, size = \"4M\" }]"),
            Problem::MemoryTooSmall,
            Some((3, 18)),
            "has to be at address 0x",
        ),
        (
            kernel(&format!(
                "memory_regions = [{{ base = {start}, size = \"2M\" }}, {{ base = 0x7ffffffffffff000, size = \"1T\" }}]"
            )),
            Problem::Value,
            Some((3, 55)),
            "has to end below",
        ),
        (
            kernel("memory = \"1G\"\nmemory_regions = [{ base = 0, size = \"1G\" }]"),
            Problem::Value,
            Some((4, 18)),
            "not both",
        ),
        (kernel("memory = \"1G\"\n[base]\ncpu_num = 0"), Problem::Value, Some((5, 11)), "at least one CPU"),
        (kernel("memory = \"1G\"\n[base]\ncpu_num = 65"), Problem::Unsupported, Some((5, 11)), "64 CPUs at most"),
        (kernel("memory = \"1G\"\n[base]\nphys_cpu_sets = [1, 2]"), Problem::Value, Some((5, 17)), "1 expected, 2"),
        (kernel("memory = \"1G\"\n[base]\nphys_cpu_sets = [0]"), Problem::Value, Some((5, 17)), "without any"),
        (kernel("memory = \"1G\"\n[base]\nname = \"\""), Problem::Value, Some((5, 8)), "1 to 64"),
        (kernel("memory = \"1G\"\ncmdline = \"a\\u0000b\""), Problem::Value, Some((4, 11)), "NUL"),
        (
            kernel(&format!("memory = \"1G\"\ncmdline = \"{}\"", "x".repeat(4096))),
            Problem::Value,
            Some((4, 11)),
            "4096 bytes; 4095",
        ),
        ("[kernel]\nkernel_path = \"\"\nmemory = \"1G\"".into(), Problem::Value, Some((2, 15)), "empty path"),
    ];
    refuse(cases);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn bad_configurations_of_a_pc() {
    refuse(&[
        (
            kernel("memory_regions = [{ base = 0, size = \"4G\" }]"),
            Problem::MemoryOverlap,
            Some((3, 19)),
            "overlaps the devices",
        ),
        (kernel("memory = \"1G\"\nentry_mode = \"real\""), Problem::Value, Some((4, 14)), "need an entry_point"),
        (kernel("memory = \"1G\"\nentry_point = 0x1_0000_0000"), Problem::Value, Some((4, 15)), "0xffffffff at most"),
        (
            kernel("memory = \"1G\"\n[devices.debug_exit]\nport = 0x3f9"),
            Problem::Value,
            Some((5, 8)),
            "belongs to COM1",
        ),
        (
            kernel("memory = \"1G\"\n[devices.debug_exit]\n[devices.debug_console]\nport = 0xf5"),
            Problem::Value,
            Some((6, 8)),
            "overlaps debug_exit",
        ),
    ]);
}

#[cfg(target_arch = "aarch64")]
#[test]
fn bad_configurations_of_a_board() {
    refuse(&[
        (
            kernel("memory_regions = [{ base = 0, size = \"2G\" }]"),
            Problem::MemoryOverlap,
            Some((3, 19)),
            "overlaps the devices",
        ),
        (
            kernel("memory = \"1G\"\nentry_point = 0x4000_0000\nentry_mode = \"real\""),
            Problem::Unsupported,
            Some((5, 14)),
            "one mode",
        ),
        (
            kernel("memory = \"1G\"\n[devices.debug_console]\nport = 0xe9"),
            Problem::Unsupported,
            Some((4, 1)),
            "which arm64 has not",
        ),
    ]);
}

fn refuse(cases: &[Case<'_>]) {
    for (text, problem, position, words) in cases {
        let error = parse(text).expect_err(text);
        let shown = error.to_string();
        assert_eq!(error.problem, *problem, "{text}\n{shown}");
        assert_eq!(error.position(), *position, "{text}\n{shown}");
        assert!(shown.contains(words), "{text}\n{shown}");
        assert!(shown.starts_with(PATH), "{shown}");
    }
}

#[test]
fn unreadable_files() {
    let folder = tempfile::tempdir().unwrap();
    let missing = VmConfig::load(&folder.path().join("none.toml")).unwrap_err();
    assert_eq!(missing.problem, Problem::Unreadable);
    assert!(missing.to_string().contains("there is no such file"), "{missing}");
    let directory = VmConfig::load(folder.path()).unwrap_err();
    assert!(directory.to_string().contains("directory"), "{directory}");
    let binary = folder.path().join("binary.toml");
    fs::write(&binary, [0xff, 0xfe, 0]).unwrap();
    assert!(VmConfig::load(&binary).unwrap_err().to_string().contains("not UTF-8"));
}
