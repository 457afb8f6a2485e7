//! The encoder's first look at a segment: what changed, where, and what that says about chunk size and tables.

use crate::classes::{ClassPlan, KeyMap, MAX_CLASSES};
use crate::counted::SegmentCounts;
use crate::gap;
use crate::head::HeadPlan;
use crate::plan::{self, Histogram};
use crate::quant::Prediction;
use crate::scan::{BLOCK, KeyTables};
use crate::segment::{BaseKind, SegmentSpec};
use crate::values::{sign_magnitude, split_magnitude, split_word};
use crate::words::{Word, word_at};
use crate::{planes, simd, sparse};

/// Words of the smallest chunk that the encoder makes, as a power of two: the grain of its change counts.
pub(crate) const GRAIN_LOG2: u32 = 15;
/// Words that are compared, looked at and counted while the caches of a core hold both sides of them.
const PIECE_WORDS: usize = 4096;
/// Words of its largest chunk, as a power of two.
const LARGEST_LOG2: u32 = 22;
/// Payload that a chunk of mode S is sized for, in bits: large against its record and header (about 40 bytes), and
/// small enough that a few million words make work for a whole GPU.
const PAYLOAD_TARGET_BITS: f64 = 8192.0 * 8.0;
/// What a decoder holds of a chunk of mode S, in bytes: 4 a symbol, and a word for each of a class that has value
/// symbols. Six blocks of a GPU's multiprocessor have 18,880 each; chunks differ by a few percent.
const SYMBOL_BYTES_TARGET: f64 = 0.95 * 18_880.0;
/// Payload that a chunk of mode F or G is sized for, in bits: large against its states (64 bytes more than what they tell).
const LANES_TARGET_BITS: f64 = 3072.0 * 8.0;
/// Words of the largest chunk of mode F or G, as a power of two: a warp has one, and a GPU has thousands.
const LARGEST_LANES_LOG2: u32 = 18;
/// Most classes of mode G: the tables of two blocks of a GPU fit one of its multiprocessors.
const GROUPS_CLASSES: usize = 20;
/// Smaller segments are not cut for that: they are few chunks on any GPU, and a chunk more costs about 60 bytes, 1% of a
/// sparse patch to a small model.
const FILLS_A_GPU_WORDS: usize = 1 << 20;
/// Above this many words, key populations are estimated from one block in eight.
pub(crate) const SAMPLE_ABOVE_WORDS: usize = 1 << 18;
pub(crate) const SAMPLE_STRIDE: usize = 8;
/// Rows shorter than this are not worth a bit each.
const ROW_WORDS_MIN: u64 = 8;

/// Whether so many changes call for a symbol a word.
pub(crate) fn is_dense(changed: u64, words: usize) -> bool {
    changed * 4 > words as u64
}

/// What the first pass found.
pub(crate) struct Survey<W> {
    /// A bit a word: whether it changed. Empty where all that matters is how many did.
    changed: Vec<u64>,
    /// Values of the changed words, in order.
    values: Vec<W>,
    /// Changed words of every 2^15.
    grains: Vec<u32>,
    /// `None` where too much changed for sparse or dense steps to be of use.
    histogram: Option<Histogram>,
    rows_changed: u64,
}

impl<W: Word> Survey<W> {
    /// Compare `old` (`None`: zeros) and `new`.
    pub(crate) fn of(
        old: Option<&[u8]>,
        prediction: Option<&Prediction<W>>,
        new: &[u8],
        spec: &SegmentSpec,
    ) -> Self {
        let mut survey =
            Survey { changed: vec![], values: vec![], grains: vec![], histogram: None, rows_changed: 0 };
        let Some(old) = old else {
            survey.count_nonzero(new);
            if !is_dense(survey.changed(), spec.words) {
                survey.grains.clear();
                survey.look(&vec![0; new.len()], new, spec);
            }
            return survey;
        };
        if let Some(prediction) = prediction {
            survey.count_changed(old, new);
            survey.histogram = Some(residuals(prediction, new));
            return survey;
        }
        if !sparse::maps(spec).1.is_step {
            survey.count_changed(old, new);
            if is_dense(survey.changed(), spec.words) {
                return survey;
            }
            survey.grains.clear();
        }
        survey.look(old, new, spec);
        survey
    }

    /// Words that differ.
    fn count_changed(&mut self, old: &[u8], new: &[u8]) {
        let mut masks = Vec::with_capacity((1 << GRAIN_LOG2) / BLOCK);
        let grain_bytes = W::BYTES << GRAIN_LOG2;
        for (old, new) in old.chunks(grain_bytes).zip(new.chunks(grain_bytes)) {
            masks.clear();
            simd::change_masks::<W>(old, new, &mut masks);
            self.grains.push(masks.iter().map(|block| block.count_ones()).sum());
        }
    }

    /// Words that are not zero, where there is no base.
    fn count_nonzero(&mut self, new: &[u8]) {
        self.grains.extend(new.chunks(W::BYTES << GRAIN_LOG2).map(simd::count_nonzero::<W>));
    }

    /// What changed, the values by key, and rows.
    fn look(&mut self, old: &[u8], new: &[u8], spec: &SegmentSpec) {
        let (keys, map) = sparse::maps(spec);
        let mut histogram = Histogram::new();
        let row_words = if spec.row_words == 0 { u64::MAX } else { spec.row_words };
        let mut row_end = row_words - spec.first_word % row_words;
        let mut row_counted = false;
        self.changed.reserve_exact(spec.words.div_ceil(BLOCK));
        let piece_bytes = W::BYTES * PIECE_WORDS;
        let mut population = KeyCounts::new(keys, spec.words);
        for (piece, (old, new)) in old.chunks(piece_bytes).zip(new.chunks(piece_bytes)).enumerate() {
            let (first_block, first_value) = (self.changed.len(), self.values.len());
            simd::change_masks::<W>(old, new, &mut self.changed);
            for (block, &hits) in self.changed[first_block..].iter().enumerate() {
                let mut hits = hits;
                while hits != 0 {
                    let place = block * BLOCK + hits.trailing_zeros() as usize;
                    hits &= hits - 1;
                    let (base, word) = (word_at::<W>(old, place), word_at::<W>(new, place));
                    let value = map.value(base, word);
                    self.values.push(value);
                    let (symbol, raw_bits) = if map.is_step {
                        let (symbol, width, _) = split_magnitude::<W>(sign_magnitude(value).1);
                        (symbol, width)
                    } else {
                        (split_word(value, map.order.is_float).0, W::BITS - 8)
                    };
                    histogram.add(keys.key(base), symbol, raw_bits);
                    let position = (piece * PIECE_WORDS + place) as u64;
                    if position >= row_end {
                        row_end += (position - row_end) / row_words * row_words;
                        row_end = row_end.saturating_add(row_words);
                        row_counted = false;
                    }
                    self.rows_changed += u64::from(!row_counted);
                    row_counted = true;
                }
            }
            if piece.is_multiple_of((1 << GRAIN_LOG2) / PIECE_WORDS) {
                self.grains.push(0);
            }
            *self.grains.last_mut().expect("pushed with the first piece of each grain") +=
                (self.values.len() - first_value) as u32;
            population.add::<W>(old);
        }
        histogram.population = population.finish();
        self.histogram = Some(histogram);
    }

    fn changed(&self) -> u64 {
        self.grains.iter().map(|&count| u64::from(count)).sum()
    }

    /// Changed words of a chunk of 2^`chunk_log2` words.
    pub(crate) fn changed_in(&self, chunk: usize, chunk_log2: u32) -> u64 {
        let per_chunk = 1 << (chunk_log2 - GRAIN_LOG2);
        let grains = self.grains.chunks(per_chunk).nth(chunk).unwrap_or_default();
        grains.iter().map(|&count| u64::from(count)).sum()
    }

    /// What changed in the chunks from `chunk` on: a bit for each word, and the values.
    pub(crate) fn changes_from(&self, chunk: usize, chunk_log2: u32) -> (&[u64], &[W]) {
        let (blocks, grains) = ((chunk << chunk_log2) / BLOCK, chunk << (chunk_log2 - GRAIN_LOG2));
        let values: usize = self.grains[..grains].iter().map(|&count| count as usize).sum();
        (&self.changed[blocks..], &self.values[values..])
    }

    /// Chunk size and tables for the segment.
    pub(crate) fn plan(&self, new: &[u8], spec: &SegmentSpec) -> HeadPlan {
        let is_float = spec.dtype.float_layout().is_some();
        let mut head = HeadPlan { chunk_log2: GRAIN_LOG2, ..HeadPlan::default() };
        let Some(histogram) = &self.histogram else {
            head.planes = Some(planes::plan::<W>(new, is_float).frequencies);
            return head;
        };
        let (_, map) = sparse::maps(spec);
        if self.all_sparse(histogram, spec, &mut head) {
            return head;
        }
        let planes = planes::plan::<W>(new, is_float);
        if map.is_step && spec.base != BaseKind::None {
            let (classes, bits) = plan::dense(histogram, MAX_CLASSES);
            if bits < planes.bits_per_word * spec.words as f64 {
                head.dense = Some(classes);
                return head;
            }
        }
        head.planes = Some(planes.frequencies);
        head
    }

    /// As [`Survey::plan`] for modes F and G; others where there are no steps from words, or final words are shorter.
    pub(crate) fn plan_gpu(&self, new: &[u8], spec: &SegmentSpec) -> HeadPlan {
        let steps = spec.base == BaseKind::Words && sparse::maps(spec).1.is_step;
        let Some(histogram) = self.histogram.as_ref().filter(|_| steps) else { return self.plan(new, spec) };
        if !is_dense(self.changed(), spec.words) {
            let (classes, bits) = plan::flags(histogram);
            return flags_plan(classes, bits, spec);
        }
        let (classes, bits) = plan::dense(histogram, GROUPS_CLASSES);
        let is_float = spec.dtype.float_layout().is_some();
        if bits >= planes::plan::<W>(new, is_float).bits_per_word * spec.words as f64 {
            return self.plan(new, spec);
        }
        HeadPlan { chunk_log2: lanes_chunk_log2(bits, spec), dense: Some(classes), ..HeadPlan::default() }
    }

    /// Puts chunk size and sparse tables into `head`; whether no chunk needs any others.
    fn all_sparse(&self, histogram: &Histogram, spec: &SegmentSpec, head: &mut HeadPlan) -> bool {
        let (_, map) = sparse::maps(spec);
        let rows = self.row_context(spec);
        let coded_share = rows.map_or(1.0, |(_, share)| share);
        let quantized = matches!(spec.base, BaseKind::Quantized(_));
        if !is_dense(self.changed(), spec.words) && !quantized {
            let plan = plan::sparse(histogram, coded_share, map.is_step);
            let mut share = PAYLOAD_TARGET_BITS / plan.bits;
            if spec.words >= FILLS_A_GPU_WORDS {
                let bytes = 4.0 * plan.symbols + W::BYTES as f64 * plan.valued;
                share = share.min(SYMBOL_BYTES_TARGET / bytes.max(1.0));
            }
            let words = share * spec.words as f64;
            head.chunk_log2 = (words.log2() as u32).clamp(GRAIN_LOG2, LARGEST_LOG2);
            head.sparse = Some((rows.map(|(rate, _)| rate), plan.classes));
        }
        let chunk_words = 1usize << head.chunk_log2;
        let words_of = |chunk: usize| chunk_words.min(spec.words - chunk * chunk_words);
        let chunks = 0..spec.words.div_ceil(chunk_words);
        let is_sparse =
            |chunk: usize| !quantized && !is_dense(self.changed_in(chunk, head.chunk_log2), words_of(chunk));
        if head.sparse.is_none() && chunks.clone().any(is_sparse) {
            head.sparse =
                Some((rows.map(|(rate, _)| rate), plan::sparse(histogram, coded_share, map.is_step).classes));
        }
        chunks.clone().all(is_sparse)
    }

    /// The head of a segment whose chunks are all sparse, from counts that were taken elsewhere; `None` if some are
    /// not, or rows are context.
    pub(crate) fn sparse_head(counts: &SegmentCounts, spec: &SegmentSpec) -> Option<Vec<u8>> {
        let histogram = histogram(counts);
        let survey = Survey::<W> {
            changed: vec![],
            values: vec![],
            grains: counts.grains.clone(),
            histogram: None,
            rows_changed: counts.rows_changed,
        };
        let mut head = HeadPlan { chunk_log2: GRAIN_LOG2, ..HeadPlan::default() };
        let fits = survey.all_sparse(&histogram, spec, &mut head);
        let rows = head.sparse.as_ref().is_some_and(|(row_rate, _)| row_rate.is_some());
        (fits && !rows).then(|| head.to_bytes())
    }

    /// Rate of changed rows and their share of the words, if telling them apart saves bits.
    fn row_context(&self, spec: &SegmentSpec) -> Option<(u32, f64)> {
        let rows = (spec.words as u64).div_ceil(spec.row_words.max(1)) as f64;
        if spec.row_words < ROW_WORDS_MIN || spec.row_words > spec.words as u64 || self.rows_changed == 0 {
            return None;
        }
        let share = (self.rows_changed as f64 / rows).min(1.0);
        let rate = gap::rate_of(self.rows_changed as f64, rows).max(gap::RATE_MIN);
        let saved = -share.log2() * self.changed() as f64;
        let cost = gap::cost_bits(self.rows_changed as f64, rows, rate) + 32.0;
        (saved > cost).then_some((rate, share))
    }
}

/// Words of a chunk of mode F or G whose segment takes `bits`, as a power of two.
fn lanes_chunk_log2(bits: f64, spec: &SegmentSpec) -> u32 {
    let words = LANES_TARGET_BITS / bits * spec.words as f64;
    (words.log2() as u32).clamp(GRAIN_LOG2, LARGEST_LANES_LOG2)
}

fn flags_plan(classes: Vec<ClassPlan>, bits: f64, spec: &SegmentSpec) -> HeadPlan {
    let chunk_log2 = lanes_chunk_log2(bits, spec);
    HeadPlan { chunk_log2, sparse: Some((None, classes)), ..HeadPlan::default() }
}

/// The head of a segment of mode F from counts that were taken elsewhere.
pub(crate) fn flags_head(counts: &SegmentCounts, spec: &SegmentSpec) -> Vec<u8> {
    let (classes, bits) = plan::flags(&histogram(counts));
    flags_plan(classes, bits, spec).to_bytes()
}

fn histogram(counts: &SegmentCounts) -> Histogram {
    let mut histogram = Histogram::new();
    histogram.population = counts.population;
    for &(key, symbol, count) in &counts.values {
        histogram.add_many(key, symbol, count);
    }
    histogram.raw_bits = counts.raw_bits;
    histogram
}

/// Every word's residual against a prediction. One that is not zero counts as changed.
fn residuals<W: Word>(prediction: &Prediction<W>, new: &[u8]) -> Histogram {
    let mut histogram = Histogram::new();
    for (position, &key) in prediction.keys.iter().enumerate() {
        let (base, word) = (word_at::<W>(&prediction.words, position), word_at::<W>(new, position));
        let (symbol, raw_bits, _) =
            split_magnitude::<W>(sign_magnitude(prediction.residual(position, base, word)).1);
        histogram.population[usize::from(key)] += 1;
        if symbol != 0 {
            histogram.add(key, symbol, raw_bits);
        }
    }
    histogram
}

/// Counts keys, by sample where there are many words; sampled counts are scaled up.
struct KeyCounts {
    keys: KeyMap,
    words: u64,
    stride: usize,
    tables: KeyTables,
}

impl KeyCounts {
    fn new(keys: KeyMap, words: usize) -> Self {
        let stride = if words > SAMPLE_ABOVE_WORDS { SAMPLE_STRIDE } else { 1 };
        KeyCounts { keys, words: words as u64, stride, tables: [[0; 256]; 8] }
    }

    /// Count in the next words; all but the last call bring whole strides of blocks.
    fn add<W: Word>(&mut self, words: &[u8]) {
        if self.keys.mask != 0 {
            simd::count_keys::<W>(words, self.keys, self.stride, &mut self.tables);
        }
    }

    fn finish(self) -> [u64; 256] {
        let Self { keys, words, stride, tables } = self;
        if keys.mask == 0 {
            return std::array::from_fn(|key| if key == 0 { words } else { 0 });
        }
        let count = |key: usize| tables.iter().map(|table| u64::from(table[key])).sum::<u64>();
        std::array::from_fn(|key| count(key) * stride as u64)
    }
}
