// SPDX-License-Identifier: MIT OR Apache-2.0
//! A number of bytes in the configuration: an integer, or a string such as `"512M"`.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, Visitor};

/// A number of bytes. Suffixes K, M, G, T (also as `KiB`, `MiB`, ...) are powers of 1024; a string may be hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Size(pub(super) u64);

impl Size {
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        if let Some(hex) = text.strip_prefix("0x") {
            return u64::from_str_radix(&hex.replace('_', ""), 16).ok().map(Size);
        }
        let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '_')).unwrap_or(text.len());
        let (number, suffix) = text.split_at(digits);
        let number: u64 = number.replace('_', "").parse().ok()?;
        let shift = match suffix.trim_start() {
            "" | "B" => 0,
            "K" | "k" | "KiB" => 10,
            "M" | "m" | "MiB" => 20,
            "G" | "g" | "GiB" => 30,
            "T" | "t" | "TiB" => 40,
            _ => return None,
        };
        number.checked_mul(1 << shift).map(Size)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size: a number of bytes, or a string such as \"512M\"")
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Size, E> {
                u64::try_from(value).map(Size).map_err(|_| E::invalid_value(de::Unexpected::Signed(value), &self))
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Size, E> {
                Ok(Size(value))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Size, E> {
                Size::parse(value).ok_or_else(|| E::invalid_value(de::Unexpected::Str(value), &self))
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

/// Shows a size the way people write it: in the largest unit that leaves a whole number.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("0 bytes"),
            n if n % (1 << 30) == 0 => write!(f, "{} GiB", n >> 30),
            n if n % (1 << 20) == 0 => write!(f, "{} MiB", n >> 20),
            n if n % (1 << 10) == 0 => write!(f, "{} KiB", n >> 10),
            n if n >= 10 << 20 => write!(f, "{:.1} MiB", n as f64 / f64::from(1 << 20)),
            n => write!(f, "{n} bytes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, value) in [
            ("0", 0),
            ("4096", 4096),
            ("4_096", 4096),
            ("0x1000", 4096),
            ("512M", 512 << 20),
            ("512 MiB", 512 << 20),
            ("3G", 3 << 30),
            ("64k", 64 << 10),
            ("1T", 1 << 40),
        ] {
            assert_eq!(Size::parse(text), Some(Size(value)), "{text}");
        }
        for text in ["", "M", "1Q", "1.5G", "-1", "0x", "16777216T", "1 2"] {
            assert_eq!(Size::parse(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_in_whole_units() {
        for (value, text) in
            [(0, "0 bytes"), (1000, "1000 bytes"), (1024, "1 KiB"), (640 << 10, "640 KiB"), (1 << 30, "1 GiB")]
        {
            assert_eq!(Bytes(value).to_string(), text);
        }
        assert_eq!(Bytes((100 << 20) + 1).to_string(), "100.0 MiB");
    }
}
