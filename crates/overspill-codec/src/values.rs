//! How one changed word's value becomes a symbol and raw bits.
//!
//! A **step** (relative patches) is a sign and a magnitude m. Magnitudes below 32 are symbols of their own; an
//! octave from there on is cut into 8 equal parts (words of 64 bits: 4 parts below 2^32 and 2 above), whose
//! offset follows as raw bits. A **final word** (absolute patches) is rotated left by one if it is a float, so
//! that its exponent is on top; its top 8 bits are the symbol, the others raw.

use crate::words::Word;

const DIRECT: u64 = 32;
const DIRECT_LOG2: u32 = 5;

/// A magnitude's symbol, and the width and content of its raw bits.
#[inline(always)]
pub(crate) fn split_magnitude<W: Word>(magnitude: u64) -> (u8, u32, u64) {
    if magnitude < DIRECT {
        return (magnitude as u8, 0, 0);
    }
    let octave = 63 - magnitude.leading_zeros();
    let (first, parts_log2) = octave_symbols::<W>(octave);
    let raw = octave - parts_log2;
    let part = (magnitude >> raw) as u32 & ((1 << parts_log2) - 1);
    ((first + part) as u8, raw, magnitude & ((1 << raw) - 1))
}

/// The smallest magnitude of a symbol and the width of its raw bits; `None` for symbols beyond the word.
#[inline(always)]
pub(crate) fn magnitude_of<W: Word>(symbol: u8) -> Option<(u64, u32)> {
    if u64::from(symbol) < DIRECT {
        return Some((u64::from(symbol), 0));
    }
    let above = u32::from(symbol) - DIRECT as u32;
    let (octave, parts_log2, part) = if W::BITS < 64 {
        (DIRECT_LOG2 + above / 8, 3, above % 8)
    } else if above < 27 * 4 {
        (DIRECT_LOG2 + above / 4, 2, above % 4)
    } else {
        (32 + (above - 27 * 4) / 2, 1, (above - 27 * 4) % 2)
    };
    if octave >= W::BITS {
        return None;
    }
    Some((u64::from(1 << parts_log2 | part) << (octave - parts_log2), octave - parts_log2))
}

#[inline(always)]
fn octave_symbols<W: Word>(octave: u32) -> (u32, u32) {
    let above = octave - DIRECT_LOG2;
    match (W::BITS < 64, octave < 32) {
        (true, _) => (DIRECT as u32 + above * 8, 3),
        (false, true) => (DIRECT as u32 + above * 4, 2),
        (false, false) => (DIRECT as u32 + 27 * 4 + (octave - 32) * 2, 1),
    }
}

/// Symbols that magnitudes of a word can have.
pub(crate) fn magnitude_alphabet<W: Word>() -> usize {
    let (last, parts_log2) = octave_symbols::<W>(W::BITS - 1);
    (last + (1 << parts_log2)) as usize
}

/// Sign (1 for negative) and magnitude of a wrapping step.
#[inline(always)]
pub(crate) fn sign_magnitude<W: Word>(step: W) -> (u64, u64) {
    let sign = step.to_u64() >> (W::BITS - 1);
    let magnitude = if sign == 1 { W::default().sub(step).to_u64() } else { step.to_u64() };
    (sign, magnitude)
}

/// Inverse of [`sign_magnitude`].
#[inline(always)]
pub(crate) fn step_of<W: Word>(sign: u64, magnitude: u64) -> W {
    let word = W::from_u64(magnitude);
    if sign == 1 { W::default().sub(word) } else { word }
}

/// Symbol and raw bits (of width [`Word::BITS`] - 8) of a final word.
#[inline(always)]
pub(crate) fn split_word<W: Word>(word: W, is_float: bool) -> (u8, u64) {
    let value = if is_float { word.rotl1() } else { word }.to_u64();
    let raw = W::BITS - 8;
    ((value >> raw) as u8, value & ((1 << raw) - 1))
}

/// Inverse of [`split_word`].
#[inline(always)]
pub(crate) fn join_word<W: Word>(symbol: u8, raw: u64, is_float: bool) -> W {
    let word = W::from_u64(u64::from(symbol) << (W::BITS - 8) | raw);
    if is_float { word.rotr1() } else { word }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<W: Word>() {
        println!("seed 11");
        let mut rng = fastrand::Rng::with_seed(11);
        let top = 1u64 << (W::BITS - 1);
        for i in 0..20_000u64 {
            let magnitude = if i < 5000 { i } else { rng.u64(..) >> rng.u32(..64) };
            let magnitude = if i == 19_999 { top } else { magnitude & (top - 1) };
            let (symbol, width, raw) = split_magnitude::<W>(magnitude);
            assert!((symbol as usize) < magnitude_alphabet::<W>());
            let (base, raw_bits) = magnitude_of::<W>(symbol).unwrap();
            assert_eq!((base + raw, raw_bits), (magnitude, width));
            for sign in [0, 1] {
                let step = step_of::<W>(sign, magnitude);
                let (s, m) = sign_magnitude(step);
                assert_eq!(step_of::<W>(s, m).to_u64(), step.to_u64());
            }
        }
        assert!(magnitude_alphabet::<W>() <= 256);
        assert!((magnitude_alphabet::<W>()..256).all(|s| magnitude_of::<W>(s as u8).is_none()));
    }

    #[test]
    fn magnitudes_come_back() {
        check::<u8>();
        check::<u16>();
        check::<u32>();
        check::<u64>();
        for word in 0..=u16::MAX {
            for is_float in [true, false] {
                let (symbol, raw) = split_word(word, is_float);
                assert_eq!(join_word::<u16>(symbol, raw, is_float), word);
            }
        }
    }
}
