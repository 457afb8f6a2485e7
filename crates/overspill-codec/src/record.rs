//! Index records: where a chunk's payload ends, and a check over its bytes.

use crate::segment::{BaseKind, PatchKind, SegmentSpec};
use crate::{CodecError, QuantLayout, simd};

/// Bytes of one index record.
pub const RECORD_BYTES: usize = 8;

/// One chunk's index record. A payload starts where the one before it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRecord {
    /// End of the payload, in bytes from the start of the segment's blob.
    pub end_bytes: u32,
    /// Position-keyed additive check over the payload, the head and the spec; see the format.
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

const A: u64 = 0xd6e8_feb8_6659_fd93;
const B: u64 = 0xa076_1d64_78bd_642f;
const C: u64 = 0x9e37_79b9_7f4a_7c15;
const D: u64 = 0xe703_7ed1_a0b4_28db;

/// Sum of w_i * (2 i + 1) + length * A modulo 2^64, w_i the little-endian 32-bit words of `bytes`, the last padded
/// with zeros. Additive, so that many threads (or a thread block) can form it in any order.
#[inline(always)]
pub(crate) fn keyed_sum(bytes: &[u8]) -> u64 {
    let (words, tail) = bytes.as_chunks::<4>();
    let mut sum = 0u64;
    let mut key = 1u32;
    for word in words {
        sum = sum.wrapping_add(u64::from(u32::from_le_bytes(*word)) * u64::from(key));
        key = key.wrapping_add(2);
    }
    let mut last = [0; 4];
    last[..tail.len()].copy_from_slice(tail);
    sum = sum.wrapping_add(u64::from(u32::from_le_bytes(last)) * u64::from(key));
    sum.wrapping_add((bytes.len() as u64).wrapping_mul(A))
}

/// What a segment's chunk checks start from: its head and what its spec says about decoding.
pub(crate) fn segment_seed(head: &[u8], spec: &SegmentSpec) -> u64 {
    let base = match spec.base {
        BaseKind::None => 0,
        BaseKind::Words => 1,
        BaseKind::Quantized(QuantLayout::Q4_0) => 2,
        BaseKind::Quantized(QuantLayout::Q4_1) => 3,
        BaseKind::Quantized(QuantLayout::Q8_0) => 4,
    };
    let kind = u8::from(spec.kind == PatchKind::Absolute);
    let mut bytes = head.to_vec();
    bytes.extend_from_slice(&[spec.dtype.code(), base, kind]);
    bytes.extend_from_slice(&(spec.words as u32).to_le_bytes());
    simd::keyed_sum(&bytes)
}

/// What a segment's seed adds to the sum that a payload's check is made of.
pub(crate) fn segment_seed_term(head: &[u8], spec: &SegmentSpec) -> u64 {
    segment_seed(head, spec).wrapping_mul(D)
}

/// The check of a payload: the top half of `(keyed sum + chunk * B + seed * D) * C` modulo 2^64.
pub(crate) fn payload_check(payload: &[u8], chunk: usize, seed: u64) -> u32 {
    let sum = simd::keyed_sum(payload)
        .wrapping_add((chunk as u64).wrapping_mul(B))
        .wrapping_add(seed.wrapping_mul(D));
    (sum.wrapping_mul(C) >> 32) as u32
}
