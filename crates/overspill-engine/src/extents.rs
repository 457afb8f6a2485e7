//! Exact allocation of runs inside a fixed range: best fit, neighbours merged when freed.
//!
//! Pure bookkeeping, used for slabs of host memory and for the spill file. Sizes are rounded up to
//! the granule and not to powers of two.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// The free runs of `0..capacity`.
#[derive(Debug, Clone)]
pub struct Extents {
    granule: u64,
    capacity: u64,
    free_bytes: u64,
    /// start -> length
    by_start: BTreeMap<u64, u64>,
    /// (length, start)
    by_length: BTreeSet<(u64, u64)>,
}

impl Extents {
    /// All of `0..capacity` free; `capacity` is rounded down to the granule.
    ///
    /// # Panics
    /// If `granule` is 0.
    #[must_use]
    pub fn new(capacity: u64, granule: u64) -> Self {
        assert!(granule > 0, "granule is 0");
        let capacity = capacity / granule * granule;
        let mut extents =
            Self { granule, capacity, free_bytes: 0, by_start: BTreeMap::new(), by_length: BTreeSet::new() };
        if capacity > 0 {
            extents.insert(0, capacity);
        }
        extents
    }

    /// Bytes not handed out.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes
    }

    /// Bytes handed out.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.capacity - self.free_bytes
    }

    /// End of the highest run handed out.
    #[must_use]
    pub fn high_water_bytes(&self) -> u64 {
        match self.by_start.last_key_value() {
            Some((&start, &length)) if start + length == self.capacity => start,
            _ => self.capacity,
        }
    }

    /// The smallest free run that holds `bytes`, cut to size; `None` if there is none.
    pub fn alloc(&mut self, bytes: u64) -> Option<Range<u64>> {
        let need = bytes.max(1).checked_next_multiple_of(self.granule)?;
        let &(length, start) = self.by_length.range((need, 0)..).next()?;
        self.remove(start, length);
        if length > need {
            self.insert(start + need, length - need);
        }
        Some(start..start + need)
    }

    /// Takes back a run that [`Extents::alloc`] gave.
    ///
    /// # Panics
    /// If any of it is free already: a double free is a bug above, and going on would hand one
    /// byte to two owners.
    pub fn free(&mut self, run: Range<u64>) {
        let before = self.by_start.range(..run.end).next_back().map(|(&start, &length)| (start, length));
        assert!(before.is_none_or(|(start, length)| start + length <= run.start), "{run:?} freed twice");
        let (mut start, mut end) = (run.start, run.end);
        if let Some((left, length)) = before.filter(|&(left, length)| left + length == start) {
            self.remove(left, length);
            start = left;
        }
        if let Some(&length) = self.by_start.get(&end) {
            self.remove(end, length);
            end += length;
        }
        self.insert(start, end - start);
    }

    fn insert(&mut self, start: u64, length: u64) {
        self.by_start.insert(start, length);
        self.by_length.insert((length, start));
        self.free_bytes += length;
    }

    fn remove(&mut self, start: u64, length: u64) {
        self.by_start.remove(&start);
        self.by_length.remove(&(length, start));
        self.free_bytes -= length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_exactly_and_merges_back() {
        let mut extents = Extents::new(10 * 4096 + 17, 4096);
        let runs: Vec<_> = (0..10).map(|_| extents.alloc(4000).expect("room")).collect();
        assert_eq!(extents.alloc(1), None);
        assert_eq!(extents.used_bytes(), 10 * 4096);
        for run in runs.into_iter().rev() {
            extents.free(run);
        }
        assert_eq!(extents.alloc(10 * 4096), Some(0..10 * 4096));
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn refuses_a_double_free() {
        let mut extents = Extents::new(8192, 4096);
        let run = extents.alloc(1).expect("room");
        extents.free(run.clone());
        extents.free(run);
    }

    #[test]
    fn random_traffic_never_overlaps() {
        for seed in 0..200 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut extents = Extents::new(1 << 20, 512);
            let mut out: Vec<Range<u64>> = Vec::new();
            for _ in 0..300 {
                if rng.bool() || out.is_empty() {
                    let bytes = rng.u64(1..40_000);
                    if let Some(run) = extents.alloc(bytes) {
                        assert!(run.end - run.start >= bytes, "seed {seed}");
                        assert!(
                            out.iter().all(|o| o.end <= run.start || run.end <= o.start),
                            "seed {seed}: {run:?} overlaps"
                        );
                        out.push(run);
                    }
                } else {
                    let run = out.swap_remove(rng.usize(..out.len()));
                    extents.free(run);
                }
                let used: u64 = out.iter().map(|run| run.end - run.start).sum();
                assert_eq!(extents.used_bytes(), used, "seed {seed}");
            }
            out.drain(..).for_each(|run| extents.free(run));
            assert_eq!(extents.alloc(1 << 20), Some(0..1 << 20), "seed {seed}");
        }
    }
}
