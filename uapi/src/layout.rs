// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! How an ABI structure is declared: the only way to implement [`AbiStruct`] is the macro below, which refuses padding,
//! field types that are not plain integers, and a size other than the one written down.

/// A structure of the ABI: `#[repr(C)]`, made of integers only, without padding, valid for every bit pattern.
///
/// The trait is sealed: `abi_struct!`, which checks all of this at compile time, is its only implementer. Code that
/// moves such structures as bytes between address spaces may rely on it.
pub trait AbiStruct: Copy + sealed::Field + 'static {
    /// The structure with every field zero.
    const ZERO: Self;
    /// Size in bytes.
    const SIZE: usize;
}

pub(crate) mod sealed {
    /// What may be a field: an integer, an array of fields, or another ABI structure.
    pub trait Field: Copy {}
    impl Field for u8 {}
    impl Field for u16 {}
    impl Field for u32 {}
    impl Field for i32 {}
    impl Field for u64 {}
    impl<T: Field, const N: usize> Field for [T; N] {}
}

/// Zero for every field type, usable in constants.
pub(crate) trait Zero {
    const ZERO: Self;
}
impl Zero for u8 {
    const ZERO: Self = 0;
}
impl Zero for u16 {
    const ZERO: Self = 0;
}
impl Zero for u32 {
    const ZERO: Self = 0;
}
impl Zero for i32 {
    const ZERO: Self = 0;
}
impl Zero for u64 {
    const ZERO: Self = 0;
}
impl<T: Zero + Copy, const N: usize> Zero for [T; N] {
    const ZERO: Self = [T::ZERO; N];
}

/// Declares an ABI structure and asserts its layout: `abi_struct! { /// doc pub struct Name: 24 { /// doc pub a: u64, ... } }`
/// where 24 is the size in bytes.
macro_rules! abi_struct {
    ($(#[$meta:meta])* pub struct $name:ident: $size:literal { $($(#[$fmeta:meta])* pub $field:ident: $ty:ty,)+ }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty,)+ }

        impl $crate::layout::sealed::Field for $name {}
        impl $crate::layout::Zero for $name {
            const ZERO: Self = Self { $($field: <$ty as $crate::layout::Zero>::ZERO,)+ };
        }
        impl $crate::layout::AbiStruct for $name {
            const ZERO: Self = <Self as $crate::layout::Zero>::ZERO;
            const SIZE: usize = $size;
        }
        impl Default for $name {
            fn default() -> Self {
                <Self as $crate::layout::AbiStruct>::ZERO
            }
        }
        const _: () = {
            const fn is_field<T: $crate::layout::sealed::Field>() {}
            $(is_field::<$ty>();)+
            assert!(core::mem::size_of::<$name>() == $size, "size differs from the ABI");
            assert!(0 $(+ core::mem::size_of::<$ty>())+ == $size, "implicit padding");
            assert!($size % 8 == 0, "size is not a multiple of 8: layout would depend on the architecture");
        };
    };
}
pub(crate) use abi_struct;
