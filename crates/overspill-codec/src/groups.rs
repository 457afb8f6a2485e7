//! Mode G: an entropy-coded step for every word, in an order in which 32 lanes go once through base and payload.
//!
//! A group of 256 words is 32 lanes times 8 neighbouring words. Payload after the mode byte: 32 lane states, packed, which
//! decoding must bring back to 2^16; then the word stream to the payload's end. Per group, each line for all lanes:
//! - 8 steps: the magnitude symbol of the lane's next word, by the table of its base's class;
//! - the signs of the lane's words whose magnitude is not 0, popped at once, the first word's lowest;
//! - as long as some lane has a word left whose symbol has raw bits: those of the lane's next such word, popped 16 at a
//!   time from the low end.

use crate::CodecError;
use crate::classes::DenseClass;
use crate::dense::Context;
use crate::flags::{POP, RUN, Symbol, finish};
use crate::rans::{Decoder, MAX_LANES, PROB_BITS, Slots};
use crate::values::{magnitude_of, sign_magnitude, split_magnitude, step_of};
use crate::words::{Word, set_word, word_at};

/// Words of a group.
const GROUP: usize = MAX_LANES * RUN;

/// Append the payload of one chunk.
pub(crate) fn encode<W: Word>(
    old: &[u8],
    new: &[u8],
    classes: &[DenseClass],
    context: &impl Context<W>,
    out: &mut Vec<u8>,
) {
    let mut symbols = Vec::with_capacity(old.len() / W::BYTES);
    let group_bytes = GROUP * W::BYTES;
    for (old, new) in old.chunks(group_bytes).zip(new.chunks(group_bytes)) {
        push_group(old, new, classes, context, &mut symbols);
    }
    finish(&symbols, out);
}

fn push_group<W: Word>(
    old: &[u8],
    new: &[u8],
    classes: &[DenseClass],
    context: &impl Context<W>,
    symbols: &mut Vec<Symbol>,
) {
    let words = old.len() / W::BYTES;
    let (mut signs, mut counts) = ([0u64; MAX_LANES], [0u32; MAX_LANES]);
    // Width and content of the raw bits of every word.
    let mut raws = [(0u32, 0u64); GROUP];
    for i in 0..RUN {
        for at in (i..words).step_by(RUN) {
            let (lane, base) = (at / RUN, word_at::<W>(old, at));
            let (sign, magnitude) = sign_magnitude(context.step(at, base, word_at::<W>(new, at)));
            let (symbol, width, raw) = split_magnitude::<W>(magnitude);
            let range = classes[context.class(at, base)].values.ranges[usize::from(symbol)];
            symbols.push(Symbol::new(lane, range, PROB_BITS));
            if magnitude != 0 {
                signs[lane] |= sign << counts[lane];
                counts[lane] += 1;
            }
            raws[at] = (width, raw);
        }
    }
    for (lane, (&signs, &count)) in
        signs.iter().zip(&counts).enumerate().filter(|(_, (_, count))| **count > 0)
    {
        symbols.push(Symbol::new(lane, (signs as u16, 1), count));
    }
    let mut left = wide_words(|at| raws[at].0 > 0);
    while left != [0; MAX_LANES] {
        let next = next_words(&mut left);
        for piece in 0..W::BITS.div_ceil(POP) {
            for (lane, at) in next.iter().enumerate().filter_map(|(lane, at)| Some((lane, (*at)?))) {
                let (width, raw) = raws[at];
                let count = POP.min(width.saturating_sub(POP * piece));
                if count > 0 {
                    let bits = raw >> (POP * piece) & ((1 << count) - 1);
                    symbols.push(Symbol::new(lane, (bits as u16, 1), count));
                }
            }
        }
    }
}

/// Of each lane, a bit for each of its words that `is_wide`.
fn wide_words(is_wide: impl Fn(usize) -> bool) -> [u8; MAX_LANES] {
    std::array::from_fn(|lane| (0..RUN).map(|i| u8::from(is_wide(lane * RUN + i)) << i).sum())
}

/// Takes the first word of each lane that has one: its place in the group.
fn next_words(left: &mut [u8; MAX_LANES]) -> [Option<usize>; MAX_LANES] {
    std::array::from_fn(|lane| {
        let first = (left[lane] != 0).then(|| lane * RUN + left[lane].trailing_zeros() as usize);
        left[lane] &= left[lane].wrapping_sub(1);
        first
    })
}

/// Apply a payload (without its mode byte) to base words, in place.
pub(crate) fn apply<W: Word>(
    body: &[u8],
    classes: &[DenseClass],
    context: &impl Context<W>,
    words: &mut [u8],
) -> Result<(), CodecError> {
    let mut decoder = Decoder::new_packed(body, MAX_LANES)?;
    let slots: Vec<&Slots> = classes.iter().map(|class| class.values.slots()).collect();
    for group in words.chunks_mut(GROUP * W::BYTES) {
        apply_group(&mut decoder, &slots, context, group)?;
    }
    decoder.finish()
}

fn apply_group<W: Word>(
    decoder: &mut Decoder<'_>,
    slots: &[&Slots],
    context: &impl Context<W>,
    group: &mut [u8],
) -> Result<(), CodecError> {
    let words = group.len() / W::BYTES;
    let (mut symbols, mut counts) = ([0u8; GROUP], [0u32; MAX_LANES]);
    for i in 0..RUN {
        for at in (i..words).step_by(RUN) {
            let symbol = decoder.symbol_of(at / RUN, slots[context.class(at, word_at::<W>(group, at))])?;
            symbols[at] = symbol;
            counts[at / RUN] += u32::from(symbol != 0);
        }
    }
    let mut signs = [0u64; MAX_LANES];
    for (lane, signs) in signs.iter_mut().enumerate() {
        *signs = decoder.pop(lane, counts[lane])?;
    }
    let mut sizes = [(0u64, 0u32); GROUP];
    for (size, &symbol) in sizes.iter_mut().zip(&symbols) {
        let beyond = CodecError::malformed("groups chunk", "a magnitude beyond the word");
        *size = magnitude_of::<W>(symbol).ok_or(beyond)?;
    }
    let mut left = wide_words(|at| sizes[at].1 > 0);
    while left != [0; MAX_LANES] {
        let next = next_words(&mut left);
        for piece in 0..W::BITS.div_ceil(POP) {
            for (lane, at) in next.iter().enumerate().filter_map(|(lane, at)| Some((lane, (*at)?))) {
                let count = POP.min(sizes[at].1.saturating_sub(POP * piece));
                sizes[at].0 += decoder.pop(lane, count)? << (POP * piece);
            }
        }
    }
    for at in (0..words).filter(|&at| symbols[at] != 0) {
        let signs = &mut signs[at / RUN];
        let step = step_of::<W>(*signs & 1, sizes[at].0);
        *signs >>= 1;
        set_word(group, at, context.word(at, word_at::<W>(group, at), step));
    }
    Ok(())
}
