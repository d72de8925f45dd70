// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest code, assembled together with the tests.

/// The bytes that the lines of assembly make, which `code!` completes for the architecture. `name` is unique in the module.
#[doc(hidden)]
#[macro_export]
macro_rules! assembled {
    ($name:ident, $($line:expr),+) => {{
        mod $name {
            core::arch::global_asm!(
                ".pushsection .rodata.guest, \"a\", @progbits",
                ".balign 4",
                concat!("\"", module_path!(), "::start\":"),
                $($line,)+
                concat!("\"", module_path!(), "::end\":"),
                ".popsection",
            );
            extern "C" {
                #[link_name = concat!(module_path!(), "::start")]
                pub(super) static START: u8;
                #[link_name = concat!(module_path!(), "::end")]
                pub(super) static END: u8;
            }
        }
        // SAFETY: both symbols are defined above, in one piece of read-only data, END not before START.
        let bytes: &'static [u8] = unsafe {
            let (start, end) = (&raw const $name::START, &raw const $name::END);
            core::slice::from_raw_parts(start, end.offset_from(start) as usize)
        };
        bytes
    }};
}

/// The bytes of a piece of guest code: `code!(name, bits, "instruction", ...)`, where `name` is unique in the module
/// and `bits` is 16, 32 or 64.
///
/// The code begins at the label `77`; `.org 77b + 0x100` continues at offset 0x100. Further local labels are numbers
/// made of the digits 2 to 9 (in Intel syntax `0b` and `1b` are binary numbers). Only position-independent code can be
/// written, as the assembler does not know the guest's addresses.
#[cfg(target_arch = "x86_64")]
#[macro_export]
macro_rules! code {
    ($name:ident, $bits:literal, $($line:literal),+ $(,)?) => {
        $crate::assembled!($name, "77:", concat!(".code", $bits), $($line,)+ ".code64")
    };
}

/// The bytes of a piece of guest code: `code!(name, "instruction", ...)`, where `name` is unique in the module. Local labels
/// are numbers. Only position-independent code can be written, as the assembler does not know the guest's addresses.
#[cfg(target_arch = "aarch64")]
#[macro_export]
macro_rules! code {
    ($name:ident, $($line:literal),+ $(,)?) => {
        $crate::assembled!($name, $($line),+)
    };
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    #[test]
    fn code_is_assembled_for_its_mode() {
        assert_eq!(code!(real, 16, "mov eax, 1", "hlt"), [0x66, 0xb8, 1, 0, 0, 0, 0xf4]);
        assert_eq!(code!(long, 64, "mov rax, rbx", ".org 77b + 4", "2: jmp 2b"), [0x48, 0x89, 0xd8, 0, 0xeb, 0xfe]);
    }
}
