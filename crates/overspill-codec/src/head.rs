//! Segment heads: the chunk size and the tables that a segment's chunks share.

use crate::CodecError;
use crate::segment::{SEGMENT_WORDS, SegmentSpec};

/// Smallest and largest chunk, as powers of two of words.
pub(crate) const CHUNK_LOG2: std::ops::RangeInclusive<u32> = 10..=SEGMENT_WORDS.ilog2();

/// A parsed head.
#[derive(Debug)]
pub(crate) struct Head {
    /// Words in a chunk as a power of two; 0 for a segment without chunks.
    pub(crate) chunk_log2: u32,
}

impl Head {
    /// Parse a head off the front of `heads`.
    pub(crate) fn take(heads: &mut &[u8], spec: &SegmentSpec) -> Result<Self, CodecError> {
        let (&first, rest) = heads.split_first().ok_or(CodecError::malformed("head", "ends early"))?;
        let chunk_log2 = u32::from(first & 0x1f);
        if first == 0 {
            *heads = rest;
            return Ok(Head { chunk_log2: 0 });
        }
        if first >> 5 != 0 {
            return Err(CodecError::malformed("head", "reserved bits are set"));
        }
        if !CHUNK_LOG2.contains(&chunk_log2) {
            return Err(CodecError::malformed("head", "chunk size out of range"));
        }
        if spec.words == 0 {
            return Err(CodecError::malformed("head", "chunks in a segment of no words"));
        }
        *heads = rest;
        Ok(Head { chunk_log2 })
    }

    /// Append the head.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.push(self.chunk_log2 as u8);
    }

    /// Chunks in a segment of `words` words.
    pub(crate) fn chunk_count(&self, words: usize) -> usize {
        if self.chunk_log2 == 0 { 0 } else { words.div_ceil(1 << self.chunk_log2) }
    }
}
