//! Mode F: a symbol for every word, whether it changed, in an order in which 32 lanes go once through base and payload.
//!
//! A group of 1024 words is 4 times 32 lanes times 8 neighbouring words. Payload after the mode byte: 32 lane states,
//! packed, which decoding must bring back to 2^16; then the word stream to the payload's end. Per group:
//! - 32 steps (4 times 8) of all lanes: whether the lane's word changed, a change being the first `frequency` of 4096
//!   slots;
//! - the changed words, those of a lane behind those of the lane before it, 32 at a time, one a lane: first, of all of
//!   them, the magnitude's symbol if the class has a table; then the sign and above it the symbol's raw bits,
//!   popped 16 at a time from the low end.
//!
//! Popping n bits takes a state's low n bits as they are. A class whose words never change takes no symbols.

use crate::CodecError;
use crate::bits::BitWriter;
use crate::classes::{Class, ClassKind};
use crate::rans::{
    Decoder, MAX_LANES, PROB_BITS, PROB_TOTAL, STATE_LOW, SymbolTable, encode_symbol, put_words,
};
use crate::segment::SegmentSpec;
use crate::sparse::{self, SparseTables};
use crate::values::{magnitude_of, sign_magnitude, split_magnitude, step_of};
use crate::words::{Word, set_word, word_at};

/// Neighbouring words of a lane.
pub(crate) const RUN: usize = 8;
/// Words of a lane in a group.
const LANE_WORDS: usize = 32;
/// Words of a group.
const GROUP: usize = MAX_LANES * LANE_WORDS;
/// Most bits that are popped at once.
pub(crate) const POP: u32 = 16;

/// Place of the i-th word of a lane in its group.
#[inline(always)]
fn place(lane: usize, i: usize) -> usize {
    i / RUN * RUN * MAX_LANES + lane * RUN + i % RUN
}

/// What is known of a word by its base's key.
#[derive(Clone, Copy, Default)]
struct Key<'a> {
    /// Slots of a change.
    frequency: u32,
    values: Option<&'a SymbolTable>,
}

fn keys_of(classes: &[Class]) -> [Key<'_>; 256] {
    let mut keys = [Key::default(); 256];
    for class in classes {
        if let ClassKind::Flags(frequency) = class.kind {
            let values = class.values.as_ref();
            keys[usize::from(class.low)..=usize::from(class.high)].fill(Key { frequency, values });
        }
    }
    keys
}

/// One symbol of one lane, `bits` being what the frequencies sum to as a power of two.
pub(crate) struct Symbol {
    lane: u8,
    bits: u8,
    range: (u16, u16),
}

impl Symbol {
    /// A symbol that starts at `range.0` and has frequency `range.1`. What is popped has frequency 1.
    pub(crate) fn new(lane: usize, range: (u16, u16), bits: u32) -> Self {
        Symbol { lane: lane as u8, bits: bits as u8, range }
    }
}

/// Append the payload of one chunk.
pub(crate) fn encode<W: Word>(
    old: &[u8],
    new: &[u8],
    tables: &SparseTables,
    spec: &SegmentSpec,
    out: &mut Vec<u8>,
) {
    let mut coder =
        Coder { keys: keys_of(&tables.classes), spec, symbols: Vec::with_capacity(old.len() / W::BYTES) };
    let group_bytes = GROUP * W::BYTES;
    for (old, new) in old.chunks(group_bytes).zip(new.chunks(group_bytes)) {
        coder.group::<W>(old, new);
    }
    finish(&coder.symbols, out);
}

struct Coder<'a> {
    keys: [Key<'a>; 256],
    spec: &'a SegmentSpec,
    symbols: Vec<Symbol>,
}

impl Coder<'_> {
    fn push(&mut self, lane: usize, start: u64, frequency: u32, bits: u32) {
        self.symbols.push(Symbol::new(lane, (start as u16, frequency as u16), bits));
    }

    fn group<W: Word>(&mut self, old: &[u8], new: &[u8]) {
        let (map, values) = sparse::maps(self.spec);
        let words = old.len() / W::BYTES;
        let mut changed = [0u32; MAX_LANES];
        for i in 0..LANE_WORDS {
            for (lane, changed) in changed.iter_mut().enumerate() {
                let at = place(lane, i);
                if at >= words {
                    break;
                }
                let base = word_at::<W>(old, at);
                let g = self.keys[usize::from(map.key(base))].frequency;
                if base != word_at::<W>(new, at) {
                    *changed |= 1 << i;
                    self.push(lane, 0, g, PROB_BITS);
                } else if g > 0 {
                    self.push(lane, g.into(), PROB_TOTAL - g, PROB_BITS);
                }
            }
        }
        for places in changed_places(&changed).chunks(MAX_LANES) {
            let mut raws = [(0, 0); MAX_LANES];
            for (lane, &at) in places.iter().enumerate() {
                let base = word_at::<W>(old, at);
                let (sign, magnitude) = sign_magnitude(values.value(base, word_at::<W>(new, at)));
                raws[lane] = (1, sign);
                if let Some(table) = self.keys[usize::from(map.key(base))].values {
                    let (symbol, width, raw) = split_magnitude::<W>(magnitude);
                    let (start, frequency) = table.ranges[usize::from(symbol)];
                    self.push(lane, start.into(), frequency.into(), PROB_BITS);
                    raws[lane] = (width + 1, raw << 1 | sign);
                }
            }
            for _ in 0..W::BITS.div_ceil(POP) {
                for (lane, (width, raw)) in raws.iter_mut().enumerate().filter(|(_, (width, _))| *width > 0) {
                    let count = POP.min(*width);
                    self.push(lane, *raw & ((1 << count) - 1), 1, count);
                    (*width, *raw) = (*width - count, *raw >> count);
                }
            }
        }
    }
}

/// Places in a group of the words that changed, lane after lane.
fn changed_places(changed: &[u32; MAX_LANES]) -> Vec<usize> {
    let mut places = Vec::new();
    for (lane, &changed) in changed.iter().enumerate() {
        let mut rest = changed;
        while rest != 0 {
            places.push(place(lane, rest.trailing_zeros() as usize));
            rest &= rest - 1;
        }
    }
    places
}

/// Code the symbols backwards; append states, then words.
pub(crate) fn finish(symbols: &[Symbol], out: &mut Vec<u8>) {
    let mut states = [STATE_LOW; MAX_LANES];
    let mut words: Vec<u16> = Vec::new();
    for symbol in symbols.iter().rev() {
        words.extend(encode_symbol(&mut states[usize::from(symbol.lane)], symbol.range, symbol.bits.into()));
    }
    let mut bits = BitWriter::new();
    for state in states {
        bits.put(u64::from(state.ilog2() - 16), 4);
        bits.put(u64::from(state), state.ilog2());
    }
    out.extend_from_slice(&bits.finish());
    put_words(words.iter().rev(), out);
}

/// Apply a payload (without its mode byte) to base words, in place.
pub(crate) fn apply<W: Word>(
    body: &[u8],
    tables: &SparseTables,
    spec: &SegmentSpec,
    words: &mut [u8],
) -> Result<(), CodecError> {
    if !tables.flags {
        return Err(CodecError::malformed("flags chunk", "classes without flags"));
    }
    let keys = keys_of(&tables.classes);
    let mut decoder = Decoder::new_packed(body, MAX_LANES)?;
    for group in words.chunks_mut(GROUP * W::BYTES) {
        apply_group::<W>(&mut decoder, &keys, spec, group)?;
    }
    decoder.finish()
}

fn apply_group<W: Word>(
    decoder: &mut Decoder<'_>,
    keys: &[Key<'_>; 256],
    spec: &SegmentSpec,
    group: &mut [u8],
) -> Result<(), CodecError> {
    let (map, values) = sparse::maps(spec);
    let words = group.len() / W::BYTES;
    let mut changed = [0u32; MAX_LANES];
    for i in 0..LANE_WORDS {
        for (lane, changed) in changed.iter_mut().enumerate() {
            let at = place(lane, i);
            if at >= words {
                break;
            }
            let key = keys[usize::from(map.key(word_at::<W>(group, at)))];
            *changed |= u32::from(decoder.flag(lane, key.frequency)?) << i;
        }
    }
    for places in changed_places(&changed).chunks(MAX_LANES) {
        // Magnitude and width of the raw bits, then the bits.
        let mut steps = [(1u64, 0u32, 0u64); MAX_LANES];
        for (lane, &at) in places.iter().enumerate() {
            let Some(table) = keys[usize::from(map.key(word_at::<W>(group, at)))].values else { continue };
            let symbol = decoder.symbol_of(lane, table.slots())?;
            let (least, width) = magnitude_of::<W>(symbol)
                .ok_or(CodecError::malformed("flags chunk", "a magnitude beyond the word"))?;
            (steps[lane].0, steps[lane].1) = (least, width);
        }
        for piece in 0..W::BITS.div_ceil(POP) {
            for (lane, (_, width, raw)) in steps[..places.len()].iter_mut().enumerate() {
                let count = POP.min((*width + 1).saturating_sub(POP * piece));
                *raw |= decoder.pop(lane, count)? << (POP * piece);
            }
        }
        for (&at, (least, _, raw)) in places.iter().zip(steps) {
            let step = step_of::<W>(raw & 1, least + (raw >> 1));
            set_word(group, at, values.word(word_at::<W>(group, at), step));
        }
    }
    Ok(())
}
