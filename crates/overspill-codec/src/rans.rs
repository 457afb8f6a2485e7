//! Interleaved range asymmetric numeral systems: 32-bit states, 16-bit words, probabilities of 12 bits.
//!
//! Symbol n belongs to lane n mod K. Decoding symbol n advances its lane's state and, when the state has fallen
//! below 2^16, pulls in the next word of the one shared word stream. Lanes therefore decode in lockstep on a
//! warp: which lanes pull, and in which order, follows from a ballot. The encoder runs backwards.

use std::sync::OnceLock;

use crate::CodecError;
use crate::bits::{BitReader, BitWriter};

/// Bits of a probability.
pub(crate) const PROB_BITS: u32 = 12;
/// What the frequencies of a table sum to.
pub(crate) const PROB_TOTAL: u32 = 1 << PROB_BITS;
/// Lower end of the interval that states live in between symbols.
pub(crate) const STATE_LOW: u32 = 1 << 16;
/// Most lanes.
pub(crate) const MAX_LANES: usize = 32;

/// Per slot: symbol | (frequency - 1) << 8 | (slot - first slot) << 20.
pub(crate) type Slots = [u32; PROB_TOTAL as usize];

/// Frequencies of one alphabet. What only decoding needs is built when it is first asked for: small tensors have
/// many tables and few symbols.
#[derive(Debug, Clone)]
pub(crate) struct SymbolTable {
    /// Per symbol: first slot and frequency.
    pub(crate) ranges: Vec<(u16, u16)>,
    slots: OnceLock<Box<Slots>>,
}

impl SymbolTable {
    /// Build from frequencies (index = symbol, at most 256) that sum to [`PROB_TOTAL`].
    pub(crate) fn new(frequencies: &[u16]) -> Self {
        let mut start = 0;
        let ranges = frequencies.iter().map(|&frequency| {
            let range = (start, frequency);
            start += frequency;
            range
        });
        let ranges = ranges.collect();
        debug_assert_eq!(u32::from(start), PROB_TOTAL);
        SymbolTable { ranges, slots: OnceLock::new() }
    }

    /// The decoding table.
    pub(crate) fn slots(&self) -> &Slots {
        self.slots.get_or_init(|| {
            let mut slots = Box::new([0; PROB_TOTAL as usize]);
            for (symbol, &(start, frequency)) in self.ranges.iter().enumerate() {
                let own = &mut slots[usize::from(start)..usize::from(start + frequency)];
                for (bias, slot) in own.iter_mut().enumerate() {
                    *slot = symbol as u32 | (u32::from(frequency) - 1) << 8 | (bias as u32) << 20;
                }
            }
            slots
        })
    }

    /// Bits that `symbol` costs.
    pub(crate) fn cost_bits(&self, symbol: usize) -> f64 {
        f64::from(PROB_BITS) - f64::from(self.ranges[symbol].1).log2()
    }
}

/// Collects symbols in order; [`Encoder::finish`] codes them backwards.
#[derive(Default)]
pub(crate) struct Encoder {
    ranges: Vec<(u16, u16)>,
}

impl Encoder {
    pub(crate) fn push(&mut self, table: &SymbolTable, symbol: usize) {
        self.ranges.push(table.ranges[symbol]);
    }

    pub(crate) fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Append the lanes' states (4 bytes each), then the words. `seeds` are the states that decoding ends in.
    pub(crate) fn finish(&self, seeds: &[u32], out: &mut Vec<u8>) {
        let (states, words) = self.run(seeds);
        put_coded(&states[..seeds.len()], words.iter().rev(), out);
    }

    /// As [`Encoder::finish`], each state in as few bits as it needs: 4 bits n - 16, then the n bits below its
    /// leading one; padded to a byte. A state takes 28 bits on average, of which 24 carry information.
    pub(crate) fn finish_packed(&self, seeds: &[u32], out: &mut Vec<u8>) {
        let (states, words) = self.run(seeds);
        let mut bits = BitWriter::new();
        for state in &states[..seeds.len()] {
            bits.put(u64::from(state.ilog2() - 16), 4);
            bits.put(u64::from(*state), state.ilog2());
        }
        out.extend_from_slice(&bits.finish());
        put_words(words.iter().rev(), out);
    }

    /// The states that decoding starts in, and the words, last one first.
    fn run(&self, seeds: &[u32]) -> ([u32; MAX_LANES], Vec<u16>) {
        let mut states = [STATE_LOW; MAX_LANES];
        states[..seeds.len()].copy_from_slice(seeds);
        let mask = seeds.len() - 1;
        let mut words: Vec<u16> = Vec::with_capacity(self.ranges.len());
        for (n, &range) in self.ranges.iter().enumerate().rev() {
            if let Some(word) = encode_step(&mut states[n & mask], range) {
                words.push(word);
            }
        }
        (states, words)
    }
}

/// Append states and words.
pub(crate) fn put_coded<'a>(
    states: &[u32],
    words: impl ExactSizeIterator<Item = &'a u16>,
    out: &mut Vec<u8>,
) {
    for state in states {
        out.extend_from_slice(&state.to_le_bytes());
    }
    put_words(words, out);
}

/// Append words, little endian.
pub(crate) fn put_words<'a>(words: impl ExactSizeIterator<Item = &'a u16>, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + 2 * words.len(), 0);
    for (bytes, word) in out[start..].as_chunks_mut::<2>().0.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
}

/// Push one symbol onto a state; the word to emit, if any.
#[inline(always)]
pub(crate) fn encode_step(state: &mut u32, range: (u16, u16)) -> Option<u16> {
    encode_symbol(state, range, PROB_BITS)
}

/// As [`encode_step`] for frequencies that sum to 2^`bits`, at most 16.
#[inline(always)]
pub(crate) fn encode_symbol(state: &mut u32, (start, frequency): (u16, u16), bits: u32) -> Option<u16> {
    let (mut x, frequency) = (*state, u32::from(frequency));
    let mut word = None;
    if u64::from(x) >= u64::from(frequency) << (32 - bits) {
        word = Some(x as u16);
        x >>= 16;
    }
    *state = ((x / frequency) << bits) + x % frequency + u32::from(start);
    word
}

/// Entropy-code bytes, each of which has a frequency in `table`, on 32 lanes: the lanes' states, and where in `room` their
/// words start, which go on to its end. What `room` holds before does not matter.
pub(crate) fn encode_bytes(
    bytes: &[u8],
    table: &SymbolTable,
    room: &mut Vec<u16>,
) -> ([u32; MAX_LANES], usize) {
    let mut encoder = Encoder::default();
    for &byte in bytes {
        encoder.push(table, byte.into());
    }
    let (states, words) = encoder.run(&[STATE_LOW; MAX_LANES]);
    room.clear();
    room.extend(words.iter().rev());
    (states, 0)
}

/// Decodes symbols in order from lanes over one word stream.
pub(crate) struct Decoder<'a> {
    pub(crate) states: [u32; MAX_LANES],
    mask: usize,
    next: usize,
    words: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// `bytes` starts with the states of `lanes` (a power of two up to 32) lanes.
    pub(crate) fn new(bytes: &'a [u8], lanes: usize) -> Result<Self, CodecError> {
        let (front, words) = bytes.split_at_checked(lanes * 4).ok_or(ends_early())?;
        let mut states = [STATE_LOW; MAX_LANES];
        for (state, bytes) in states.iter_mut().zip(front.as_chunks::<4>().0) {
            *state = u32::from_le_bytes(*bytes);
            if *state < STATE_LOW {
                return Err(CodecError::malformed("rANS state", "below its interval"));
            }
        }
        Ok(Decoder { states, mask: lanes - 1, next: 0, words })
    }

    /// As [`Decoder::new`] for states in the form of [`Encoder::finish_packed`].
    pub(crate) fn new_packed(bytes: &'a [u8], lanes: usize) -> Result<Self, CodecError> {
        let mut bits = BitReader::new(bytes);
        let mut states = [STATE_LOW; MAX_LANES];
        for state in &mut states[..lanes] {
            let width = bits.get(4)? as u32 + 16;
            *state = 1 << width | bits.get(width)? as u32;
        }
        Ok(Decoder { states, mask: lanes - 1, next: 0, words: &bytes[bits.bytes_read()..] })
    }

    /// The next symbol.
    #[inline(always)]
    pub(crate) fn symbol(&mut self, slots: &Slots) -> Result<u8, CodecError> {
        let lane = self.next & self.mask;
        self.next += 1;
        self.symbol_of(lane, slots)
    }

    /// The next symbol of a lane, out of turn.
    #[inline(always)]
    pub(crate) fn symbol_of(&mut self, lane: usize, slots: &Slots) -> Result<u8, CodecError> {
        let x = self.states[lane];
        let slot = slots[(x & (PROB_TOTAL - 1)) as usize];
        self.refill(lane, ((slot >> 8 & 0xfff) + 1) * (x >> PROB_BITS) + (slot >> 20))?;
        Ok(slot as u8)
    }

    /// Whether the lane's next symbol is the one that the first `frequency` slots are of; the others are of another.
    /// A symbol that cannot be takes nothing.
    #[inline(always)]
    pub(crate) fn flag(&mut self, lane: usize, frequency: u32) -> Result<bool, CodecError> {
        let x = self.states[lane];
        let (slot, high) = (x & (PROB_TOTAL - 1), frequency * (x >> PROB_BITS));
        let is_set = slot < frequency;
        self.refill(lane, if is_set { high + slot } else { x - frequency - high })?;
        Ok(is_set)
    }

    /// The low `count` bits of a lane's state, at most 16, as they are.
    #[inline(always)]
    pub(crate) fn pop(&mut self, lane: usize, count: u32) -> Result<u64, CodecError> {
        let x = self.states[lane];
        self.refill(lane, x >> count)?;
        Ok(u64::from(x & ((1 << count) - 1)))
    }

    #[inline(always)]
    fn refill(&mut self, lane: usize, mut x: u32) -> Result<(), CodecError> {
        if x < STATE_LOW {
            let (word, rest) = self.words.split_first_chunk::<2>().ok_or(ends_early())?;
            x = x << 16 | u32::from(u16::from_le_bytes(*word));
            self.words = rest;
        }
        self.states[lane] = x;
        Ok(())
    }

    /// The next `bytes.len()` symbols of one table.
    pub(crate) fn bytes(&mut self, table: &SymbolTable, bytes: &mut [u8]) -> Result<(), CodecError> {
        let slots = table.slots();
        for byte in bytes {
            *byte = self.symbol(slots)?;
        }
        Ok(())
    }

    /// The next symbols, each of the table that `classes` names; `slots` holds the tables one behind the other.
    pub(crate) fn classed(
        &mut self,
        slots: &[u32],
        classes: &[u8],
        bytes: &mut [u8],
    ) -> Result<(), CodecError> {
        let (tables, _) = slots.as_chunks();
        for (byte, &class) in bytes.iter_mut().zip(classes) {
            *byte = self.symbol(&tables[usize::from(class)])?;
        }
        Ok(())
    }

    /// How many symbols are left until lane 0 is next, where all lanes are in use.
    pub(crate) fn until_first_lane(&self) -> Option<usize> {
        (self.mask == MAX_LANES - 1).then(|| self.next.wrapping_neg() % MAX_LANES)
    }

    /// Go on behind whole groups of 32 symbols that were decoded elsewhere, with `words` left.
    pub(crate) fn resume_at(&mut self, words: &'a [u8]) {
        self.words = words;
    }

    /// Check that everything was read and that the lanes ended where the encoder started them.
    pub(crate) fn finish(&self) -> Result<(), CodecError> {
        if !self.words.is_empty() || self.states.iter().any(|&state| state != STATE_LOW) {
            return Err(CodecError::malformed("rANS stream", "symbols left over"));
        }
        Ok(())
    }

    /// What follows the words read so far.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.words
    }
}

fn ends_early() -> CodecError {
    CodecError::malformed("rANS stream", "ends early")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_come_back_on_any_number_of_lanes() {
        let table = SymbolTable::new(&[1, 4000, 0, 90, 5]);
        let single = SymbolTable::new(&[0, 4096]);
        println!("seed 7");
        let mut rng = fastrand::Rng::with_seed(7);
        for lanes in [1usize, 2, 8, 32] {
            let symbols: Vec<usize> = (0..5000)
                .map(|i| if i % 3 == 0 { 1 } else { rng.choice([0, 1, 1, 1, 3, 4]).unwrap() })
                .collect();
            let mut encoder = Encoder::default();
            for (i, &s) in symbols.iter().enumerate() {
                encoder.push(if i % 3 == 0 { &single } else { &table }, s);
            }
            let seeds: Vec<u32> = (0..lanes).map(|_| STATE_LOW | rng.u32(..STATE_LOW)).collect();
            let mut bytes = vec![];
            encoder.finish(&seeds, &mut bytes);
            bytes.extend_from_slice(b"tail");
            let mut decoder = Decoder::new(&bytes, lanes).unwrap();
            for (i, &s) in symbols.iter().enumerate() {
                let table = if i % 3 == 0 { &single } else { &table };
                assert_eq!(decoder.symbol(table.slots()).unwrap() as usize, s);
            }
            assert_eq!(decoder.rest(), b"tail");
            assert_eq!(&decoder.states[..lanes], seeds);
            assert!((table.cost_bits(0) - 12.0).abs() < 1e-9);
        }
    }
}
