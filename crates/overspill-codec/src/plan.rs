//! Choosing class ranges, rates and tables for a segment from what changed in it.
//!
//! Starts from one class a key and joins neighbours as long as the estimated cost of data and tables falls.
//! The estimates only steer; what is written is always exact.

use crate::classes::{ClassKind, ClassPlan, MAX_CLASSES};
use crate::gap;
use crate::rans::PROB_TOTAL;
use crate::tables::{Frequencies, MAX_SYMBOLS};

/// Most classes that the encoder makes for mode S: what a GPU's decoder counts in two registers.
const SPARSE_CLASSES: usize = crate::flat::FLAT_CLASSES;

/// Counts over a segment, by key.
pub(crate) struct Histogram {
    /// Words of each key; may be scaled up from a sample.
    pub(crate) population: [u64; 256],
    /// Changed words by key, then by value symbol (256); no row where no word of a key changed. Symbol 0 is not
    /// used by steps.
    values: Vec<Option<Box<[u32; MAX_SYMBOLS]>>>,
    /// Raw bits of all values, signs not counted.
    pub(crate) raw_bits: u64,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Histogram { population: [0; 256], values: vec![None; 256], raw_bits: 0 }
    }

    /// Count one changed word.
    pub(crate) fn add(&mut self, key: u8, symbol: u8, raw_bits: u32) {
        let row = self.values[usize::from(key)].get_or_insert_with(|| Box::new([0; MAX_SYMBOLS]));
        row[usize::from(symbol)] += 1;
        self.raw_bits += u64::from(raw_bits);
    }

    /// Count many, whose raw bits are counted elsewhere.
    pub(crate) fn add_many(&mut self, key: u8, symbol: u8, count: u32) {
        let row = self.values[usize::from(key)].get_or_insert_with(|| Box::new([0; MAX_SYMBOLS]));
        row[usize::from(symbol)] += count;
    }
}

/// A class while it is being put together.
#[derive(Clone)]
struct Draft {
    high: u8,
    population: f64,
    changed: f64,
    values: Vec<u64>,
    bits: f64,
}

impl Draft {
    fn join(&self, next: &Draft, cost: &impl Fn(&Draft) -> f64) -> Draft {
        let mut joined = Draft {
            high: next.high,
            population: self.population + next.population,
            changed: self.changed + next.changed,
            values: self.values.iter().zip(&next.values).map(|(a, b)| a + b).collect(),
            bits: 0.0,
        };
        joined.bits = cost(&joined);
        joined
    }
}

/// Entropy of the values plus what a table of them roughly costs to write.
fn table_bits(values: &[u64], zero: f64) -> f64 {
    let (mut total, mut sum, mut used) = (zero, 0.0, 0.0);
    if zero > 0.0 {
        sum += zero * zero.log2();
    }
    for &count in values.iter().filter(|&&count| count > 0) {
        let count = count as f64;
        total += count;
        sum += count * count.log2();
        used += 1.0;
    }
    if total == 0.0 { 0.0 } else { total * total.log2() - sum + 14.0 + 5.0 * used }
}

fn only_ones(values: &[u64]) -> bool {
    values[0] == 0 && values[2..].iter().all(|&count| count == 0)
}

fn zeros(draft: &Draft) -> f64 {
    (draft.population - draft.changed).max(1.0)
}

fn gap_bits(draft: &Draft, is_step: bool) -> f64 {
    let rate = gap::rate_of(draft.changed, draft.population).max(gap::RATE_MIN);
    let values = if is_step && only_ones(&draft.values) { 1.0 } else { table_bits(&draft.values, 0.0) };
    let signs = if is_step { draft.changed } else { 0.0 };
    gap::cost_bits(draft.changed, draft.population, rate) + values + signs + 12.0
}

fn dense_bits(draft: &Draft) -> f64 {
    table_bits(&draft.values, zeros(draft)) + draft.changed + 12.0
}

/// Whether a class gets a symbol for every word. Where few of its words change the two codes are equally long, and
/// a symbol a change is a fraction of the symbols to decode.
fn is_dense(draft: &Draft, is_step: bool) -> bool {
    is_step && draft.changed * 4.0 > draft.population && dense_bits(draft) < gap_bits(draft, is_step)
}

fn sparse_cost(draft: &Draft, is_step: bool) -> f64 {
    if draft.changed == 0.0 {
        3.0
    } else if is_dense(draft, is_step) {
        dense_bits(draft)
    } else {
        gap_bits(draft, is_step)
    }
}

fn drafts(histogram: &Histogram, coded_share: f64, most: usize, cost: impl Fn(&Draft) -> f64) -> Vec<Draft> {
    let mut drafts: Vec<Draft> = Vec::new();
    // Symbols beyond the last that occurs need no looking at.
    let last = |row: &[u32; MAX_SYMBOLS]| row.iter().rposition(|&count| count > 0).unwrap_or(0);
    let most_symbols = histogram.values.iter().flatten().map(|row| last(row) + 1).max().unwrap_or(0).max(2);
    for key in 0..256usize {
        let values = &histogram.values[key].as_deref().unwrap_or(&[0; MAX_SYMBOLS])[..most_symbols];
        let changed: u64 = values.iter().map(|&count| u64::from(count)).sum();
        let population = (histogram.population[key] as f64 * coded_share).max(changed as f64);
        if population == 0.0 {
            continue;
        }
        let values = values.iter().map(|&count| u64::from(count)).collect();
        let mut draft = Draft { high: key as u8, population, changed: changed as f64, values, bits: 0.0 };
        draft.bits = cost(&draft);
        drafts.push(draft);
    }
    let mut joined: Vec<Draft> = drafts.windows(2).map(|pair| pair[0].join(&pair[1], &cost)).collect();
    while drafts.len() > 1 {
        let gain = |i: usize| drafts[i].bits + drafts[i + 1].bits - joined[i].bits;
        let best = (0..joined.len()).max_by(|&a, &b| gain(a).total_cmp(&gain(b))).expect("a pair");
        if gain(best) < 0.0 && drafts.len() <= most {
            break;
        }
        drafts[best] = joined.remove(best);
        drafts.remove(best + 1);
        if best > 0 {
            joined[best - 1] = drafts[best - 1].join(&drafts[best], &cost);
        }
        if best < joined.len() {
            joined[best] = drafts[best].join(&drafts[best + 1], &cost);
        }
    }
    drafts
}

/// Classes for mode S.
pub(crate) struct SparsePlan {
    pub(crate) classes: Vec<ClassPlan>,
    /// Estimated bits of the segment.
    pub(crate) bits: f64,
    /// Estimated gap symbols of the segment, and words of dense classes: what a decoder holds at once of a chunk.
    pub(crate) symbols: f64,
    /// Those of classes whose values have symbols too.
    pub(crate) valued: f64,
}

/// Classes for mode S. `coded_share` is the share of words in rows that are coded at all.
pub(crate) fn sparse(histogram: &Histogram, coded_share: f64, is_step: bool) -> SparsePlan {
    let drafts = drafts(histogram, coded_share, SPARSE_CLASSES, |draft| sparse_cost(draft, is_step));
    let bits = drafts.iter().map(|draft| draft.bits).sum::<f64>() + histogram.raw_bits as f64;
    let symbols_of = |draft: &Draft| match draft.changed {
        0.0 => 0.0,
        _ if is_dense(draft, is_step) => draft.population,
        changed => changed,
    };
    let symbols = drafts.iter().map(symbols_of).sum();
    let has_values = |draft: &&Draft| !is_step || is_dense(draft, is_step) || !only_ones(&draft.values);
    let valued = drafts.iter().filter(has_values).map(symbols_of).sum();
    let classes = drafts.iter().map(|draft| {
        if draft.changed == 0.0 {
            return ClassPlan { high: draft.high, kind: ClassKind::Still, values: None, gaps: None };
        }
        if is_dense(draft, is_step) {
            let values = Some(fit_with_zero(draft));
            return ClassPlan { high: draft.high, kind: ClassKind::Dense, values, gaps: None };
        }
        let rate = gap::rate_of(draft.changed, draft.population).max(gap::RATE_MIN);
        let values =
            if is_step && only_ones(&draft.values) { None } else { Some(Frequencies::fit(&draft.values).0) };
        ClassPlan { high: draft.high, kind: ClassKind::Gaps(rate), values, gaps: None }
    });
    SparsePlan { classes: classes.collect(), bits, symbols, valued }
}

/// Slots of 4096 that stand for a change.
fn flag_frequency(draft: &Draft) -> u32 {
    let slots = draft.changed / draft.population * f64::from(PROB_TOTAL);
    (slots.round() as u32).clamp(1, PROB_TOTAL - 1)
}

fn flag_bits(draft: &Draft) -> f64 {
    if draft.changed == 0.0 {
        return 3.0;
    }
    let share = f64::from(flag_frequency(draft)) / f64::from(PROB_TOTAL);
    let flags = -draft.changed * share.log2() - (draft.population - draft.changed) * (1.0 - share).log2();
    let values = if only_ones(&draft.values) { 1.0 } else { table_bits(&draft.values, 0.0) };
    flags + values + draft.changed + 21.0
}

/// Classes for mode F, and the estimated bits of the segment.
pub(crate) fn flags(histogram: &Histogram) -> (Vec<ClassPlan>, f64) {
    let drafts = drafts(histogram, 1.0, MAX_CLASSES, flag_bits);
    let bits = drafts.iter().map(|draft| draft.bits).sum::<f64>() + histogram.raw_bits as f64;
    let class = |draft: &Draft| {
        if draft.changed == 0.0 {
            return ClassPlan { high: draft.high, kind: ClassKind::Still, values: None, gaps: None };
        }
        let values = (!only_ones(&draft.values)).then(|| Frequencies::fit(&draft.values).0);
        ClassPlan { high: draft.high, kind: ClassKind::Flags(flag_frequency(draft)), values, gaps: None }
    };
    (drafts.iter().map(class).collect(), bits)
}

/// At most `most` classes for modes D and G, and the estimated bits of the segment.
pub(crate) fn dense(histogram: &Histogram, most: usize) -> (Vec<(u8, Frequencies)>, f64) {
    let drafts = drafts(histogram, 1.0, most, dense_bits);
    let bits = drafts.iter().map(|draft| draft.bits).sum::<f64>() + histogram.raw_bits as f64;
    (drafts.iter().map(|draft| (draft.high, fit_with_zero(draft))).collect(), bits)
}

fn fit_with_zero(draft: &Draft) -> Frequencies {
    let mut values = draft.values.clone();
    values[0] = zeros(draft) as u64;
    Frequencies::fit(&values).0
}
