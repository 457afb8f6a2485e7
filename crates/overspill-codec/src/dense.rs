//! Mode D: an entropy-coded step for every word, in the words' own order, on 32 lanes.
//!
//! Payload after the mode byte: varint bytes of the entropy-coded part; that part (32 lane states, which decoding
//! must bring back to 2^16, and the word stream): the magnitude symbol of word n is symbol n, coded by the table of
//! the class of its base's key; then the raw bits, in the same order: for a magnitude that is not 0 its sign,
//! then the symbol's raw bits.

use crate::CodecError;
use crate::bits::{BitReader, BitWriter, put_varint, take, take_varint};
use crate::classes::DenseClass;
use crate::head::DenseTables;
use crate::rans::{Decoder, Encoder, MAX_LANES, STATE_LOW};
use crate::scan::{BLOCK, BlockOps, valid_mask};
use crate::simd;
use crate::values::{magnitude_of, sign_magnitude, split_magnitude, step_of};
use crate::words::{Word, set_word, word_at};

/// Words whose symbols are decoded before they are put to use: whole groups of lanes, and near in the caches.
pub(crate) const STRETCH: usize = 2048;

/// What the coder of dense steps must know about each word besides its base.
pub(crate) trait Context<W: Word> {
    /// Whether a word whose step is 0 is its base.
    const STILL_IS_BASE: bool;
    /// Index into the dense table's classes.
    fn class(&self, position: usize, base: W) -> usize;
    /// The wrapping step from base to final word.
    fn step(&self, position: usize, base: W, new: W) -> W;
    /// The final word.
    fn word(&self, position: usize, base: W, step: W) -> W;
}

/// Append the payload of one chunk, whose first word is at `first` for the context.
pub(crate) fn encode<W: Word>(
    old: &[u8],
    new: &[u8],
    classes: &[DenseClass],
    context: &impl Context<W>,
    first: usize,
    out: &mut Vec<u8>,
) {
    let (mut symbols, mut raw) = (Encoder::default(), BitWriter::new());
    for i in 0..old.len() / W::BYTES {
        let base = word_at::<W>(old, i);
        let (sign, magnitude) = sign_magnitude(context.step(first + i, base, word_at::<W>(new, i)));
        let (symbol, width, low) = split_magnitude::<W>(magnitude);
        symbols.push(&classes[context.class(first + i, base)].values, symbol.into());
        if magnitude != 0 {
            raw.put(sign, 1);
            raw.put(low, width);
        }
    }
    let mut coded = Vec::new();
    symbols.finish(&[STATE_LOW; MAX_LANES], &mut coded);
    put_varint(out, coded.len() as u64);
    out.extend_from_slice(&coded);
    out.extend_from_slice(&raw.finish());
}

/// Apply a payload (without its mode byte) to base words, in place.
pub(crate) fn apply<W: Word>(
    mut body: &[u8],
    tables: &DenseTables,
    context: &impl Context<W>,
    words: &mut [u8],
) -> Result<(), CodecError> {
    let coded_bytes = take_varint(&mut body)?;
    let mut decoder = Decoder::new(take(&mut body, coded_bytes, "dense chunk")?, MAX_LANES)?;
    let mut raw = BitReader::new(body);
    let (mut classes, mut symbols) = ([0; STRETCH], [0; STRETCH]);
    for (stretch, words) in words.chunks_mut(STRETCH * W::BYTES).enumerate() {
        let (first, count) = (stretch * STRETCH, words.len() / W::BYTES);
        for (i, class) in classes[..count].iter_mut().enumerate() {
            *class = context.class(first + i, word_at::<W>(words, i)) as u8;
        }
        simd::decode_classed(&mut decoder, tables.slots(), &classes[..count], &mut symbols[..count])?;
        symbols[count..].fill(0);
        simd::apply_symbols(&symbols, context, first, &mut raw, words)?;
    }
    decoder.finish()?;
    if raw.bytes_read() != body.len() {
        return Err(CodecError::malformed("dense chunk", "bytes left over"));
    }
    Ok(())
}

/// Give words the steps that their symbols and raw bits say; `first` is the position of the first one for the context.
#[inline(always)]
pub(crate) fn apply_symbols<W: Word, O: BlockOps, C: Context<W>>(
    symbols: &[u8; STRETCH],
    context: &C,
    first: usize,
    raw: &mut BitReader<'_>,
    words: &mut [u8],
) -> Result<(), CodecError> {
    let count = words.len() / W::BYTES;
    for (start, block) in (0..count).step_by(BLOCK).zip(symbols.as_chunks::<BLOCK>().0) {
        let mut coded =
            if C::STILL_IS_BASE { O::mask(block, 1, u8::MAX) } else { valid_mask(BLOCK.min(count - start)) };
        while coded != 0 {
            let place = coded.trailing_zeros() as usize;
            coded &= coded - 1;
            let step = match block[place] {
                0 => W::default(),
                symbol => {
                    let (least, width) = magnitude_of::<W>(symbol)
                        .ok_or(CodecError::malformed("dense chunk", "a magnitude beyond the word"))?;
                    // The sign, then the magnitude's raw bits.
                    let bits = raw.get(1 + width)?;
                    step_of(bits & 1, least + (bits >> 1))
                }
            };
            let i = start + place;
            set_word(words, i, context.word(first + i, word_at::<W>(words, i), step));
        }
    }
    Ok(())
}
