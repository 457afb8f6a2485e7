//! Bytes over the events of a step: add to a range, ask for its maximum, find where it is too high.
//!
//! A segment tree with sums left at the nodes, so that a plan for thousands of units is a few
//! milliseconds of work. Knows nothing of units.

use std::ops::Range;

/// See the module.
pub(crate) struct Profile {
    len: usize,
    /// Power of two, number of leaves.
    size: usize,
    /// Highest value below a node, without what its ancestors add.
    max: Vec<i64>,
    /// Added to everything below a node.
    add: Vec<i64>,
}

impl Profile {
    /// One value an event.
    pub fn new(values: &[i64]) -> Self {
        let size = values.len().next_power_of_two().max(1);
        let mut max = vec![i64::MIN / 4; 2 * size];
        max[size..size + values.len()].copy_from_slice(values);
        for node in (1..size).rev() {
            max[node] = max[2 * node].max(max[2 * node + 1]);
        }
        Self { len: values.len(), size, max, add: vec![0; 2 * size] }
    }

    /// Adds `value` to every event of `range`.
    pub fn add(&mut self, range: Range<usize>, value: i64) {
        let range = range.start..range.end.min(self.len);
        if range.start < range.end {
            self.add_below(1, 0..self.size, &range, value);
        }
    }

    /// The highest value in `range`; very low where it is empty.
    pub fn max(&self, range: Range<usize>) -> i64 {
        let range = range.start..range.end.min(self.len);
        if range.start < range.end { self.max_below(1, 0..self.size, &range) } else { i64::MIN / 4 }
    }

    /// The last event of `range` whose value exceeds `limit`.
    pub fn last_above(&self, range: Range<usize>, limit: i64) -> Option<usize> {
        let range = range.start..range.end.min(self.len);
        if range.start < range.end { self.last_below(1, 0..self.size, &range, limit) } else { None }
    }

    fn add_below(&mut self, node: usize, span: Range<usize>, range: &Range<usize>, value: i64) {
        if range.start <= span.start && span.end <= range.end {
            self.max[node] += value;
            self.add[node] += value;
            return;
        }
        let middle = usize::midpoint(span.start, span.end);
        if range.start < middle {
            self.add_below(2 * node, span.start..middle, range, value);
        }
        if range.end > middle {
            self.add_below(2 * node + 1, middle..span.end, range, value);
        }
        self.max[node] = self.max[2 * node].max(self.max[2 * node + 1]) + self.add[node];
    }

    fn max_below(&self, node: usize, span: Range<usize>, range: &Range<usize>) -> i64 {
        if range.start <= span.start && span.end <= range.end {
            return self.max[node];
        }
        let middle = usize::midpoint(span.start, span.end);
        let mut max = i64::MIN / 4;
        if range.start < middle {
            max = max.max(self.max_below(2 * node, span.start..middle, range));
        }
        if range.end > middle {
            max = max.max(self.max_below(2 * node + 1, middle..span.end, range));
        }
        max + self.add[node]
    }

    fn last_below(&self, node: usize, span: Range<usize>, range: &Range<usize>, limit: i64) -> Option<usize> {
        if range.end <= span.start || span.end <= range.start || self.max[node] <= limit {
            return None;
        }
        if span.len() == 1 {
            return Some(span.start);
        }
        let middle = usize::midpoint(span.start, span.end);
        let limit = limit - self.add[node];
        self.last_below(2 * node + 1, middle..span.end, range, limit)
            .or_else(|| self.last_below(2 * node, span.start..middle, range, limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_a_plain_array() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut plain: Vec<i64> = (0..random.usize(1..40)).map(|_| random.i64(0..100)).collect();
            let mut profile = Profile::new(&plain);
            for _ in 0..50 {
                let (a, b) = (random.usize(0..=plain.len()), random.usize(0..=plain.len()));
                let (range, value) = (a.min(b)..a.max(b), random.i64(-50..50));
                profile.add(range.clone(), value);
                plain[range.clone()].iter_mut().for_each(|at| *at += value);
                let (c, d) = (random.usize(0..=plain.len()), random.usize(0..=plain.len()));
                let asked = c.min(d)..c.max(d);
                let max = plain[asked.clone()].iter().copied().max().unwrap_or(i64::MIN / 4);
                assert_eq!(profile.max(asked.clone()), max, "seed {seed}");
                let last = asked.clone().rev().find(|&at| plain[at] > 60);
                assert_eq!(profile.last_above(asked, 60), last, "seed {seed}");
            }
        }
    }
}
