//! Scans over the base's words: which words of a class are there, and where is the r-th one.
//!
//! Most words did not change, so classes are counted over runs of 512 words, and only a class with a change in the
//! run has its words told apart, in blocks of 64. The ends of a range, shorter than a run, go by blocks alone.
//!
//! The loops are written once over [`BlockOps`]; the portable operations here are the reference, `simd` has the
//! AVX2 ones and picks them at run time.

use std::ops::Range;

use crate::classes::KeyMap;
use crate::words::{OrderMap, Word, set_word, word_at};

/// Words in a block.
pub(crate) const BLOCK: usize = 64;

/// Blocks in a run.
pub(crate) const RUN_BLOCKS: usize = 8;

/// Words in a run.
const RUN: usize = BLOCK * RUN_BLOCKS;

/// Keys of a run, or the first of them.
pub(crate) type RunKeys = [[u8; BLOCK]; RUN_BLOCKS];

/// The operations that are worth a vector unit.
pub(crate) trait BlockOps {
    /// How many keys are at most `high`.
    fn count(keys: &RunKeys, high: u8) -> u32;
    /// Bit i says whether `low <= keys[i] <= high`; `low <= high`.
    fn mask(keys: &[u8; BLOCK], low: u8, high: u8) -> u64;
    /// The number of the range that each key lies in, a bit of it for all keys in each mask.
    fn range_bits(keys: &[u8; BLOCK], ranges: &KeyRanges) -> [u64; RANGE_BITS];
    /// Position of the `rank`-th set bit (counted from 0), which exists.
    fn select(mask: u64, rank: u32) -> u32;
}

/// Bits of a range's number.
pub(crate) const RANGE_BITS: usize = 5;

/// Most ranges: the classes and what lies between them together cut the keys as the classes of a table do.
const MAX_RANGES: usize = 1 << RANGE_BITS;

/// Keys that a vector unit looks up at once.
pub(crate) const WINDOW: usize = 64;

/// All keys, cut into ranges in ascending order.
pub(crate) struct KeyRanges {
    /// Number of the range that a key lies in.
    pub(crate) of_key: [u8; 256],
    /// The last key of the first range, and the ranges of the keys from there on: all cuts lie in the window, and keys
    /// on either side of it are as its ends. `None` where the cuts lie further apart.
    pub(crate) window: Option<(u8, [u8; WINDOW])>,
}

impl KeyRanges {
    /// Cut behind each of `highs`, ascending; the last one is 255.
    fn new(highs: &[u8]) -> Self {
        let of_key = std::array::from_fn(|key| highs.partition_point(|&high| usize::from(high) < key) as u8);
        let first = highs[0];
        let last_cut = highs.len().checked_sub(2).map_or(first, |last| highs[last]);
        let fits = usize::from(last_cut - first) < WINDOW - 1;
        let ranges = std::array::from_fn(|i| of_key[(usize::from(first) + i).min(255)]);
        KeyRanges { of_key, window: fits.then_some((first, ranges)) }
    }
}

/// The reference operations.
pub(crate) struct Portable;

impl BlockOps for Portable {
    #[inline(always)]
    fn count(keys: &RunKeys, high: u8) -> u32 {
        keys.as_flattened().iter().map(|&key| u32::from(key <= high)).sum()
    }

    #[inline(always)]
    fn mask(keys: &[u8; BLOCK], low: u8, high: u8) -> u64 {
        let mut mask = 0;
        for (i, &key) in keys.iter().enumerate() {
            mask |= u64::from(low <= key && key <= high) << i;
        }
        mask
    }

    #[inline(always)]
    fn range_bits(keys: &[u8; BLOCK], ranges: &KeyRanges) -> [u64; RANGE_BITS] {
        let mut bits = [0; RANGE_BITS];
        for (i, &key) in keys.iter().enumerate() {
            let range = ranges.of_key[usize::from(key)];
            for (bit, mask) in bits.iter_mut().enumerate() {
                *mask |= u64::from(range >> bit & 1) << i;
            }
        }
        bits
    }

    #[inline(always)]
    fn select(mut mask: u64, rank: u32) -> u32 {
        for _ in 0..rank {
            mask &= mask - 1;
        }
        mask.trailing_zeros()
    }
}

/// Changes of one class in a chunk, by rank among the class's words.
#[derive(Debug, Clone, Default)]
pub(crate) struct ClassEvents<W> {
    pub(crate) low: u8,
    pub(crate) high: u8,
    /// Ascending ranks.
    pub(crate) ranks: Vec<u32>,
    /// Step (relative) or final word (absolute) of each.
    pub(crate) values: Vec<W>,
    /// Words of the class: what the scan counted.
    pub(crate) population: u32,
}

/// How values and words relate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ValueMap {
    pub(crate) order: OrderMap,
    /// Values are steps; otherwise final words.
    pub(crate) is_step: bool,
}

impl ValueMap {
    #[inline(always)]
    pub(crate) fn value<W: Word>(self, old: W, new: W) -> W {
        if self.is_step { self.order.step(old, new) } else { new }
    }

    #[inline(always)]
    pub(crate) fn word<W: Word>(self, old: W, value: W) -> W {
        if self.is_step { self.order.apply(old, value) } else { value }
    }
}

/// Keys of the words at `start..start + count` (count <= 64); those beyond are 0 and masked out by the caller.
#[inline(always)]
fn block_keys<W: Word>(words: &[u8], start: usize, count: usize, keys: KeyMap) -> [u8; BLOCK] {
    let mut block = [0u8; BLOCK];
    let bytes = &words[start * W::BYTES..(start + count) * W::BYTES];
    if count == BLOCK {
        // The same loop with its length known: the compiler makes vectors of it.
        let bytes = &bytes[..BLOCK * W::BYTES];
        for (i, key) in block.iter_mut().enumerate() {
            *key = keys.key(W::load(&bytes[i * W::BYTES..(i + 1) * W::BYTES]));
        }
        return block;
    }
    for (key, word) in block.iter_mut().zip(bytes.chunks_exact(W::BYTES)) {
        *key = keys.key(W::load(word));
    }
    block
}

/// A bit for each of `count` words (at most 64): whether they differ.
#[inline(always)]
fn block_changed<W: Word, O: BlockOps>(old: &[u8], new: &[u8], start: usize, count: usize) -> u64 {
    let mut block = [0u8; BLOCK];
    let range = start * W::BYTES..(start + count) * W::BYTES;
    let (old, new) = (&old[range.clone()], &new[range]);
    if count == BLOCK {
        let (old, new) = (&old[..BLOCK * W::BYTES], &new[..BLOCK * W::BYTES]);
        for (i, flag) in block.iter_mut().enumerate() {
            let range = i * W::BYTES..(i + 1) * W::BYTES;
            *flag = u8::from(W::load(&old[range.clone()]) != W::load(&new[range]));
        }
    } else {
        let pairs = old.chunks_exact(W::BYTES).zip(new.chunks_exact(W::BYTES));
        for (flag, (a, b)) in block.iter_mut().zip(pairs) {
            *flag = u8::from(W::load(a) != W::load(b));
        }
    }
    O::mask(&block, 1, 1)
}

#[inline(always)]
pub(crate) fn valid_mask(count: usize) -> u64 {
    if count == BLOCK { u64::MAX } else { (1 << count) - 1 }
}

/// Masks of classes in ascending order, where neighbours share the work at their common bound.
struct ClassMasks<'a> {
    block: &'a [u8; BLOCK],
    valid: u64,
    /// Words up to the last class's highest key, and the key after it.
    below: u64,
    next_low: u8,
}

impl<'a> ClassMasks<'a> {
    #[inline(always)]
    fn new(block: &'a [u8; BLOCK], valid: u64) -> Self {
        ClassMasks { block, valid, below: 0, next_low: 0 }
    }

    #[inline(always)]
    fn mask<O: BlockOps>(&mut self, low: u8, high: u8) -> u64 {
        let below = if low == self.next_low { self.below } else { O::mask(self.block, 0, low - 1) };
        self.below = O::mask(self.block, 0, high);
        self.next_low = high.wrapping_add(1);
        self.below & !below & self.valid
    }
}

/// Counts of classes in ascending order over a run, where neighbours share the work at their common bound.
struct ClassCounts<'a> {
    keys: &'a RunKeys,
    /// Words up to the last class's highest key, and the key after it.
    below: u32,
    next_low: u8,
}

impl<'a> ClassCounts<'a> {
    #[inline(always)]
    fn new(keys: &'a RunKeys) -> Self {
        ClassCounts { keys, below: 0, next_low: 0 }
    }

    #[inline(always)]
    fn count<O: BlockOps>(&mut self, low: u8, high: u8) -> u32 {
        let below = if low == self.next_low { self.below } else { O::count(self.keys, low - 1) };
        self.below = if high == u8::MAX { RUN as u32 } else { O::count(self.keys, high) };
        self.next_low = high.wrapping_add(1);
        self.below - below
    }
}

#[inline(always)]
fn run_keys<W: Word>(words: &[u8], start: usize, keys: KeyMap) -> RunKeys {
    std::array::from_fn(|block| block_keys::<W>(words, start + block * BLOCK, BLOCK, keys))
}

/// Apply events to `words` (base words, in place) over `ranges`. Returns whether every event found its word.
#[inline(always)]
pub(crate) fn apply_events<W: Word, O: BlockOps>(
    words: &mut [u8],
    ranges: &[Range<usize>],
    keys: KeyMap,
    map: ValueMap,
    events: &[ClassEvents<W>],
) -> bool {
    let mut cursors: Vec<Cursor<'_, W>> = events.iter().map(Cursor::new).collect();
    for range in ranges {
        let runs_end = range.start + range.len() / RUN * RUN;
        for start in (range.start..runs_end).step_by(RUN) {
            let run = run_keys::<W>(words, start, keys);
            let mut counts = ClassCounts::new(&run);
            for cursor in &mut cursors {
                let end = cursor.rank + counts.count::<O>(cursor.low, cursor.high);
                for (block, keys) in run.iter().enumerate() {
                    if cursor.next >= end {
                        break;
                    }
                    let mask = O::mask(keys, cursor.low, cursor.high);
                    cursor.apply::<O>(words, start + block * BLOCK, mask, map);
                }
                cursor.rank = end;
            }
        }
        for start in (runs_end..range.end).step_by(BLOCK) {
            let count = BLOCK.min(range.end - start);
            let block = block_keys::<W>(words, start, count, keys);
            let mut masks = ClassMasks::new(&block, valid_mask(count));
            for cursor in &mut cursors {
                let mask = masks.mask::<O>(cursor.low, cursor.high);
                cursor.apply::<O>(words, start, mask, map);
            }
        }
    }
    cursors.iter().all(|cursor| cursor.next == u32::MAX)
}

struct Cursor<'a, W> {
    low: u8,
    high: u8,
    rank: u32,
    next: u32,
    index: usize,
    ranks: &'a [u32],
    values: &'a [W],
}

impl<'a, W: Word> Cursor<'a, W> {
    fn new(events: &'a ClassEvents<W>) -> Self {
        let next = events.ranks.first().copied().unwrap_or(u32::MAX);
        let (low, high, ranks, values) = (events.low, events.high, &events.ranks[..], &events.values[..]);
        Cursor { low, high, rank: 0, next, index: 0, ranks, values }
    }

    /// Change the words of the class in the block at `start`, where `mask` says that they are.
    #[inline(always)]
    fn apply<O: BlockOps>(&mut self, words: &mut [u8], start: usize, mask: u64, map: ValueMap) {
        let end = self.rank + mask.count_ones();
        while self.next < end {
            let position = start + O::select(mask, self.next - self.rank) as usize;
            let old = word_at::<W>(words, position);
            set_word(words, position, map.word(old, self.values[self.index]));
            self.index += 1;
            self.next = self.ranks.get(self.index).copied().unwrap_or(u32::MAX);
        }
        self.rank = end;
    }
}

/// Counts of keys: eight tables, so that equal neighbours do not wait for each other.
pub(crate) type KeyTables = [[u32; 256]; 8];

/// Count the keys of every `stride`-th block.
#[inline(always)]
pub(crate) fn count_keys<W: Word>(words: &[u8], keys: KeyMap, stride: usize, tables: &mut KeyTables) {
    for block in words.chunks(BLOCK * W::BYTES).step_by(stride) {
        let count = block.len() / W::BYTES;
        let keys = block_keys::<W>(block, 0, count, keys);
        for eight in keys[..count].chunks(8) {
            for (&key, table) in eight.iter().zip(&mut *tables) {
                table[usize::from(key)] += 1;
            }
        }
    }
}

/// Words that are not zero.
#[inline(always)]
pub(crate) fn count_nonzero<W: Word>(words: &[u8]) -> u32 {
    // Few enough for a count of 16 bits, twice as many of which fit a vector.
    const PIECE_WORDS: usize = 4096;
    let in_piece = |piece: &[u8]| {
        let set = piece.chunks_exact(W::BYTES).map(|word| u16::from(W::load(word) != W::default()));
        u32::from(set.sum::<u16>())
    };
    words.chunks(PIECE_WORDS * W::BYTES).map(in_piece).sum()
}

/// Append which words differ, a bit each, 64 to a number.
#[inline(always)]
pub(crate) fn change_masks<W: Word, O: BlockOps>(old: &[u8], new: &[u8], masks: &mut Vec<u64>) {
    let words = old.len() / W::BYTES;
    // A loop: what an iterator's closure calls is not compiled for the vector unit.
    for start in (0..words).step_by(BLOCK) {
        masks.push(block_changed::<W, O>(old, new, start, BLOCK.min(words - start)));
    }
}

/// The bits of `count` words (at most 64) from `start` on.
#[inline(always)]
pub(crate) fn bits_at(masks: &[u64], start: usize, count: usize) -> u64 {
    let (block, bit) = (start / BLOCK, start % BLOCK);
    let low = masks[block] >> bit;
    // Two shifts: one by 64 is not defined.
    let high = masks.get(block + 1).map_or(0, |next| next << 1 << (BLOCK - 1 - bit));
    (low | high) & valid_mask(count)
}

/// Fill in the ranks, values and populations of `events` (whose key ranges are set) over `ranges`. `changed` are the
/// masks of [`change_masks`] and `values` the values of the changed words, in order of position.
#[inline(always)]
pub(crate) fn collect_events<W: Word, O: BlockOps>(
    old: &[u8],
    changed: &[u64],
    values: &[W],
    ranges: &[Range<usize>],
    keys: KeyMap,
    events: &mut [ClassEvents<W>],
) {
    let mut collector = Collector::new(values, events);
    for range in ranges {
        let runs_end = range.start + range.len() / RUN * RUN;
        for start in (range.start..runs_end).step_by(RUN) {
            // All keys of the run first: a block that was stored a moment ago makes a vector unit's loads wait.
            let run = run_keys::<W>(old, start, keys);
            for (block, keys) in run.iter().enumerate() {
                collector.collect::<O>(keys, u64::MAX, bits_at(changed, start + block * BLOCK, BLOCK));
            }
        }
        for start in (runs_end..range.end).step_by(BLOCK) {
            let count = BLOCK.min(range.end - start);
            let block = block_keys::<W>(old, start, count, keys);
            collector.collect::<O>(&block, valid_mask(count), bits_at(changed, start, count));
        }
    }
    collector.finish();
}

/// Notes the changes of a chunk, block after block.
struct Collector<'a, W> {
    values: std::slice::Iter<'a, W>,
    events: &'a mut [ClassEvents<W>],
    /// All keys, cut where a class begins or ends, and which class each range is.
    ranges: KeyRanges,
    classes: Vec<usize>,
    /// Ranges, four at a time: how many fours there are, words so far in each, and which words of the block at hand.
    groups: usize,
    population: [[u64; 4]; MAX_RANGES / 4],
    masks: [[u64; 4]; MAX_RANGES / 4],
}

const NO_CLASS: usize = usize::MAX;

impl<'a, W: Word> Collector<'a, W> {
    fn new(values: &'a [W], events: &'a mut [ClassEvents<W>]) -> Self {
        let (mut highs, mut classes, mut next) = (Vec::new(), Vec::new(), 0);
        for (class, own) in events.iter().enumerate() {
            if usize::from(own.low) > next {
                highs.push(own.low - 1);
                classes.push(NO_CLASS);
            }
            highs.push(own.high);
            classes.push(class);
            next = usize::from(own.high) + 1;
        }
        if next < 256 {
            highs.push(u8::MAX);
            classes.push(NO_CLASS);
        }
        assert!(highs.len() <= MAX_RANGES, "more ranges than a class table cuts");
        let ranges = KeyRanges::new(&highs);
        let groups = classes.len().div_ceil(4);
        let (population, masks) = Default::default();
        Collector { values: values.iter(), events, ranges, classes, groups, population, masks }
    }

    /// A block with the keys `keys`, whose words are `valid` and whose changed words are `hits`.
    #[inline(always)]
    fn collect<O: BlockOps>(&mut self, keys: &[u8; BLOCK], valid: u64, mut hits: u64) {
        let bits = O::range_bits(keys, &self.ranges);
        // Halves of a number that all ranges share: bits 0 and 1, and those above.
        let low = [!bits[0] & !bits[1], bits[0] & !bits[1], !bits[0] & bits[1], bits[0] & bits[1]];
        for group in 0..self.groups {
            let pick = |bit: usize| if group >> bit & 1 == 1 { bits[2 + bit] } else { !bits[2 + bit] };
            let high = pick(0) & pick(1) & pick(2) & valid;
            self.masks[group] = [low[0] & high, low[1] & high, low[2] & high, low[3] & high];
        }
        while hits != 0 {
            let bit = hits.trailing_zeros() as usize;
            hits &= hits - 1;
            let range = usize::from(self.ranges.of_key[usize::from(keys[bit])]);
            let before = self.masks[range / 4][range % 4] & ((1 << bit) - 1);
            let rank = self.population[range / 4][range % 4] as u32 + before.count_ones();
            if let (Some(class), Some(&value)) =
                (self.events.get_mut(self.classes[range]), self.values.next())
            {
                class.ranks.push(rank);
                class.values.push(value);
            }
        }
        for (population, masks) in self.population.iter_mut().zip(&self.masks).take(self.groups) {
            for (population, mask) in population.iter_mut().zip(masks) {
                *population += u64::from(mask.count_ones());
            }
        }
    }

    fn finish(self) {
        for (&class, &population) in self.classes.iter().zip(self.population.as_flattened()) {
            if let Some(class) = self.events.get_mut(class) {
                class.population = population as u32;
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A word at a time, no masks: the slow twin of [`collect_events`].
    fn collect_slowly(
        old: &[u8],
        new: &[u8],
        range: Range<usize>,
        keys: KeyMap,
        class: &mut ClassEvents<u16>,
    ) {
        for position in range {
            let (a, b) = (word_at::<u16>(old, position), word_at::<u16>(new, position));
            let key = (a >> keys.shift) as u8 & keys.mask;
            if (class.low..=class.high).contains(&key) {
                if a != b {
                    class.ranks.push(class.population);
                    class.values.push(b.wrapping_sub(a));
                }
                class.population += 1;
            }
        }
    }

    /// Values of the words that changed, range after range.
    pub(crate) fn values_in(old: &[u8], new: &[u8], ranges: &[Range<usize>], map: ValueMap) -> Vec<u16> {
        let positions = ranges.iter().flat_map(Clone::clone);
        let pairs = positions.map(|at| (word_at::<u16>(old, at), word_at::<u16>(new, at)));
        pairs.filter(|(a, b)| a != b).map(|(a, b)| map.value(a, b)).collect()
    }

    #[test]
    fn events_equal_those_of_the_slow_twin() {
        println!("seed 8");
        let mut rng = fastrand::Rng::with_seed(8);
        for round in 0..200 {
            let old: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(6000).collect();
            let mut new = old.clone();
            for _ in 0..round {
                new[rng.usize(..6000)] ^= 1 << rng.u8(..8);
            }
            let keys = KeyMap { shift: 7, mask: 0xff };
            let map = ValueMap { order: OrderMap { is_float: false }, is_step: true };
            let cuts = [rng.u8(1..80), rng.u8(81..160), rng.u8(161..255)];
            // Neighbours, a gap between classes, and the two ends of the keys.
            let bounds = [(0, cuts[0] - 1), (cuts[0], cuts[1]), (cuts[2], 255)];
            let empty = bounds.map(|(low, high)| ClassEvents::<u16> { low, high, ..ClassEvents::default() });
            let range = rng.usize(..70)..rng.usize(400..3000);
            let (mut fast, mut slow) = (empty.clone(), empty);
            let ranges = std::slice::from_ref(&range);
            let mut changed = vec![];
            change_masks::<u16, Portable>(&old, &new, &mut changed);
            let values = values_in(&old, &new, ranges, map);
            collect_events::<u16, Portable>(&old, &changed, &values, ranges, keys, &mut fast);
            slow.iter_mut().for_each(|class| collect_slowly(&old, &new, range.clone(), keys, class));
            for (fast, slow) in fast.iter().zip(&slow) {
                assert_eq!((&fast.ranks, &fast.values), (&slow.ranks, &slow.values), "round {round}");
                assert_eq!(fast.population, slow.population, "round {round}");
            }
        }
    }
}
