//! Chunk payloads: a mode byte and the mode's own bytes.

use crate::classes::KeyMap;
use crate::head::{DenseTables, Head};
use crate::scan::ValueMap;
use crate::segment::{SegmentSpec, check_len};
use crate::words::Word;
use crate::{CodecError, dense, elias, flags, groups, planes, sparse};

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
    /// Whether each word changed, and entropy-coded steps, for decoders that go through a chunk once.
    Flags = 6,
    /// An entropy-coded step for every word, for such decoders too.
    Groups = 7,
}

impl ChunkMode {
    /// All modes, in the order of their codes.
    pub const ALL: [ChunkMode; 8] = [
        ChunkMode::Zero,
        ChunkMode::Raw,
        ChunkMode::Sparse,
        ChunkMode::Dense,
        ChunkMode::Planes,
        ChunkMode::EliasZstd,
        ChunkMode::Flags,
        ChunkMode::Groups,
    ];

    /// Short name for reports: `Z raw S D W elias-zstd F G`.
    pub fn name(self) -> &'static str {
        ["Z", "raw", "S", "D", "W", "elias-zstd", "F", "G"][self as usize]
    }

    /// The mode of a payload.
    pub(crate) fn of(payload: &[u8]) -> Result<Self, CodecError> {
        match payload.first() {
            None => Ok(ChunkMode::Zero),
            Some(&code @ 1..=7) => Ok(ChunkMode::ALL[usize::from(code)]),
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
    words: &mut [u8],
) -> Result<(), CodecError> {
    match spec.dtype.word_bytes() {
        1 => apply_typed::<u8>(payload, head, spec, first_word, words),
        2 => apply_typed::<u16>(payload, head, spec, first_word, words),
        4 => apply_typed::<u32>(payload, head, spec, first_word, words),
        _ => apply_typed::<u64>(payload, head, spec, first_word, words),
    }
}

fn apply_typed<W: Word>(
    payload: &[u8],
    head: &Head,
    spec: &SegmentSpec,
    first_word: usize,
    words: &mut [u8],
) -> Result<(), CodecError> {
    let body = payload.get(1..).unwrap_or_default();
    let no_tables = CodecError::malformed("chunk", "mode without its tables");
    match ChunkMode::of(payload)? {
        ChunkMode::Zero => Ok(()),
        ChunkMode::Raw => {
            check_len("raw chunk", words.len(), body.len())?;
            words.copy_from_slice(body);
            Ok(())
        }
        ChunkMode::Sparse => {
            let tables = head.sparse.as_ref().ok_or(no_tables)?;
            sparse::apply::<W>(body, tables, spec, first_word, words)
        }
        ChunkMode::Dense => {
            let tables = head.dense.as_ref().ok_or(no_tables)?;
            dense::apply::<W>(body, tables, &KeyContext::new(spec, tables), words)
        }
        ChunkMode::Planes => {
            let tables = head.planes.as_ref().ok_or(no_tables)?;
            planes::decode::<W>(body, tables, spec.dtype.float_layout().is_some(), words)
        }
        ChunkMode::EliasZstd => elias::apply::<W>(body, spec, words),
        ChunkMode::Groups => {
            let tables = head.dense.as_ref().ok_or(no_tables)?;
            groups::apply::<W>(body, &tables.classes, &KeyContext::new(spec, tables), words)
        }
        ChunkMode::Flags => {
            let tables = head.sparse.as_ref().ok_or(no_tables)?;
            flags::apply::<W>(body, tables, spec, words)
        }
    }
}

/// Dense steps against words: classes by key.
pub(crate) struct KeyContext<'a> {
    keys: KeyMap,
    values: ValueMap,
    class_of_key: &'a [u8; 256],
}

impl<'a> KeyContext<'a> {
    pub(crate) fn new(spec: &SegmentSpec, tables: &'a DenseTables) -> Self {
        let (keys, values) = sparse::maps(spec);
        KeyContext { keys, values, class_of_key: &tables.class_of_key }
    }
}

impl<W: Word> dense::Context<W> for KeyContext<'_> {
    const STILL_IS_BASE: bool = true;

    #[inline(always)]
    fn class(&self, _position: usize, base: W) -> usize {
        self.class_of_key[usize::from(self.keys.key(base))].into()
    }

    #[inline(always)]
    fn step(&self, _position: usize, base: W, new: W) -> W {
        self.values.value(base, new)
    }

    #[inline(always)]
    fn word(&self, _position: usize, base: W, step: W) -> W {
        self.values.word(base, step)
    }
}
