//! Bit streams, least significant bit first, and the variable-length integers of heads and payloads.

use crate::CodecError;

/// Appends bit fields to a byte vector.
#[derive(Default)]
pub(crate) struct BitWriter {
    bytes: Vec<u8>,
    pending: u64,
    pending_bits: u32,
}

impl BitWriter {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Append the low `width` bits of `value`, 0 to 64 of them.
    #[inline(always)]
    pub(crate) fn put(&mut self, value: u64, width: u32) {
        if width > 32 {
            self.put_narrow(value, 32);
            self.put_narrow(value >> 32, width - 32);
        } else {
            self.put_narrow(value, width);
        }
    }

    /// As [`BitWriter::put`] for at most 32 bits.
    #[inline(always)]
    fn put_narrow(&mut self, value: u64, width: u32) {
        let value = value & ((1u64 << width) - 1);
        self.pending |= value << self.pending_bits;
        self.pending_bits += width;
        if self.pending_bits >= 32 {
            self.bytes.extend_from_slice(&(self.pending as u32).to_le_bytes());
            self.pending >>= 32;
            self.pending_bits -= 32;
        }
    }

    /// Elias delta code of `value` >= 1.
    pub(crate) fn put_elias_delta(&mut self, value: u64) {
        let bits = 64 - value.leading_zeros();
        let length_bits = 32 - bits.leading_zeros();
        self.put(0, length_bits - 1);
        self.put(1, 1);
        self.put(u64::from(bits), length_bits - 1);
        self.put(value, bits - 1);
    }

    /// The bytes, the last one padded with zero bits.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        let tail = self.pending.to_le_bytes();
        self.bytes.extend_from_slice(&tail[..self.pending_bits.div_ceil(8) as usize]);
        self.bytes
    }
}

/// Reads bit fields back. Reading past the end is an error, never a panic.
pub(crate) struct BitReader<'a> {
    bytes: &'a [u8],
    position: u64,
}

impl<'a> BitReader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        BitReader { bytes, position: 0 }
    }

    /// The next `width` bits, 0 to 64.
    #[inline(always)]
    pub(crate) fn get(&mut self, width: u32) -> Result<u64, CodecError> {
        if width > 32 {
            let low = self.get_narrow(32)?;
            return Ok(low | self.get_narrow(width - 32)? << 32);
        }
        self.get_narrow(width)
    }

    /// As [`BitReader::get`] for at most 32 bits.
    #[inline(always)]
    fn get_narrow(&mut self, width: u32) -> Result<u64, CodecError> {
        let end = self.position + u64::from(width);
        if end > self.bytes.len() as u64 * 8 {
            return Err(CodecError::malformed("bit stream", "ends early"));
        }
        let first = (self.position / 8) as usize;
        let word = match self.bytes.get(first..first + 8) {
            Some(window) => u64::from_le_bytes(window.try_into().expect("8 bytes")),
            None => {
                let mut window = [0; 8];
                let rest = &self.bytes[first..];
                window[..rest.len()].copy_from_slice(rest);
                u64::from_le_bytes(window)
            }
        };
        let value = (word >> (self.position % 8)) & ((1u64 << width) - 1);
        self.position = end;
        Ok(value)
    }

    /// One Elias delta code.
    pub(crate) fn get_elias_delta(&mut self) -> Result<u64, CodecError> {
        let mut length_bits = 1;
        while self.get(1)? == 0 {
            length_bits += 1;
            if length_bits > 7 {
                return Err(CodecError::malformed("Elias delta code", "longer than 64 bits"));
            }
        }
        let bits = (self.get(length_bits - 1)? | 1 << (length_bits - 1)) as u32;
        if bits > 64 {
            return Err(CodecError::malformed("Elias delta code", "longer than 64 bits"));
        }
        Ok(self.get(bits - 1)? | 1 << (bits - 1))
    }

    /// Bytes touched so far.
    pub(crate) fn bytes_read(&self) -> usize {
        self.position.div_ceil(8) as usize
    }
}

/// Append `value` in groups of 7 bits, least significant first, the top bit of a byte saying that more follow.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Read a varint from the front of `bytes` and move past it.
pub(crate) fn take_varint(bytes: &mut &[u8]) -> Result<u64, CodecError> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first().ok_or(CodecError::malformed("varint", "ends early"))?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            let canonical = (byte != 0 || shift == 0) && (shift < 63 || byte < 2);
            return if canonical { Ok(value) } else { Err(CodecError::malformed("varint", "not shortest")) };
        }
    }
    Err(CodecError::malformed("varint", "longer than 64 bits"))
}

/// Split `count` bytes off the front of `bytes`.
pub(crate) fn take<'a>(bytes: &mut &'a [u8], count: u64, what: &'static str) -> Result<&'a [u8], CodecError> {
    let count = usize::try_from(count).map_err(|_| CodecError::malformed(what, "ends early"))?;
    let (front, rest) = bytes.split_at_checked(count).ok_or(CodecError::malformed(what, "ends early"))?;
    *bytes = rest;
    Ok(front)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_codes_come_back() {
        let values = [1u64, 2, 3, 4, 17, 255, 1 << 31, (1 << 33) + 5, u64::MAX];
        let mut writer = BitWriter::new();
        for &v in &values {
            writer.put_elias_delta(v);
            writer.put(v, 64);
            writer.put(v, 13);
        }
        let bytes = writer.finish();
        let mut reader = BitReader::new(&bytes);
        for &v in &values {
            assert_eq!(reader.get_elias_delta(), Ok(v));
            assert_eq!(reader.get(64), Ok(v));
            assert_eq!(reader.get(13), Ok(v & 0x1fff));
        }
        assert!(reader.get(8).is_err());
    }

    #[test]
    fn varints_are_canonical() {
        for v in [0, 1, 127, 128, 16383, 16384, u64::MAX] {
            let mut out = vec![];
            put_varint(&mut out, v);
            let mut rest = out.as_slice();
            assert_eq!(take_varint(&mut rest), Ok(v));
            assert!(rest.is_empty());
        }
        assert!(take_varint(&mut [0x80u8, 0].as_slice()).is_err());
        assert!(take_varint(&mut [0xffu8; 10].as_slice()).is_err());
        assert!(take_varint(&mut [0x80u8].as_slice()).is_err());
    }
}
