//! Comparing two checkpoints: which tensors, how many words, by how many ULPs.

use overspill_codec::{Dtype, segments};
use serde_json::{Value, json};

use crate::buffer::Buffer;
use crate::checkpoint::{Checkpoint, Kind, Tensor};
use crate::work::{Meter, Options, Progress, Workers};
use crate::{Error, Result};

/// Steps by magnitude: entry b counts changed words whose step has b significant bits (1; 2-3; 4-7; ...).
pub type UlpHistogram = [u64; 65];

/// How one tensor differs.
#[derive(Debug, Clone)]
pub struct TensorDiff {
    /// Its name.
    pub name: String,
    /// What happened to it.
    pub change: Change,
}

/// What happened to a tensor.
#[derive(Debug, Clone)]
pub enum Change {
    /// Only in the second checkpoint.
    Added,
    /// Only in the first.
    Removed,
    /// Another dtype or number of words; values are not compared.
    Retyped {
        /// Dtype and shape in the first.
        from: (&'static str, Vec<u64>),
        /// Dtype and shape in the second.
        to: (&'static str, Vec<u64>),
    },
    /// Same dtype and words.
    Words {
        /// Words in all.
        words: u64,
        /// Words whose bits differ.
        changed: u64,
        /// Whether the shape differs.
        reshaped: bool,
        /// Size of the steps, in units of the last place.
        ulps: Box<UlpHistogram>,
    },
}

/// What [`diff`] finds: the tensors that differ, in order of name.
#[derive(Debug, Clone, Default)]
pub struct Diff {
    /// Tensors that differ.
    pub tensors: Vec<TensorDiff>,
    /// Tensors that are the same.
    pub unchanged: usize,
}

/// Compares two checkpoints, bit for bit.
///
/// # Errors
/// Files that cannot be read.
pub fn diff(
    a: &Checkpoint<'_>,
    b: &Checkpoint<'_>,
    options: &Options,
    progress: Progress<'_>,
) -> Result<Diff> {
    if let Some(tensor) = a.tensors().iter().chain(b.tensors()).find(|t| matches!(t.kind, Kind::Quantized(_)))
    {
        return Err(Error::misuse(format!("{:?} is quantized: only plain tensors compare", tensor.name)));
    }
    let workers = Workers::new(options, a.largest_segment_bytes().max(b.largest_segment_bytes()))?;
    let pairs: Vec<(&Tensor, &Tensor)> =
        a.sorted().filter_map(|x| Some((x, b.get(&x.name)?))).filter(|(x, y)| comparable(x, y)).collect();
    let meter = Meter::new(progress, pairs.iter().map(|(x, _)| x.bytes).sum());
    let jobs: Vec<_> = pairs
        .iter()
        .enumerate()
        .flat_map(|(i, &(x, y))| segments(x.words()).map(move |(first, words)| (i, x, y, first, words)))
        .collect();
    let mut steps: Vec<(u64, UlpHistogram)> = vec![(0, [0; 65]); pairs.len()];
    workers.run(
        &jobs,
        |&(_, x, _, _, words)| x.kind.bytes_of(words as u64) as usize,
        |&(_, x, y, first, words)| {
            let (mut old, mut new) = (Buffer::default(), Buffer::default());
            let old = x.read(a.store(x), first, words, &mut old)?;
            let new = y.read(b.store(y), first, words, &mut new)?;
            meter.add(old.len());
            Ok(count_steps(x.kind, old, new))
        },
        |&(i, ..), histogram| {
            let (changed, sums) = &mut steps[i];
            for (sum, more) in sums.iter_mut().zip(histogram) {
                *sum += more;
                *changed += more;
            }
            Ok(())
        },
    )?;
    Ok(collect(a, b, &pairs, steps))
}

fn comparable(x: &Tensor, y: &Tensor) -> bool {
    x.kind == y.kind && x.words() == y.words()
}

fn collect(
    a: &Checkpoint<'_>,
    b: &Checkpoint<'_>,
    pairs: &[(&Tensor, &Tensor)],
    steps: Vec<(u64, UlpHistogram)>,
) -> Diff {
    let mut found = Diff::default();
    for (&(x, y), (changed, ulps)) in pairs.iter().zip(steps) {
        let reshaped = x.shape != y.shape;
        if changed == 0 && !reshaped {
            found.unchanged += 1;
            continue;
        }
        let change = Change::Words { words: x.words(), changed, reshaped, ulps: Box::new(ulps) };
        found.tensors.push(TensorDiff { name: x.name.clone(), change });
    }
    for x in a.sorted() {
        let change = match b.get(&x.name) {
            None => Change::Removed,
            Some(y) if !comparable(x, y) => Change::Retyped {
                from: (x.kind.name(), x.shape.clone()),
                to: (y.kind.name(), y.shape.clone()),
            },
            Some(_) => continue,
        };
        found.tensors.push(TensorDiff { name: x.name.clone(), change });
    }
    for y in b.sorted().filter(|y| a.get(&y.name).is_none()) {
        found.tensors.push(TensorDiff { name: y.name.clone(), change: Change::Added });
    }
    found.tensors.sort_by(|x, y| x.name.cmp(&y.name));
    found
}

/// Histogram of step sizes between two runs of words. Entry 0 stays 0: equal words are not counted.
fn count_steps(kind: Kind, old: &[u8], new: &[u8]) -> UlpHistogram {
    let mut histogram = [0; 65];
    let Kind::Plain(dtype) = kind else { return histogram };
    let bytes = dtype.word_bytes();
    if old == new {
        return histogram;
    }
    for (x, y) in old.chunks_exact(bytes).zip(new.chunks_exact(bytes)).filter(|(x, y)| x != y) {
        let step = ordered(dtype, y) - ordered(dtype, x);
        histogram[(128 - step.unsigned_abs().leading_zeros()) as usize] += 1;
    }
    histogram
}

/// A word's place among the values of its type: the order map of the format, or the integer itself.
fn ordered(dtype: Dtype, word: &[u8]) -> i128 {
    let mut wide = [0; 8];
    wide[8 - word.len()..].copy_from_slice(word);
    let shift = 64 - 8 * word.len() as u32;
    if matches!(dtype, Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64) || dtype.float_layout().is_some() {
        let signed = i64::from_le_bytes(wide) >> shift;
        let mapped = dtype.float_layout().is_some() && signed < 0;
        return i128::from(if mapped { signed ^ (i64::MAX >> shift) } else { signed });
    }
    i128::from(u64::from_le_bytes(wide) >> shift)
}

impl Change {
    /// The change in words for people: what, words changed, share, histogram.
    pub fn cells(&self) -> Vec<String> {
        match self {
            Change::Added => vec!["added".into()],
            Change::Removed => vec!["removed".into()],
            Change::Retyped { from, to } => {
                vec![format!("{} {:?} -> {} {:?}", from.0, from.1, to.0, to.1)]
            }
            Change::Words { words, changed, reshaped, ulps } => {
                let share = 100.0 * *changed as f64 / (*words).max(1) as f64;
                let steps: Vec<String> = ulp_ranges(ulps)
                    .map(|(from, to, n)| match from == to {
                        true => format!("{from}: {n}"),
                        false => format!("{from}-{to}: {n}"),
                    })
                    .collect();
                let what = if *reshaped { "reshaped" } else { "changed" };
                vec![what.into(), changed.to_string(), format!("{share:.3}%"), steps.join(", ")]
            }
        }
    }
}

impl TensorDiff {
    /// The difference as JSON.
    pub fn to_json(&self) -> Value {
        match &self.change {
            Change::Added => json!({ "name": self.name, "change": "added" }),
            Change::Removed => json!({ "name": self.name, "change": "removed" }),
            Change::Retyped { from, to } => json!({
                "name": self.name, "change": "retyped",
                "from": { "dtype": from.0, "shape": from.1 }, "to": { "dtype": to.0, "shape": to.1 },
            }),
            Change::Words { words, changed, reshaped, ulps } => json!({
                "name": self.name, "change": "words", "words": words, "changed": changed,
                "reshaped": reshaped,
                "ulps": ulp_ranges(ulps)
                    .map(|(from, to, words)| json!({ "from": from, "to": to, "words": words }))
                    .collect::<Vec<_>>(),
            }),
        }
    }
}

/// The histogram's non-empty entries: smallest and largest step counted, and how many words.
fn ulp_ranges(ulps: &UlpHistogram) -> impl Iterator<Item = (u64, u64, u64)> {
    let filled = ulps.iter().enumerate().filter(|&(bits, &count)| bits > 0 && count > 0);
    filled.map(|(bits, &count)| (1 << (bits - 1), u64::MAX >> (64 - bits), count))
}

impl Diff {
    /// The differences as JSON.
    pub fn to_json(&self) -> Value {
        json!({
            "unchanged": self.unchanged,
            "tensors": self.tensors.iter().map(TensorDiff::to_json).collect::<Vec<_>>(),
        })
    }
}
