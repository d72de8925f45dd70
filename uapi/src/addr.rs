// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Guest addresses as types, so that no bare integer for an address crosses a function.

/// Declares an address type over `u64`: `address! { /// doc Name }`.
#[macro_export]
macro_rules! address {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The address with this numeric value, in bytes.
            pub const fn new(value: u64) -> Self {
                Self(value)
            }
            /// The numeric value, in bytes.
            pub const fn as_u64(self) -> u64 {
                self.0
            }
            /// The address rounded down to a multiple of `align`, a power of two.
            pub const fn align_down(self, align: u64) -> Self {
                Self(self.0 & !align.wrapping_sub(1))
            }
            /// Whether the address is a multiple of `align`, a power of two.
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & align.wrapping_sub(1) == 0
            }
            /// The address `offset` bytes further, or `None` past the end of the 64-bit space.
            #[inline]
            pub const fn checked_add(self, offset: u64) -> Option<Self> {
                match self.0.checked_add(offset) {
                    Some(value) => Some(Self(value)),
                    None => None,
                }
            }
        }
        impl From<u64> for $name {
            fn from(value: u64) -> Self {
                Self(value)
            }
        }
        impl From<$name> for u64 {
            fn from(addr: $name) -> u64 {
                addr.0
            }
        }
        impl ::core::fmt::Debug for $name {
            fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl ::core::fmt::Display for $name {
            fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
        impl ::core::fmt::LowerHex for $name {
            fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                ::core::fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}
address! {
    /// A guest physical address (GPA), in bytes: what the nested page table translates.
    GuestPhysAddr
}
address! {
    /// A guest virtual address (GVA), in bytes: linear on x86, after segmentation.
    GuestVirtAddr
}
