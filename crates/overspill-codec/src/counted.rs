//! The head of a segment from counts that were taken elsewhere: on a GPU, which then codes the chunks itself.
//!
//! Only segments that are sparse throughout: the reference encoder's head for them but for what it finds by looking
//! at the changes once more (clustered classes), and none where it would use rows as context or another mode.

use crate::classes::KeyMap;
use crate::segment::{BaseKind, PatchKind, SegmentSpec};
use crate::survey::{self, GRAIN_LOG2, SAMPLE_ABOVE_WORDS, SAMPLE_STRIDE, Survey};

/// Words between which changes are counted.
pub const COUNT_GRAIN_WORDS: usize = 1 << GRAIN_LOG2;

/// What the first look at a segment counts.
#[derive(Debug, Clone)]
pub struct SegmentCounts {
    /// Changed words of every [`COUNT_GRAIN_WORDS`].
    pub grains: Vec<u32>,
    /// Words of each key of the base; where [`sampled_one_in`] says so from every so manieth block of 64 words, scaled
    /// up.
    pub population: [u64; 256],
    /// (key, value symbol, how often) of the changed words, in any order.
    pub values: Vec<(u8, u8, u32)>,
    /// Raw bits of all values, signs not counted.
    pub raw_bits: u64,
    /// Rows with a change.
    pub rows_changed: u64,
}

/// Of how many blocks of 64 words of a segment one is enough to know its keys.
pub fn sampled_one_in(words: usize) -> usize {
    if words > SAMPLE_ABOVE_WORDS { SAMPLE_STRIDE } else { 1 }
}

/// The head of a segment of steps whose chunks are all of mode S (or Z) without row context; `None` for others.
pub fn sparse_head(counts: &SegmentCounts, spec: &SegmentSpec) -> Option<Vec<u8>> {
    if spec.base != BaseKind::Words || spec.kind != PatchKind::Relative {
        return None;
    }
    match spec.dtype.word_bytes() {
        1 => Survey::<u8>::sparse_head(counts, spec),
        2 => Survey::<u16>::sparse_head(counts, spec),
        4 => Survey::<u32>::sparse_head(counts, spec),
        _ => None,
    }
}

/// As [`sparse_head`] for mode F, however many words changed; what the reference encoder makes.
pub fn flags_head(counts: &SegmentCounts, spec: &SegmentSpec) -> Option<Vec<u8>> {
    if spec.base != BaseKind::Words || spec.kind != PatchKind::Relative {
        return None;
    }
    Some(survey::flags_head(counts, spec))
}

/// Where the key lies in a word of a segment of steps: how far up, and its bits.
pub fn key_field(spec: &SegmentSpec) -> (u32, u32) {
    let keys = KeyMap::new(spec.dtype, true);
    (keys.shift, keys.mask.into())
}
