// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the program ends: exit codes, the only list of them. axvmm(1) documents it.
//!
//! Every code is even, because the debug exit device answers `(v << 1) | 1`, which is odd.

/// Declares the codes once, for the enum and for the list.
macro_rules! exit_codes {
    ($($(#[$meta:meta])* $name:ident = $code:literal, $text:literal;)+) => {
        /// Why the program ended. The numbers are stable.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum ExitCode {
            $($(#[$meta])* #[doc = $text] $name = $code,)+
        }

        impl ExitCode {
            /// Every code, ascending.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// What it means, in a few words.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }
        }
    };
}

exit_codes! {
    Shutdown = 0, "the guest switched itself off";
    Usage = 2, "wrong command line";
    Reset = 4, "the guest asked for a reset";
    TripleFault = 6, "the guest crashed with a triple fault";
    CannotContinue = 8, "the guest did something that cannot be emulated";
    EntryFailed = 10, "the CPU refused to run the guest";
    Halted = 12, "the guest halted with interrupts off";
    Quit = 14, "the user ended it with the escape key";
    ConfigUnreadable = 20, "the configuration cannot be read";
    ConfigSyntax = 22, "the configuration is not valid TOML";
    ConfigUnknownKey = 24, "the configuration has an unknown key";
    ConfigType = 26, "the configuration has a value of the wrong type, or lacks a key";
    ConfigValue = 28, "the configuration has a value that makes no sense";
    MemoryTooSmall = 30, "the guest's memory is too small";
    MemoryOverlap = 32, "regions of guest memory overlap";
    ConfigUnsupported = 34, "the configuration asks for something that is not supported";
    ImageUnreadable = 40, "the kernel cannot be read";
    ImageUnknown = 42, "the kernel is not a kernel";
    ImageMalformed = 44, "the kernel is damaged";
    RamdiskUnreadable = 46, "the initial RAM disk or a module cannot be read";
    RamdiskTooLarge = 48, "the initial RAM disk or a module does not fit";
    CmdlineTooLong = 50, "a command line is too long";
    ImageUnsupported = 52, "the kernel and the configuration do not go together";
    NoDevice = 60, "there is no /dev/axvcpu (or /dev/kvm)";
    NoPermission = 62, "no permission to use /dev/axvcpu (or /dev/kvm)";
    InUse = 64, "another hypervisor holds the CPU";
    NoVirtualization = 66, "the CPU cannot virtualize";
    FirmwareDisabled = 68, "the firmware has switched virtualization off";
    AbiMismatch = 70, "axvmm and the hypervisor do not go together";
    NoResources = 72, "the host lacks memory or other resources";
    HostError = 74, "something failed on the host";
    Sandbox = 76, "the sandbox stopped a system call";
}

impl From<ExitCode> for u8 {
    fn from(code: ExitCode) -> u8 {
        code as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_even_distinct_and_leave_signals_alone() {
        let codes: Vec<u8> = ExitCode::ALL.iter().map(|&code| code.into()).collect();
        assert!(codes.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(codes.iter().all(|code| code % 2 == 0 && *code < 125));
    }

    #[test]
    fn manual_lists_every_code() {
        let manual = include_str!("../../docs/axvmm.1");
        for code in ExitCode::ALL {
            let number = format!(".It {}\n", u8::from(*code));
            let Some(at) = manual.find(&number) else { panic!("axvmm(1) lacks exit code {}", u8::from(*code)) };
            let entry = manual[at + number.len()..].to_lowercase();
            assert!(entry.starts_with(&code.meaning().to_lowercase()), "axvmm(1), {code:?}");
        }
    }
}
