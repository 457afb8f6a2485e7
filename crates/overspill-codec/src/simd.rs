//! The one file of this crate with `unsafe` in it: AVX2 twins of the hot loops, chosen at run time.
//!
//! Each public function here runs the same generic loop as its portable twin, with vector operations for the
//! inner steps where the processor has them. Tests hold the two against each other.
#![allow(unsafe_code)]

use std::ops::Range;

use crate::CodecError;
use crate::bits::BitReader;
use crate::classes::KeyMap;
use crate::dense;
use crate::planes;
use crate::rans::{self, Decoder, MAX_LANES, SymbolTable};
use crate::record;
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
        fn count(keys: &scan::RunKeys, high: u8) -> u32 {
            // SAFETY: AVX2 is there (see `Avx2`); every unaligned load lies within the 64 bytes of one block.
            unsafe {
                let high = _mm256_set1_epi8(high as i8);
                // A count in each byte lane: at most 16, two for each block.
                let mut counts = _mm256_setzero_si256();
                for block in keys {
                    for offset in [0, 32] {
                        let keys = _mm256_loadu_si256(block.as_ptr().add(offset).cast());
                        let below = _mm256_cmpeq_epi8(_mm256_min_epu8(keys, high), keys);
                        counts = _mm256_sub_epi8(counts, below);
                    }
                }
                let sums = _mm256_sad_epu8(counts, _mm256_setzero_si256());
                let sums = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
                (_mm_cvtsi128_si64(sums) + _mm_extract_epi64::<1>(sums)) as u32
            }
        }

        #[inline(always)]
        fn mask(keys: &[u8; scan::BLOCK], low: u8, high: u8) -> u64 {
            // SAFETY: AVX2 is there (see `Avx2`); both unaligned loads lie within the 64 bytes of `keys`.
            unsafe {
                // low <= key <= high exactly where key - low, wrapping, is at most high - low.
                let (low, span) = (_mm256_set1_epi8(low as i8), _mm256_set1_epi8((high - low) as i8));
                let half = |offset: usize| {
                    let keys = _mm256_loadu_si256(keys.as_ptr().add(offset).cast());
                    let above = _mm256_sub_epi8(keys, low);
                    _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_min_epu8(above, span), above)) as u32
                };
                u64::from(half(0)) | u64::from(half(32)) << 32
            }
        }

        #[inline(always)]
        fn range_bits(keys: &[u8; scan::BLOCK], ranges: &scan::KeyRanges) -> [u64; scan::RANGE_BITS] {
            let Some((first, window)) = &ranges.window else {
                return Portable::range_bits(keys, ranges);
            };
            let mut bits = [0; scan::RANGE_BITS];
            // SAFETY: AVX2 is there (see `Avx2`); the unaligned loads lie within the 64 bytes of `keys` and of `window`.
            unsafe {
                let mut tables = [_mm256_setzero_si256(); 4];
                for (table, ranges) in tables.iter_mut().zip(window.as_chunks::<16>().0) {
                    *table = _mm256_broadcastsi128_si256(_mm_loadu_si128(ranges.as_ptr().cast()));
                }
                let (first, last) =
                    (_mm256_set1_epi8(*first as i8), _mm256_set1_epi8(scan::WINDOW as i8 - 1));
                for (half, keys) in keys.as_chunks::<32>().0.iter().enumerate() {
                    let keys = _mm256_loadu_si256(keys.as_ptr().cast());
                    let place = _mm256_min_epu8(_mm256_subs_epu8(keys, first), last);
                    // Each shuffle takes the low 4 bits of a place; bits 4 and 5 choose between the four.
                    let odd = _mm256_slli_epi16::<3>(place);
                    let lower = _mm256_blendv_epi8(
                        _mm256_shuffle_epi8(tables[0], place),
                        _mm256_shuffle_epi8(tables[1], place),
                        odd,
                    );
                    let upper = _mm256_blendv_epi8(
                        _mm256_shuffle_epi8(tables[2], place),
                        _mm256_shuffle_epi8(tables[3], place),
                        odd,
                    );
                    let mut number = _mm256_slli_epi16::<{ 8 - scan::RANGE_BITS as i32 }>(
                        _mm256_blendv_epi8(lower, upper, _mm256_slli_epi16::<2>(place)),
                    );
                    for mask in bits.iter_mut().rev() {
                        *mask |= u64::from(_mm256_movemask_epi8(number) as u32) << (32 * half);
                        number = _mm256_slli_epi16::<1>(number);
                    }
                }
            }
            bits
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
        changed: &[u64],
        values: &[W],
        ranges: &[Range<usize>],
        keys: KeyMap,
        events: &mut [ClassEvents<W>],
    ) {
        scan::collect_events::<W, Avx2>(old, changed, values, ranges, keys, events);
    }

    #[target_feature(enable = "avx2,bmi1,bmi2,popcnt,lzcnt")]
    pub(super) fn change_masks<W: Word>(old: &[u8], new: &[u8], masks: &mut Vec<u64>) {
        scan::change_masks::<W, Avx2>(old, new, masks);
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn count_nonzero<W: Word>(words: &[u8]) -> u32 {
        scan::count_nonzero::<W>(words)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn count_keys<W: Word>(
        words: &[u8],
        keys: KeyMap,
        stride: usize,
        tables: &mut scan::KeyTables,
    ) {
        scan::count_keys::<W>(words, keys, stride, tables);
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn split_plane<W: Word>(words: &[u8], is_float: bool, shift: u32, plane: &mut [u8]) {
        planes::split_plane::<W>(words, is_float, shift, plane);
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn keyed_sum(bytes: &[u8]) -> u64 {
        record::keyed_sum(bytes)
    }

    #[target_feature(enable = "avx2,bmi1,bmi2,popcnt,lzcnt")]
    pub(super) fn apply_symbols<W: Word>(
        symbols: &[u8; dense::STRETCH],
        context: &impl dense::Context<W>,
        first: usize,
        raw: &mut BitReader<'_>,
        words: &mut [u8],
    ) -> Result<(), CodecError> {
        dense::apply_symbols::<W, Avx2, _>(symbols, context, first, raw, words)
    }

    /// A byte shuffle that leaves zeros behind.
    const NONE: u8 = 0x80;

    /// Per set of lanes (bit mask): the shuffle that gives each lane of the set the next of a run of words.
    static EXPAND: [[u8; 16]; 256] = {
        let mut table = [[NONE; 16]; 256];
        let mut mask = 0;
        while mask < 256 {
            let (mut lane, mut next) = (0, 0);
            while lane < 8 {
                if mask >> lane & 1 == 1 {
                    table[mask][2 * lane] = 2 * next;
                    table[mask][2 * lane + 1] = 2 * next + 1;
                    next += 1;
                }
                lane += 1;
            }
            mask += 1;
        }
        table
    };

    /// Per set of lanes: the shuffle that puts the words of the set, in order, in the last places.
    static COMPRESS: [[u8; 16]; 256] = {
        let mut table = [[NONE; 16]; 256];
        let mut mask = 0;
        while mask < 256 {
            let (mut lane, mut next) = (8, 8);
            while lane > 0 {
                lane -= 1;
                if mask >> lane & 1 == 1 {
                    next -= 1;
                    table[mask][2 * next] = 2 * lane as u8;
                    table[mask][2 * next + 1] = 2 * lane as u8 + 1;
                }
            }
            mask += 1;
        }
        table
    };

    /// The shuffle that a set of lanes has in one of the tables.
    #[target_feature(enable = "avx2")]
    fn shuffle_of(table: &[[u8; 16]; 256], lanes: u8) -> __m128i {
        // SAFETY: an unaligned load of exactly the 16 bytes of the entry.
        unsafe { _mm_loadu_si128(table[usize::from(lanes)].as_ptr().cast()) }
    }

    /// A bit for each lane of which all bits are set; the others have none.
    #[target_feature(enable = "avx2")]
    fn lanes_of(mask: __m256i) -> u8 {
        _mm256_movemask_ps(_mm256_castsi256_ps(mask)) as u8
    }

    #[target_feature(enable = "avx2")]
    fn load8(values: &[u32; 8]) -> __m256i {
        // SAFETY: an unaligned load of exactly the 32 bytes of the array.
        unsafe { _mm256_loadu_si256(values.as_ptr().cast()) }
    }

    /// The entries of a table that the lanes of `slots`, each below its length, name. By scalar loads: on a Zen 3 core a
    /// decoder takes 0.58 ns a symbol with them, 0.67 ns with a gather.
    #[target_feature(enable = "avx2")]
    fn look_up(table: &rans::Slots, slots: __m256i) -> __m256i {
        const LAST: usize = rans::PROB_TOTAL as usize - 1;
        let (a, b) = (_mm256_extract_epi64::<0>(slots), _mm256_extract_epi64::<1>(slots));
        let (c, d) = (_mm256_extract_epi64::<2>(slots), _mm256_extract_epi64::<3>(slots));
        let low = |pair: i64| table[pair as usize & LAST] as i32;
        let high = |pair: i64| table[(pair >> 32) as usize & LAST] as i32;
        _mm256_setr_epi32(low(a), high(a), low(b), high(b), low(c), high(c), low(d), high(d))
    }

    #[target_feature(enable = "avx2")]
    fn store8(values: &mut [u32; 8], vector: __m256i) {
        // SAFETY: an unaligned store of exactly the 32 bytes of the array.
        unsafe { _mm256_storeu_si256(values.as_mut_ptr().cast(), vector) }
    }

    /// Decode whole groups of 32 symbols while the words of a group and the 8 of an overhanging load are left.
    /// Returns how many bytes were written; the decoder stands behind them. With `BY_CLASS` each symbol is of the
    /// table in `slots` that its byte of `classes` names, else of the first.
    #[target_feature(enable = "avx2,bmi1,bmi2,popcnt,lzcnt")]
    pub(super) fn decode_groups<const BY_CLASS: bool>(
        decoder: &mut Decoder<'_>,
        slots: &[u32],
        classes: &[u8],
        bytes: &mut [u8],
    ) -> usize {
        let last_class = if BY_CLASS { classes.iter().copied().max().unwrap_or(0) } else { 0 };
        assert!(slots.len() >= (usize::from(last_class) + 1) << rans::PROB_BITS);
        assert!(!BY_CLASS || classes.len() == bytes.len());
        let mut states = [_mm256_setzero_si256(); 4];
        for (vector, lanes) in states.iter_mut().zip(decoder.states.as_chunks::<8>().0) {
            *vector = load8(lanes);
        }
        let first_table: &rans::Slots = slots.first_chunk().expect("a table, checked above");
        let slot_mask = _mm256_set1_epi32(rans::PROB_TOTAL as i32 - 1);
        let (byte_mask, one, zero) = (_mm256_set1_epi32(0xff), _mm256_set1_epi32(1), _mm256_setzero_si256());
        let mut words = decoder.rest();
        let mut done = 0;
        for (number, group) in bytes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            if words.len() < 2 * (32 + 8) {
                break;
            }
            let mut symbols = [zero; 4];
            for (lane, (x, symbols)) in states.iter_mut().zip(&mut symbols).enumerate() {
                let slot = _mm256_and_si256(*x, slot_mask);
                let entry = if BY_CLASS {
                    let own: &[u8; 8] =
                        classes[number * 32 + lane * 8..].first_chunk().expect("a class a symbol");
                    // SAFETY: a load of exactly the 8 bytes of `own`.
                    let own = _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(own.as_ptr().cast()) });
                    let slot = _mm256_or_si256(slot, _mm256_slli_epi32::<{ rans::PROB_BITS as i32 }>(own));
                    // SAFETY: every index is below 4096 for each class up to the last: the length of `slots` or less.
                    unsafe { _mm256_i32gather_epi32::<4>(slots.as_ptr().cast(), slot) }
                } else {
                    look_up(first_table, slot)
                };
                *symbols = _mm256_and_si256(entry, byte_mask);
                let frequency = _mm256_and_si256(_mm256_srli_epi32::<8>(entry), slot_mask);
                let frequency = _mm256_add_epi32(frequency, one);
                let high = _mm256_srli_epi32::<{ rans::PROB_BITS as i32 }>(*x);
                let bias = _mm256_srli_epi32::<20>(entry);
                let next = _mm256_add_epi32(_mm256_mullo_epi32(frequency, high), bias);
                let low = _mm256_cmpeq_epi32(_mm256_srli_epi32::<16>(next), zero);
                let lanes = lanes_of(low);
                let run: &[u8; 16] =
                    words.first_chunk().expect("8 words beyond the group's own, checked above");
                // SAFETY: an unaligned load of exactly the 16 bytes of `run`.
                let run = unsafe { _mm_loadu_si128(run.as_ptr().cast()) };
                let spread = _mm256_cvtepu16_epi32(_mm_shuffle_epi8(run, shuffle_of(&EXPAND, lanes)));
                // By 16 bits where a word came, else by none.
                let up = _mm256_and_si256(low, _mm256_set1_epi32(16));
                *x = _mm256_or_si256(_mm256_sllv_epi32(next, up), spread);
                words = &words[2 * lanes.count_ones() as usize..];
            }
            let low = _mm256_packus_epi32(symbols[0], symbols[1]);
            let high = _mm256_packus_epi32(symbols[2], symbols[3]);
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
            // SAFETY: an unaligned store of exactly the 32 bytes of `group`.
            unsafe { _mm256_storeu_si256(group.as_mut_ptr().cast(), packed) };
            done += 32;
        }
        for (vector, lanes) in states.iter().zip(decoder.states.as_chunks_mut::<8>().0) {
            store8(lanes, *vector);
        }
        decoder.resume_at(words);
        done
    }

    /// As [`rans::encode_bytes`]; the words are collected from the back of `room`.
    #[target_feature(enable = "avx2,bmi1,bmi2,popcnt,lzcnt")]
    pub(super) fn encode_bytes(
        bytes: &[u8],
        table: &SymbolTable,
        room: &mut Vec<u16>,
    ) -> ([u32; MAX_LANES], usize) {
        let mut ranges = [0u32; 256];
        for (packed, &(start, frequency)) in ranges.iter_mut().zip(&table.ranges) {
            *packed = u32::from(start) | u32::from(frequency) << 16;
        }
        let (groups, tail) = bytes.as_chunks::<32>();
        let mut lanes = [rans::STATE_LOW; MAX_LANES];
        room.resize(room.len().max(bytes.len() + 8), 0);
        let mut first = room.len();
        for (lane, &byte) in tail.iter().enumerate().rev() {
            if let Some(word) = rans::encode_step(&mut lanes[lane], table.ranges[usize::from(byte)]) {
                first -= 1;
                room[first] = word;
            }
        }
        let mut states = [_mm256_setzero_si256(); 4];
        for (vector, lanes) in states.iter_mut().zip(lanes.as_chunks::<8>().0) {
            *vector = load8(lanes);
        }
        let low_half = _mm256_set1_epi32(0xffff);
        for group in groups.iter().rev() {
            for (x, &symbols) in states.iter_mut().zip(group.as_chunks::<8>().0).rev() {
                let [a, b, c, d, e, f, g, h] = symbols.map(|symbol| ranges[usize::from(symbol)] as i32);
                let entry = _mm256_setr_epi32(a, b, c, d, e, f, g, h);
                let (start, frequency) = (_mm256_and_si256(entry, low_half), _mm256_srli_epi32::<16>(entry));
                // A word goes out where x >= frequency << 20.
                let keep = _mm256_cmpgt_epi32(frequency, _mm256_srli_epi32::<20>(*x));
                let out = !lanes_of(keep);
                let low = _mm256_and_si256(*x, low_half);
                let low = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256::<1>(low));
                let run = _mm_shuffle_epi8(low, shuffle_of(&COMPRESS, out));
                // Elements in front of the run are not written yet.
                let space: &mut [u16; 8] =
                    room[..first].last_chunk_mut().expect("8 spare words in front of one for each symbol");
                // SAFETY: an unaligned store of exactly the 16 bytes of `space`.
                unsafe { _mm_storeu_si128(space.as_mut_ptr().cast(), run) };
                first -= out.count_ones() as usize;
                let x_now = _mm256_blendv_epi8(_mm256_srli_epi32::<16>(*x), *x, keep);
                *x = _mm256_add_epi32(push(x_now, frequency), start);
            }
        }
        for (vector, lanes) in states.iter().zip(lanes.as_chunks_mut::<8>().0) {
            store8(lanes, *vector);
        }
        (lanes, first)
    }

    /// (x / f << 12) + x % f per lane for 1 <= f <= 4096 and x < f << 20. The float estimate of the quotient is at most
    /// one off: halving x loses at most 1/f of it, which is below 2^20, and the roundings less than 2^-22 of it.
    #[target_feature(enable = "avx2")]
    fn push(x: __m256i, f: __m256i) -> __m256i {
        let half = _mm256_cvtepi32_ps(_mm256_srli_epi32::<1>(x));
        let estimate = _mm256_div_ps(_mm256_add_ps(half, half), _mm256_cvtepi32_ps(f));
        let quotient = _mm256_cvttps_epi32(estimate);
        let remainder = _mm256_sub_epi32(x, _mm256_mullo_epi32(quotient, f));
        let joined = _mm256_add_epi32(_mm256_slli_epi32::<{ rans::PROB_BITS as i32 }>(quotient), remainder);
        // A quotient of one less has a remainder of f more, and the other way around.
        let one_less = _mm256_sub_epi32(f, _mm256_set1_epi32(rans::PROB_TOTAL as i32));
        let above = _mm256_cmpgt_epi32(_mm256_setzero_si256(), remainder);
        let joined = _mm256_add_epi32(joined, _mm256_and_si256(above, one_less));
        let remainder = _mm256_add_epi32(remainder, _mm256_and_si256(above, f));
        let exact = _mm256_cmpgt_epi32(f, remainder);
        _mm256_sub_epi32(joined, _mm256_andnot_si256(exact, one_less))
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
    changed: &[u64],
    values: &[W],
    ranges: &[Range<usize>],
    keys: KeyMap,
    events: &mut [ClassEvents<W>],
) {
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the processor has the features that the function enables.
        return unsafe { avx2::collect_events(old, changed, values, ranges, keys, events) };
    }
    scan::collect_events::<W, Portable>(old, changed, values, ranges, keys, events);
}

/// [`scan::change_masks`] with the fastest operations there are.
pub(crate) fn change_masks<W: Word>(old: &[u8], new: &[u8], masks: &mut Vec<u64>) {
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the processor has the features that the function enables.
        return unsafe { avx2::change_masks::<W>(old, new, masks) };
    }
    scan::change_masks::<W, Portable>(old, new, masks);
}

/// [`scan::count_nonzero`] with the fastest operations there are.
pub(crate) fn count_nonzero<W: Word>(words: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the processor has the features that the function enables.
        return unsafe { avx2::count_nonzero::<W>(words) };
    }
    scan::count_nonzero::<W>(words)
}

/// [`scan::count_keys`] with the fastest operations there are.
pub(crate) fn count_keys<W: Word>(words: &[u8], keys: KeyMap, stride: usize, tables: &mut scan::KeyTables) {
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the processor has the features that the function enables.
        return unsafe { avx2::count_keys::<W>(words, keys, stride, tables) };
    }
    scan::count_keys::<W>(words, keys, stride, tables);
}

/// [`planes::split_plane`] with the fastest operations there are.
pub(crate) fn split_plane<W: Word>(words: &[u8], is_float: bool, shift: u32, plane: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the processor has the features that the function enables.
        return unsafe { avx2::split_plane::<W>(words, is_float, shift, plane) };
    }
    planes::split_plane::<W>(words, is_float, shift, plane);
}

/// [`record::keyed_sum`] with the fastest operations there are.
pub(crate) fn keyed_sum(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the processor has the features that the function enables.
        return unsafe { avx2::keyed_sum(bytes) };
    }
    record::keyed_sum(bytes)
}

/// [`rans::encode_bytes`] with the fastest operations there are.
pub(crate) fn encode_bytes(
    bytes: &[u8],
    table: &SymbolTable,
    room: &mut Vec<u16>,
) -> ([u32; MAX_LANES], usize) {
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the processor has the features that the function enables.
        return unsafe { avx2::encode_bytes(bytes, table, room) };
    }
    rans::encode_bytes(bytes, table, room)
}

/// The next `bytes.len()` symbols of one table.
pub(crate) fn decode_next(
    decoder: &mut Decoder<'_>,
    table: &SymbolTable,
    mut bytes: &mut [u8],
) -> Result<(), CodecError> {
    #[cfg(target_arch = "x86_64")]
    if let (true, Some(odd)) = (avx2::available(), decoder.until_first_lane())
        && bytes.len() >= odd + MAX_LANES
    {
        let (front, groups) = bytes.split_at_mut(odd);
        decoder.bytes(table, front)?;
        // SAFETY: the processor has the features that the function enables.
        let done = unsafe { avx2::decode_groups::<false>(decoder, table.slots(), &[], groups) };
        bytes = &mut groups[done..];
    }
    decoder.bytes(table, bytes)
}

/// The next symbols of a decoder that stands at a multiple of [`MAX_LANES`] symbols, each of the table that `classes`
/// names; `slots` holds the tables one behind the other.
pub(crate) fn decode_classed(
    decoder: &mut Decoder<'_>,
    slots: &[u32],
    classes: &[u8],
    bytes: &mut [u8],
) -> Result<(), CodecError> {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the processor has the features that the function enables.
        done = unsafe { avx2::decode_groups::<true>(decoder, slots, classes, bytes) };
    }
    decoder.classed(slots, &classes[done..], &mut bytes[done..])
}

/// [`dense::apply_symbols`] with the fastest operations there are.
pub(crate) fn apply_symbols<W: Word>(
    symbols: &[u8; dense::STRETCH],
    context: &impl dense::Context<W>,
    first: usize,
    raw: &mut BitReader<'_>,
    words: &mut [u8],
) -> Result<(), CodecError> {
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the processor has the features that the function enables.
        return unsafe { avx2::apply_symbols(symbols, context, first, raw, words) };
    }
    dense::apply_symbols::<W, Portable, _>(symbols, context, first, raw, words)
}

#[cfg(test)]
mod tests;
