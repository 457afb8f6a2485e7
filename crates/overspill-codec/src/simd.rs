//! The one file of this crate with `unsafe` in it: AVX2 twins of the hot loops, chosen at run time.
//!
//! Each public function here runs the same generic loop as its portable twin, with vector operations for the
//! inner steps where the processor has them. Tests hold the two against each other.
#![allow(unsafe_code)]

use std::ops::Range;

use crate::CodecError;
use crate::classes::KeyMap;
use crate::rans::{Decoder, Encoder, MAX_LANES, STATE_LOW, SymbolTable};
use crate::scan::{self, BlockOps, ClassEvents, Portable, ValueMap};
use crate::words::Word;

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::*;
    use core::arch::x86_64::*;

    /// Whether this processor has every instruction that the functions of this module use.
    pub(super) fn available() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt")
            && is_x86_feature_detected!("lzcnt")
    }

    /// Only named inside functions that enable AVX2 and BMI2 and are reached after [`available`].
    struct Avx2;

    impl BlockOps for Avx2 {
        #[inline(always)]
        fn mask(keys: &[u8; scan::BLOCK], low: u8, high: u8) -> u64 {
            // SAFETY: AVX2 is there (see `Avx2`); both unaligned loads lie within the 64 bytes of `keys`.
            unsafe {
                let (low, high) = (_mm256_set1_epi8(low as i8), _mm256_set1_epi8(high as i8));
                let half = |offset: usize| {
                    let keys = _mm256_loadu_si256(keys.as_ptr().add(offset).cast());
                    let above = _mm256_cmpeq_epi8(_mm256_max_epu8(keys, low), keys);
                    let below = _mm256_cmpeq_epi8(_mm256_min_epu8(keys, high), keys);
                    _mm256_movemask_epi8(_mm256_and_si256(above, below)) as u32
                };
                u64::from(half(0)) | u64::from(half(32)) << 32
            }
        }

        #[inline(always)]
        fn select(mask: u64, rank: u32) -> u32 {
            // SAFETY: BMI2 is there (see `Avx2`).
            unsafe { _pdep_u64(1 << rank, mask) }.trailing_zeros()
        }
    }

    #[target_feature(enable = "avx2,bmi1,bmi2,popcnt,lzcnt")]
    pub(super) fn apply_events<W: Word>(
        words: &mut [u8],
        ranges: &[Range<usize>],
        keys: KeyMap,
        map: ValueMap,
        events: &[ClassEvents<W>],
    ) -> bool {
        scan::apply_events::<W, Avx2>(words, ranges, keys, map, events)
    }

    #[target_feature(enable = "avx2,bmi1,bmi2,popcnt,lzcnt")]
    pub(super) fn collect_events<W: Word>(
        old: &[u8],
        new: &[u8],
        ranges: &[Range<usize>],
        keys: KeyMap,
        map: ValueMap,
        events: &mut [ClassEvents<W>],
    ) {
        scan::collect_events::<W, Avx2>(old, new, ranges, keys, map, events);
    }

    #[target_feature(enable = "avx2,bmi1,bmi2,popcnt,lzcnt")]
    pub(super) fn for_each_change<W: Word>(old: &[u8], new: &[u8], visit: impl FnMut(usize)) {
        scan::for_each_change::<W, Avx2>(old, new, visit);
    }
}

/// [`scan::apply_events`] with the fastest operations there are.
pub(crate) fn apply_events<W: Word>(
    words: &mut [u8],
    ranges: &[Range<usize>],
    keys: KeyMap,
    map: ValueMap,
    events: &[ClassEvents<W>],
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the processor has the features that the function enables.
        return unsafe { avx2::apply_events(words, ranges, keys, map, events) };
    }
    scan::apply_events::<W, Portable>(words, ranges, keys, map, events)
}

/// [`scan::collect_events`] with the fastest operations there are.
pub(crate) fn collect_events<W: Word>(
    old: &[u8],
    new: &[u8],
    ranges: &[Range<usize>],
    keys: KeyMap,
    map: ValueMap,
    events: &mut [ClassEvents<W>],
) {
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the processor has the features that the function enables.
        return unsafe { avx2::collect_events(old, new, ranges, keys, map, events) };
    }
    scan::collect_events::<W, Portable>(old, new, ranges, keys, map, events);
}

/// [`scan::for_each_change`] with the fastest operations there are.
pub(crate) fn for_each_change<W: Word>(old: &[u8], new: &[u8], visit: impl FnMut(usize)) {
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the processor has the features that the function enables.
        return unsafe { avx2::for_each_change::<W>(old, new, visit) };
    }
    scan::for_each_change::<W, Portable>(old, new, visit);
}

/// Entropy-code bytes on 32 lanes: states, then words. Every byte has a frequency in `table`.
pub(crate) fn encode_bytes(bytes: &[u8], table: &SymbolTable, out: &mut Vec<u8>) {
    let mut encoder = Encoder::default();
    for &byte in bytes {
        encoder.push(table, byte.into());
    }
    encoder.finish(&[STATE_LOW; MAX_LANES], out);
}

/// Inverse of [`encode_bytes`].
pub(crate) fn decode_bytes(coded: &[u8], table: &SymbolTable, bytes: &mut [u8]) -> Result<(), CodecError> {
    let mut decoder = Decoder::new(coded, MAX_LANES)?;
    for byte in bytes {
        *byte = decoder.symbol(table)?;
    }
    if !decoder.rest().is_empty() || decoder.states.iter().any(|&state| state != STATE_LOW) {
        return Err(CodecError::malformed("rANS stream", "symbols left over"));
    }
    Ok(())
}
