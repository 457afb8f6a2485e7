//! Index records: where a chunk's payload ends, and a check over its bytes.

use crate::CodecError;

/// Bytes of one index record.
pub const RECORD_BYTES: usize = 8;

/// One chunk's index record. A payload starts where the one before it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRecord {
    /// End of the payload, in bytes from the start of the segment's blob.
    pub end_bytes: u32,
    /// Position-keyed additive check over the payload, see [`payload_check`].
    pub check: u32,
}

impl ChunkRecord {
    /// The record's bytes in the index section: `end_bytes`, `check`, little endian.
    pub fn to_bytes(self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..4].copy_from_slice(&self.end_bytes.to_le_bytes());
        bytes[4..].copy_from_slice(&self.check.to_le_bytes());
        bytes
    }

    /// Inverse of [`ChunkRecord::to_bytes`].
    pub fn from_bytes(bytes: [u8; RECORD_BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        ChunkRecord { end_bytes: u32::from_le_bytes([a, b, c, d]), check: u32::from_le_bytes([e, f, g, h]) }
    }
}

/// Check the `count` records at the front of an index section and return them.
pub(crate) fn parse_records(index: &[u8], count: usize) -> Result<Vec<ChunkRecord>, CodecError> {
    let bytes = index
        .get(..count.saturating_mul(RECORD_BYTES))
        .ok_or(CodecError::malformed("index", "fewer records than chunks"))?;
    let (records, _) = bytes.as_chunks::<RECORD_BYTES>();
    let records: Vec<ChunkRecord> = records.iter().map(|&r| ChunkRecord::from_bytes(r)).collect();
    if records.windows(2).any(|pair| pair[1].end_bytes < pair[0].end_bytes) {
        return Err(CodecError::malformed("index", "payload ends run backwards"));
    }
    Ok(records)
}

/// The check of a payload: with w_i its little-endian 32-bit words (the last padded with zeros),
/// the top half of `(sum of w_i * (2 i + 1) + length * A + chunk * B) * C`, all modulo 2^64.
///
/// Additive, so that many threads (or a thread block) can sum it in any order.
pub(crate) fn payload_check(payload: &[u8], chunk: usize) -> u32 {
    const A: u64 = 0xd6e8_feb8_6659_fd93;
    const B: u64 = 0xa076_1d64_78bd_642f;
    const C: u64 = 0x9e37_79b9_7f4a_7c15;
    let (words, tail) = payload.as_chunks::<4>();
    let mut sum = 0u64;
    let mut key = 1u32;
    for word in words {
        sum = sum.wrapping_add(u64::from(u32::from_le_bytes(*word)) * u64::from(key));
        key = key.wrapping_add(2);
    }
    let mut last = [0; 4];
    last[..tail.len()].copy_from_slice(tail);
    sum = sum.wrapping_add(u64::from(u32::from_le_bytes(last)) * u64::from(key));
    sum = sum.wrapping_add((payload.len() as u64).wrapping_mul(A));
    sum = sum.wrapping_add((chunk as u64).wrapping_mul(B));
    (sum.wrapping_mul(C) >> 32) as u32
}
