//! Host memory for transfers: a few large slabs, sub-allocated exactly, never freed on the hot path.
//!
//! The pool hands out [`HostExtent`]s. An extent's bytes come back when its last owner drops it,
//! and a copy in flight is an owner, so a byte is never reused before its copy has passed. Slabs go
//! back to the device when the pool and all its extents are gone.
//!
//! Page-locking a slab takes a third of a second a GiB. A pool made by [`HostPool::growing_ahead`]
//! adds the next slab on a thread of its own before the last one is full.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use overspill_device::{DeviceRef, Gate, HostExtent, HostSlab, Keep, QueueRef};
use serde::Serialize;

use crate::{Error, Extents, Result, Tier};

/// Direct I/O needs buffers that start and end on this; also the pool's rounding.
pub(crate) const GRANULE_BYTES: u64 = 4096;

/// Counters of a pool, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PoolCounters {
    /// Held from the device, used or not.
    pub bytes_reserved: u64,
    /// Handed out now.
    pub bytes_in_use: u64,
    /// Most handed out at any time.
    pub bytes_peak: u64,
}

/// See the module.
#[derive(Clone)]
pub struct HostPool(Arc<Shared>);

struct Shared {
    device: DeviceRef,
    /// Where slabs are added ahead of need, if they are.
    ahead: Option<QueueRef>,
    /// Held while a caller adds a slab, so that others wait for it instead of finding the budget
    /// spent and no slab. Only callers of the pool take it, never a job of the device's.
    growth: Mutex<()>,
    inner: Mutex<Inner>,
}

struct Inner {
    budget_bytes: usize,
    slab_bytes: usize,
    slabs: Vec<(HostSlab, Extents)>,
    counters: PoolCounters,
    /// Opens when the slab that is being added ahead of need is there, or was refused.
    growing: Option<Arc<Gate>>,
    /// A slab ahead of need was refused: whoever needs it asks again, and gets the error.
    refused: bool,
}

impl HostPool {
    /// An empty pool that will hold at most `budget_bytes`, in slabs of `slab_bytes`.
    #[must_use]
    pub fn new(device: DeviceRef, budget_bytes: usize, slab_bytes: usize) -> Self {
        Self::with_queue(device, budget_bytes, slab_bytes, None)
    }

    /// As [`HostPool::new`]; slabs are added in the background, the first one from now on.
    pub fn growing_ahead(device: DeviceRef, budget_bytes: usize, slab_bytes: usize) -> Result<Self> {
        let queue = device.new_queue("pool")?;
        let pool = Self::with_queue(device, budget_bytes, slab_bytes, Some(queue));
        pool.grow_ahead();
        Ok(pool)
    }

    fn with_queue(
        device: DeviceRef,
        budget_bytes: usize,
        slab_bytes: usize,
        ahead: Option<QueueRef>,
    ) -> Self {
        let inner = Inner {
            budget_bytes,
            slab_bytes,
            slabs: Vec::new(),
            counters: PoolCounters::default(),
            growing: None,
            refused: false,
        };
        Self(Arc::new(Shared { device, ahead, growth: Mutex::default(), inner: Mutex::new(inner) }))
    }

    /// Reserves the whole budget now, so that no later call waits for the operating system.
    pub fn reserve_all(&self) -> Result<()> {
        loop {
            let slabs_seen = self.lock().slabs.len();
            if !self.grow(1, slabs_seen)? {
                return Ok(());
            }
        }
    }

    /// An extent of exactly `bytes`, or `None` if the budget has no room for it now.
    pub fn try_alloc(&self, bytes: usize) -> Result<Option<HostExtent>> {
        loop {
            let mut inner = self.lock();
            let slabs_seen = inner.slabs.len();
            let found = inner.find(bytes);
            drop(inner);
            if let Some((slab, index, run)) = found {
                self.grow_ahead();
                let start = usize::try_from(run.start).unwrap_or(usize::MAX);
                let guard: Keep = Arc::new(Guard { pool: self.clone(), index, run: Some(run) });
                return Ok(Some(slab.claim_with(start..start.saturating_add(bytes), Some(guard))?));
            }
            if !self.grow(bytes, slabs_seen)? {
                return Ok(None);
            }
        }
    }

    /// The error for an allocation that can never succeed or has nothing to wait for.
    #[must_use]
    pub fn full(&self, requested_bytes: usize) -> Error {
        let inner = self.lock();
        let held: u64 = inner.slabs.iter().map(|(_, extents)| extents.free_bytes()).sum();
        let ungrown = inner.budget_bytes as u64 - inner.counters.bytes_reserved;
        Error::Full {
            tier: Tier::Host,
            requested_bytes: requested_bytes as u64,
            available_bytes: held + ungrown,
            budget_bytes: inner.budget_bytes as u64,
            advice: "raise --host-budget, or give a --spill-dir with room",
        }
    }

    /// The counters now.
    #[must_use]
    pub fn counters(&self) -> PoolCounters {
        self.lock().counters
    }

    /// Makes room for an extent of `bytes` if the budget allows it. True as well if somebody else
    /// has added a slab since the caller saw `slabs_seen`: then look again.
    fn grow(&self, bytes: usize, slabs_seen: usize) -> Result<bool> {
        let _growth = self.0.growth.lock().unwrap_or_else(PoisonError::into_inner);
        let growing = {
            let inner = self.lock();
            if inner.slabs.len() > slabs_seen {
                return Ok(true);
            }
            inner.growing.clone()
        };
        if let Some(gate) = growing {
            self.0.device.block_on(&gate)?;
            return Ok(true);
        }
        let added = self.add_slab(bytes)?;
        let inner = self.lock();
        Ok(added || inner.growing.is_some() || inner.slabs.len() > slabs_seen)
    }

    /// Adds a slab that holds at least `bytes`, if the budget allows it. Page-locking takes the
    /// operating system its time, so the books are not locked meanwhile.
    fn add_slab(&self, bytes: usize) -> Result<bool> {
        let slab_bytes = {
            let mut inner = self.lock();
            let Some(slab_bytes) = inner.next_slab_bytes(bytes) else { return Ok(false) };
            inner.counters.bytes_reserved += slab_bytes as u64;
            slab_bytes
        };
        let slab = self.0.device.alloc_host(slab_bytes);
        let mut inner = self.lock();
        match slab {
            Ok(slab) => {
                inner.slabs.push((slab, Extents::new(slab_bytes as u64, GRANULE_BYTES)));
                Ok(true)
            }
            Err(error) => {
                inner.counters.bytes_reserved -= slab_bytes as u64;
                Err(error.into())
            }
        }
    }

    /// Starts adding the next slab if the free bytes are running low.
    fn grow_ahead(&self) {
        let Some(queue) = &self.0.ahead else { return };
        let gate = Arc::new(Gate::new());
        {
            let mut inner = self.lock();
            if inner.growing.is_some() || inner.refused || !inner.is_low() {
                return;
            }
            inner.growing = Some(Arc::clone(&gate));
        }
        let pool = Arc::downgrade(&self.0);
        queue.push(Box::new(move || {
            if let Some(pool) = pool.upgrade().map(HostPool) {
                let grown = pool.add_slab(1);
                let mut inner = pool.lock();
                inner.growing = None;
                inner.refused = grown.is_err();
            }
            gate.open();
        }));
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn find(&mut self, bytes: usize) -> Option<(HostSlab, usize, Range<u64>)> {
        let found = self.slabs.iter_mut().enumerate().find_map(|(index, (slab, extents))| {
            extents.alloc(bytes as u64).map(|run| (slab.clone(), index, run))
        })?;
        self.counters.bytes_in_use += found.2.end - found.2.start;
        self.counters.bytes_peak = self.counters.bytes_peak.max(self.counters.bytes_in_use);
        Some(found)
    }

    /// Whether less than half a slab is free and the budget has room for more.
    fn is_low(&self) -> bool {
        let free_bytes: u64 = self.slabs.iter().map(|(_, extents)| extents.free_bytes()).sum();
        free_bytes < self.slab_bytes as u64 / 2 && self.next_slab_bytes(1).is_some()
    }

    /// Size of a slab to add for an extent of `bytes`, within the budget.
    fn next_slab_bytes(&self, bytes: usize) -> Option<usize> {
        let left = self.budget_bytes - usize::try_from(self.counters.bytes_reserved).unwrap_or(usize::MAX);
        let granule = GRANULE_BYTES as usize;
        let slab_bytes = bytes.next_multiple_of(granule).max(self.slab_bytes).min(left) / granule * granule;
        (slab_bytes > 0 && slab_bytes >= bytes).then_some(slab_bytes)
    }
}

/// Returns the run to the pool's books once the claim on the slab is gone.
struct Guard {
    pool: HostPool,
    index: usize,
    run: Option<Range<u64>>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(run) = self.run.take() {
            let mut inner = self.pool.lock();
            inner.counters.bytes_in_use -= run.end - run.start;
            inner.slabs[self.index].1.free(run);
        }
    }
}

#[cfg(test)]
mod tests {
    use overspill_device::sim::{SimConfig, SimDevice};

    use super::*;

    #[test]
    fn a_pool_that_grows_ahead_gives_out_its_whole_budget_and_gets_it_back() {
        for seed in 0..500 {
            let device = SimDevice::seeded(SimConfig { seed, ..SimConfig::default() });
            fill_and_empty(device, seed);
        }
        fill_and_empty(SimDevice::threads(), 0);
    }

    fn fill_and_empty(device: DeviceRef, seed: u64) {
        let pool = HostPool::growing_ahead(device, 10 * 4096, 3 * 4096).expect("pool");
        let mut extents = Vec::new();
        while let Some(extent) = pool.try_alloc(4096).unwrap_or_else(|error| panic!("seed {seed}: {error}")) {
            extents.push(extent);
        }
        assert_eq!(extents.len(), 10, "seed {seed}");
        assert_eq!(pool.counters().bytes_reserved, 10 * 4096, "seed {seed}");
        drop(extents);
        assert_eq!(pool.counters().bytes_in_use, 0, "seed {seed}");
    }

    #[test]
    fn a_slab_refused_ahead_is_an_error_for_whoever_needs_it() {
        for seed in 0..200 {
            let config = SimConfig { seed, fail_allocation: Some(1), ..SimConfig::default() };
            let pool = HostPool::growing_ahead(SimDevice::seeded(config), 8 * 4096, 4096).expect("pool");
            let (mut held, mut errors) = (Vec::new(), 0);
            for _ in 0..20 {
                match pool.try_alloc(4096) {
                    Ok(Some(extent)) => held.push(extent),
                    Ok(None) => break,
                    Err(_) => errors += 1,
                }
            }
            assert_eq!(held.len(), 8, "seed {seed}: the budget is usable once memory is there again");
            assert!(errors <= 1, "seed {seed}: one allocation fails");
        }
    }
}
