// SPDX-License-Identifier: MIT OR Apache-2.0
//! As much of the ACPI machine language as describes a few devices (ACPI 6.5, sections 6.4 and 20.2).
//!
//! Each function returns the bytes of one term; names are four characters.

/// A name segment.
pub(super) type NameSeg = &'static [u8; 4];

/// `Name (name, object)`: DefName.
pub(super) fn name(name: NameSeg, object: &[u8]) -> Vec<u8> {
    [&[0x08], &name[..], object].concat()
}

/// `Scope (\name) { terms }`: DefScope.
pub(super) fn scope(name: NameSeg, terms: &[Vec<u8>]) -> Vec<u8> {
    [vec![0x10], package(&[b"\\", &name[..], &terms.concat()].concat())].concat()
}

/// `Device (name) { terms }`: DefDevice.
pub(super) fn device(name: NameSeg, terms: &[Vec<u8>]) -> Vec<u8> {
    [vec![0x5b, 0x82], package(&[&name[..], &terms.concat()].concat())].concat()
}

/// `Package () { elements }` of at most 255 elements: DefPackage.
pub(super) fn array(elements: &[Vec<u8>]) -> Vec<u8> {
    [vec![0x12], package(&[vec![elements.len() as u8], elements.concat()].concat())].concat()
}

/// An integer constant in its shortest form.
pub(super) fn integer(value: u32) -> Vec<u8> {
    match value {
        0 | 1 => vec![value as u8],
        2..=0xff => vec![0x0a, value as u8],
        0x100..=0xffff => [&[0x0b][..], &(value as u16).to_le_bytes()].concat(),
        _ => [&[0x0c][..], &value.to_le_bytes()].concat(),
    }
}

/// `EisaId ("PNPxxxx")`: three letters of five bits each, then four hexadecimal digits, stored big-endian.
pub(super) const fn eisa_id(id: &[u8; 7]) -> u32 {
    const fn digit(c: u8) -> u32 {
        match c {
            b'0'..=b'9' => (c - b'0') as u32,
            _ => (c - b'A' + 10) as u32,
        }
    }
    const fn letter(c: u8) -> u32 {
        (c - b'@') as u32
    }
    let letters = letter(id[0]) << 26 | letter(id[1]) << 21 | letter(id[2]) << 16;
    let digits = digit(id[3]) << 12 | digit(id[4]) << 8 | digit(id[5]) << 4 | digit(id[6]);
    (letters | digits).swap_bytes()
}

/// `ResourceTemplate () { descriptors }`: a buffer with an end tag, whose checksum 0 means that there is none.
pub(super) fn resources(descriptors: &[Vec<u8>]) -> Vec<u8> {
    let body = [descriptors.concat(), vec![0x79, 0]].concat();
    [vec![0x11], package(&[integer(body.len() as u32), body].concat())].concat()
}

/// `IO (Decode16, first, first, 0, count)`: I/O port descriptor.
pub(super) fn io(first: u16, count: u8) -> Vec<u8> {
    let [low, high] = first.to_le_bytes();
    vec![0x47, 1, low, high, low, high, 0, count]
}

/// `Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { gsi }`: extended interrupt descriptor.
pub(super) fn edge_interrupt(gsi: u32) -> Vec<u8> {
    [&[0x89, 6, 0, 0b0011, 1][..], &gsi.to_le_bytes()].concat()
}

/// PkgLength and the body it counts, itself included: one byte up to 63, else up to four.
fn package(body: &[u8]) -> Vec<u8> {
    let mut length = Vec::new();
    if body.len() < 63 {
        length.push(body.len() as u8 + 1);
    } else {
        // The first byte holds the number of bytes that follow in bits 7:6, and the low 4 bits of the length.
        let extra = if body.len() < (1 << 12) - 2 {
            1
        } else if body.len() < (1 << 20) - 3 {
            2
        } else {
            3
        };
        let total = body.len() + 1 + extra;
        length.push((extra << 6 | total & 0xf) as u8);
        length.extend((0..extra).map(|i| (total >> (4 + 8 * i)) as u8));
    }
    [&length, body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_count_themselves() {
        for (size, expected) in
            [(0, &[1][..]), (62, &[63]), (63, &[0x41, 4]), (4093, &[0x4f, 0xff]), (4094, &[0x81, 0, 1])]
        {
            let body = vec![7; size];
            assert_eq!(package(&body), [expected, &body].concat(), "{size}");
        }
    }

    #[test]
    fn terms_as_the_specification_encodes_them() {
        assert_eq!(integer(eisa_id(b"PNP0501")), b"\x0c\x41\xd0\x05\x01");
        assert_eq!(integer(1), [1]);
        assert_eq!(integer(0x1234), [0x0b, 0x34, 0x12]);
        assert_eq!(name(b"_UID", &integer(2)), b"\x08_UID\x0a\x02");
        assert_eq!(array(&[integer(5), integer(0)]), [0x12, 5, 2, 0x0a, 5, 0]);
        assert_eq!(device(b"COM1", &[]), b"\x5b\x82\x05COM1");
        assert_eq!(scope(b"_SB_", &[]), b"\x10\x06\\_SB_");
        assert_eq!(resources(&[]), [0x11, 5, 0x0a, 2, 0x79, 0]);
    }
}
