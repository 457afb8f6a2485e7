//! Bytes over the events of a step: add to a range, ask for its maximum, find where it is too high.
//!
//! A segment tree with sums left at the nodes, walked from the leaves up, so that a plan for thousands of
//! units is a few milliseconds of work. Knows nothing of units.

use std::ops::Range;

/// Lower than any sum of bytes, and far from overflow.
const LOWEST: i64 = i64::MIN / 4;

/// See the module.
pub(crate) struct Profile {
    len: usize,
    /// Power of two, number of leaves; the first leaf and at least one behind the values are bounds.
    size: usize,
    nodes: Vec<Node>,
}

#[derive(Clone, Copy)]
struct Node {
    /// Highest value below, without what the ancestors add.
    max: i64,
    /// Added to everything below.
    add: i64,
}

impl Profile {
    /// One value an event.
    pub fn new(values: &[i64]) -> Self {
        let size = (values.len() + 2).next_power_of_two();
        let mut nodes = vec![Node { max: LOWEST, add: 0 }; 2 * size];
        for (node, &value) in nodes[size + 1..].iter_mut().zip(values) {
            node.max = value;
        }
        for node in (1..size).rev() {
            nodes[node].max = nodes[2 * node].max.max(nodes[2 * node + 1].max);
        }
        Self { len: values.len(), size, nodes }
    }

    /// The leaves around `range`, or None where it is empty.
    fn around(&self, range: &Range<usize>) -> Option<(usize, usize)> {
        let end = range.end.min(self.len);
        (range.start < end).then_some((self.size + range.start, self.size + end + 1))
    }

    /// Adds `value` to every event of `range`.
    pub fn add(&mut self, range: Range<usize>, value: i64) {
        let Some((mut left, mut right)) = self.around(&range) else { return };
        while left ^ right != 1 {
            if left & 1 == 0 {
                self.raise(left ^ 1, value);
            }
            if right & 1 == 1 {
                self.raise(right ^ 1, value);
            }
            (left, right) = (left / 2, right / 2);
            self.renew(left);
            self.renew(right);
        }
        while left > 1 {
            left /= 2;
            self.renew(left);
        }
    }

    fn raise(&mut self, node: usize, value: i64) {
        self.nodes[node].max += value;
        self.nodes[node].add += value;
    }

    fn renew(&mut self, node: usize) {
        let below = self.nodes[2 * node].max.max(self.nodes[2 * node + 1].max);
        self.nodes[node].max = below + self.nodes[node].add;
    }

    /// The highest value in `range`; very low where it is empty.
    pub fn max(&self, range: Range<usize>) -> i64 {
        let Some((mut left, mut right)) = self.around(&range) else { return LOWEST };
        let (mut of_left, mut of_right) = (LOWEST, LOWEST);
        while left ^ right != 1 {
            if left & 1 == 0 {
                of_left = of_left.max(self.nodes[left ^ 1].max);
            }
            if right & 1 == 1 {
                of_right = of_right.max(self.nodes[right ^ 1].max);
            }
            (left, right) = (left / 2, right / 2);
            of_left += self.nodes[left].add;
            of_right += self.nodes[right].add;
        }
        let mut max = of_left.max(of_right);
        while left > 1 {
            left /= 2;
            max += self.nodes[left].add;
        }
        max
    }

    /// The last event of `range` whose value exceeds `limit`.
    pub fn last_above(&self, range: Range<usize>, limit: i64) -> Option<usize> {
        let leaves = range.start + 1..range.end.min(self.len) + 1;
        if leaves.start < leaves.end { self.last_below(1, 0..self.size, &leaves, limit) } else { None }
    }

    fn last_below(&self, node: usize, span: Range<usize>, range: &Range<usize>, limit: i64) -> Option<usize> {
        if range.end <= span.start || span.end <= range.start || self.nodes[node].max <= limit {
            return None;
        }
        if span.len() == 1 {
            return Some(span.start - 1);
        }
        let middle = usize::midpoint(span.start, span.end);
        let limit = limit - self.nodes[node].add;
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
