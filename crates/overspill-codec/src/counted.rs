//! The head of a segment from counts that were taken elsewhere: on a GPU, which then codes the chunks itself.
//!
//! Segments without a base: what mode W needs. Others only if they are sparse throughout: the reference encoder's head for them but for what it finds by looking
//! at the changes once more (clustered classes), and none where it would use rows as context or another mode.

use crate::classes::KeyMap;
use crate::encode::{ZSTD_PROBE_WORDS, may_try_zstd};
use crate::head::HeadPlan;
use crate::planes;
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

/// What the first look at a segment without a base counts.
#[derive(Debug, Clone)]
pub struct PlaneCounts<'a> {
    /// Words of every [`COUNT_GRAIN_WORDS`] that are not zero.
    pub grains: &'a [u32],
    /// How often each byte occurs, 256 of every plane; a float's word is rotated left by one, and its plane 0 is on top.
    pub bytes: &'a [u32],
    /// The same of the first of every sixteen runs of 1,024 words.
    pub sample: &'a [u32],
    /// The first [`ZSTD_PROBE_WORDS`] words of the first grain that is not all zeros; fewer if that is shorter.
    pub probe: &'a [u8],
}

/// The head of a segment without a base whose chunks are all of mode W (or Z); `None` for others, and where the
/// reference encoder would try something else on a chunk.
pub fn planes_head(counts: &PlaneCounts<'_>, spec: &SegmentSpec) -> Option<Vec<u8>> {
    let word_bytes = spec.dtype.word_bytes();
    let changed: u64 = counts.grains.iter().map(|&count| u64::from(count)).sum();
    if spec.base != BaseKind::None || !survey::is_dense(changed, spec.words) {
        return None;
    }
    let first = counts.grains.iter().position(|&changed| changed > 0)?;
    let chunk_words = (spec.words - (first << GRAIN_LOG2)).min(COUNT_GRAIN_WORDS);
    if chunk_words <= ZSTD_PROBE_WORDS || may_try_zstd(counts.probe, word_bytes) {
        return None;
    }
    let count = |plane: usize, is_sample: bool| {
        let cells = if is_sample { counts.sample } else { counts.bytes };
        std::array::from_fn(|byte| u64::from(cells[256 * plane + byte]))
    };
    let planes = Some(planes::plan_counted(word_bytes, spec.words, count).frequencies);
    Some(HeadPlan { chunk_log2: GRAIN_LOG2, planes, ..HeadPlan::default() }.to_bytes())
}
