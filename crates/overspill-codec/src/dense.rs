//! Mode D: an entropy-coded step for every word, in the words' own order, on 32 lanes.
//!
//! Payload after the mode byte: varint bytes of the entropy-coded part; that part (32 lane states, which decoding
//! must bring back to 2^16, and the word stream): the magnitude symbol of word n is symbol n, coded by the table of
//! the class of its base's key; then the raw bits, in the same order: for a magnitude that is not 0 its sign,
//! then the symbol's raw bits.

use crate::CodecError;
use crate::bits::{BitReader, BitWriter, put_varint, take, take_varint};
use crate::classes::DenseClass;
use crate::rans::{Decoder, Encoder, MAX_LANES, STATE_LOW, Slots};
use crate::values::{magnitude_of, sign_magnitude, split_magnitude, step_of};
use crate::words::{Word, set_word, word_at};

/// What the coder of dense steps must know about each word besides its base.
pub(crate) trait Context<W: Word> {
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
    classes: &[DenseClass],
    context: &impl Context<W>,
    words: &mut [u8],
) -> Result<(), CodecError> {
    let bad = |why| CodecError::malformed("dense chunk", why);
    let coded_bytes = take_varint(&mut body)?;
    let mut decoder = Decoder::new(take(&mut body, coded_bytes, "dense chunk")?, MAX_LANES)?;
    let mut raw = BitReader::new(body);
    let slots: Vec<&Slots> = classes.iter().map(|class| class.values.slots()).collect();
    for i in 0..words.len() / W::BYTES {
        let base = word_at::<W>(words, i);
        let symbol = decoder.symbol(slots[context.class(i, base)])?;
        let step = if symbol == 0 {
            W::default()
        } else {
            let sign = raw.get(1)?;
            let (least, width) = magnitude_of::<W>(symbol).ok_or(bad("a magnitude beyond the word"))?;
            step_of(sign, least + raw.get(width)?)
        };
        set_word(words, i, context.word(i, base, step));
    }
    decoder.finish()?;
    if raw.bytes_read() != body.len() {
        return Err(bad("bytes left over"));
    }
    Ok(())
}
