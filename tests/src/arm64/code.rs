// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest code for AArch64, assembled together with the tests.

/// The bytes of a piece of guest code: `code!(name, "instruction", ...)`, where `name` is unique in the module. Local labels
/// are numbers. Only position-independent code can be written, as the assembler does not know the guest's addresses.
#[macro_export]
macro_rules! code {
    ($name:ident, $($line:literal),+ $(,)?) => {{
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
