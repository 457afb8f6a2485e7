//! Mode `elias-zstd`, the first design: Elias-delta codes of the gaps between changed words, then their values
//! in one Zstandard frame. Kept as a codec of its own and as the baseline that the other modes are held to.
//!
//! Body: varint count of changed words; when some but not all changed, varint bytes of the gap stream and the
//! gap stream; then the frame. Values are steps for a relative patch, final words otherwise.

use crate::CodecError;
use crate::bits::{BitReader, BitWriter, put_varint, take, take_varint};
use crate::segment::{BaseKind, PatchKind, SegmentSpec};
use crate::words::{OrderMap, Word, set_word, word_at};

fn is_relative(spec: &SegmentSpec) -> bool {
    spec.base != BaseKind::None && spec.kind == PatchKind::Relative
}

/// Append the body for `new` against `base` (all zeros where there is none).
pub(crate) fn encode<W: Word>(
    base: &[u8],
    new: &[u8],
    spec: &SegmentSpec,
    level: i32,
    out: &mut Vec<u8>,
) -> Result<(), CodecError> {
    let order = OrderMap { is_float: spec.dtype.float_layout().is_some() };
    let (mut gaps, mut values) = (BitWriter::new(), Vec::new());
    let (mut count, mut next) = (0u64, 0usize);
    let words = new.len() / W::BYTES;
    for i in 0..words {
        let (old, word) = (word_at::<W>(base, i), word_at::<W>(new, i));
        if old == word {
            continue;
        }
        gaps.put_elias_delta((i - next + 1) as u64);
        next = i + 1;
        count += 1;
        let value = if is_relative(spec) { order.step(old, word) } else { word };
        let start = values.len();
        values.resize(start + W::BYTES, 0);
        value.store(&mut values[start..]);
    }
    put_varint(out, count);
    if count != words as u64 {
        let gaps = gaps.finish();
        put_varint(out, gaps.len() as u64);
        out.extend_from_slice(&gaps);
    }
    let frame = zstd::bulk::compress(&values, level)
        .map_err(|_| CodecError::malformed("zstd values", "compressor failed"))?;
    out.extend_from_slice(&frame);
    Ok(())
}

/// Apply a body to base words in place.
pub(crate) fn apply<W: Word>(
    mut body: &[u8],
    spec: &SegmentSpec,
    words: &mut [u8],
) -> Result<(), CodecError> {
    let order = OrderMap { is_float: spec.dtype.float_layout().is_some() };
    let total = words.len() / W::BYTES;
    let count = take_varint(&mut body)?;
    if count > total as u64 {
        return Err(CodecError::malformed("elias-zstd chunk", "more changes than words"));
    }
    let count = count as usize;
    let gaps = if count == total {
        None
    } else {
        let bytes = take_varint(&mut body)?;
        Some(take(&mut body, bytes, "gap stream")?)
    };
    let values = zstd::bulk::decompress(body, count * W::BYTES)
        .map_err(|_| CodecError::malformed("zstd values", "not a frame of the declared size"))?;
    if values.len() != count * W::BYTES {
        return Err(CodecError::malformed("zstd values", "not a frame of the declared size"));
    }
    let mut reader = gaps.map(BitReader::new);
    let mut position = 0usize;
    for i in 0..count {
        if let Some(reader) = &mut reader {
            let gap = reader.get_elias_delta()? - 1;
            position = usize::try_from(gap).ok().and_then(|gap| position.checked_add(gap)).unwrap_or(total);
        }
        if position >= total {
            return Err(CodecError::malformed("elias-zstd chunk", "a position beyond the chunk"));
        }
        let value = word_at::<W>(&values, i);
        let word = if is_relative(spec) { order.apply(word_at::<W>(words, position), value) } else { value };
        set_word(words, position, word);
        position += 1;
    }
    Ok(())
}
