//! Chunk payloads: a mode byte and the mode's own bytes.

use crate::CodecError;
use crate::elias;
use crate::head::Head;
use crate::segment::{SegmentSpec, check_len};
use crate::words::Word;

/// How a chunk is coded. Discriminants are the payload's mode byte, except that a chunk of mode
/// [`ChunkMode::Zero`] has no payload at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[non_exhaustive]
pub enum ChunkMode {
    /// Equal to the base; without a base, all words zero.
    Zero = 0,
    /// The final words as they are.
    Raw = 1,
    /// Positions of changed words by class of the base's exponent, entropy-coded steps.
    Sparse = 2,
    /// An entropy-coded step for every word.
    Dense = 3,
    /// Byte planes of the final words, entropy-coded where that pays.
    Planes = 4,
    /// Elias-delta gaps and Zstandard values.
    EliasZstd = 5,
}

impl ChunkMode {
    /// All modes, in the order of their codes.
    pub const ALL: [ChunkMode; 6] = [
        ChunkMode::Zero,
        ChunkMode::Raw,
        ChunkMode::Sparse,
        ChunkMode::Dense,
        ChunkMode::Planes,
        ChunkMode::EliasZstd,
    ];

    /// Short name for reports: `Z raw S D W elias-zstd`.
    pub fn name(self) -> &'static str {
        ["Z", "raw", "S", "D", "W", "elias-zstd"][self as usize]
    }

    /// The mode of a payload.
    pub(crate) fn of(payload: &[u8]) -> Result<Self, CodecError> {
        match payload.first() {
            None => Ok(ChunkMode::Zero),
            Some(&code @ 1..=5) => Ok(ChunkMode::ALL[usize::from(code)]),
            Some(_) => Err(CodecError::malformed("chunk", "reserved mode")),
        }
    }
}

/// Turn base words into final words, in place. `first_word` counts within the segment.
pub(crate) fn apply_payload(
    payload: &[u8],
    head: &Head,
    spec: &SegmentSpec,
    first_word: usize,
    blocks: Option<&[u8]>,
    words: &mut [u8],
) -> Result<(), CodecError> {
    match spec.dtype.word_bytes() {
        1 => apply_typed::<u8>(payload, head, spec, first_word, blocks, words),
        2 => apply_typed::<u16>(payload, head, spec, first_word, blocks, words),
        4 => apply_typed::<u32>(payload, head, spec, first_word, blocks, words),
        _ => apply_typed::<u64>(payload, head, spec, first_word, blocks, words),
    }
}

fn apply_typed<W: Word>(
    payload: &[u8],
    _head: &Head,
    spec: &SegmentSpec,
    _first_word: usize,
    _blocks: Option<&[u8]>,
    words: &mut [u8],
) -> Result<(), CodecError> {
    let body = payload.get(1..).unwrap_or_default();
    match ChunkMode::of(payload)? {
        ChunkMode::Zero => Ok(()),
        ChunkMode::Raw => {
            check_len("raw chunk", words.len(), body.len())?;
            words.copy_from_slice(body);
            Ok(())
        }
        ChunkMode::EliasZstd => elias::apply::<W>(body, spec, words),
        _ => Err(CodecError::malformed("chunk", "mode without its tables")),
    }
}
