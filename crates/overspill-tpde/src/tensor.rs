//! One tensor of a patch at a time, for weights that exist only around their use, and the 4- and 8-bit blocks that
//! they may start from.
//!
//! The patch is authenticated once ([`authenticate`]), not with every tensor; what then goes wrong is a base
//! that is not the patch's own.

use std::sync::{Mutex, PoisonError};

use overspill_codec::{BaseKind, Dtype, QuantLayout};
use rayon::prelude::*;

use crate::checkpoint::Kind;
use crate::container::{Patch, PatchHasher, Segment};
use crate::work::{Options, Workers};
use crate::{Error, Result};

/// Weights that one task quantizes or dequantizes.
const TASK_WORDS: usize = 1 << 18;

/// Compares a patch with its hash.
///
/// # Errors
/// A damaged patch, or one that cannot be read.
pub fn authenticate(patch: &Patch<'_>, options: &Options) -> Result<()> {
    if options.threads == 0 {
        // The process's own threads are there already, and hashing takes no memory to speak of.
        return patch.authenticate_by(PatchHasher::add_blob);
    }
    patch.authenticate(&Workers::new(options, patch.largest_segment_bytes())?)
}

/// Decodes entry number `entry` of an authenticated patch's manifest into `out`; `base` holds what it starts from:
/// words, blocks, or nothing where it stands alone.
///
/// # Errors
/// No such entry, buffers of other sizes, a payload that the base does not fit (`out` is then undefined).
pub fn decode_tensor(
    patch: &Patch<'_>,
    entry: usize,
    base: &[u8],
    out: &mut [u8],
    options: &Options,
) -> Result<()> {
    let Some(known) = patch.manifest().entries().get(entry) else {
        return Err(Error::misuse(format!("{}: has no tensor number {entry}", patch.path().display())));
    };
    let base_kind = match known.base {
        BaseKind::None => None,
        BaseKind::Words => Some(known.tensor.kind),
        BaseKind::Quantized(layout) => Some(Kind::Quantized(layout)),
    };
    let base_bytes = base_kind.map_or(0, |kind| kind.bytes_of(known.tensor.words()));
    if base.len() as u64 != base_bytes || out.len() as u64 != known.tensor.bytes {
        let cause = format!("{base_bytes} bytes of base make {} bytes", known.tensor.bytes);
        return Err(Error::tensor(patch.path(), &known.tensor.name, None, cause));
    }
    let workers = Workers::new(options, patch.largest_segment_bytes())?;
    let mut rest = out;
    let mut slots = Vec::new();
    for segment in patch.segments.iter().filter(|segment| segment.entry == entry) {
        let (own, others) = rest.split_at_mut(segment.raw_bytes());
        slots.push((segment, Mutex::new(own)));
        rest = others;
    }
    let part = |segment: &Segment| {
        let at = |words: u64| base_kind.map_or(0, |kind| kind.bytes_of(words) as usize);
        &base[at(segment.spec.first_word)..at(segment.spec.first_word + segment.spec.words as u64)]
    };
    workers.run(
        &slots,
        |(segment, _)| segment.raw_bytes(),
        |(segment, own)| {
            patch.decode(segment, part(segment), &mut own.lock().unwrap_or_else(PoisonError::into_inner))
        },
        |_, ()| Ok(()),
    )
}

/// Blocks of `layout` that stand for weights of `dtype` (BF16, F16 or F32), as llama.cpp's reference makes them.
///
/// # Errors
/// Another dtype, or weights that are not whole blocks.
pub fn quantize(layout: QuantLayout, weights: &[u8], dtype: Dtype, options: &Options) -> Result<Vec<u8>> {
    let task_bytes = TASK_WORDS * dtype.word_bytes();
    in_tasks(weights, task_bytes, options, |part| overspill_codec::quantize(layout, part, dtype))
}

/// The weights that blocks stand for, by the format's rule.
///
/// # Errors
/// As [`quantize`].
pub fn dequantize(layout: QuantLayout, blocks: &[u8], dtype: Dtype, options: &Options) -> Result<Vec<u8>> {
    let task_bytes = TASK_WORDS / QuantLayout::BLOCK_WORDS * layout.block_bytes();
    in_tasks(blocks, task_bytes, options, |part| overspill_codec::dequantize(layout, part, dtype))
}

fn in_tasks(
    bytes: &[u8],
    task_bytes: usize,
    options: &Options,
    work: impl Fn(&[u8]) -> std::result::Result<Vec<u8>, overspill_codec::CodecError> + Sync,
) -> Result<Vec<u8>> {
    let workers = Workers::new(options, task_bytes)?;
    let made: std::result::Result<Vec<Vec<u8>>, _> =
        workers.install(|| bytes.par_chunks(task_bytes).map(&work).collect());
    Ok(made.map_err(|error| Error::misuse(error.to_string()))?.concat())
}
