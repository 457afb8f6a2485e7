//! Host memory for transfers: a few large slabs, sub-allocated exactly, never freed on the hot path.
//!
//! The pool hands out [`HostExtent`]s. An extent's bytes come back when its last owner drops it,
//! and a copy in flight is an owner, so a byte is never reused before its copy has passed. Slabs go
//! back to the device when the pool and all its extents are gone.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use overspill_device::{DeviceRef, HostExtent, HostSlab, Keep};
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
pub struct HostPool(Arc<Mutex<Inner>>);

struct Inner {
    device: DeviceRef,
    budget_bytes: usize,
    slab_bytes: usize,
    slabs: Vec<(HostSlab, Extents)>,
    counters: PoolCounters,
}

impl HostPool {
    /// An empty pool that will hold at most `budget_bytes`, in slabs of `slab_bytes`.
    #[must_use]
    pub fn new(device: DeviceRef, budget_bytes: usize, slab_bytes: usize) -> Self {
        let inner =
            Inner { device, budget_bytes, slab_bytes, slabs: Vec::new(), counters: PoolCounters::default() };
        Self(Arc::new(Mutex::new(inner)))
    }

    /// Reserves the whole budget now, so that no later call waits for the operating system.
    pub fn reserve_all(&self) -> Result<()> {
        let mut inner = self.lock();
        while inner.grow(1)? {}
        Ok(())
    }

    /// An extent of exactly `bytes`, or `None` if the budget has no room for it now.
    pub fn try_alloc(&self, bytes: usize) -> Result<Option<HostExtent>> {
        let mut inner = self.lock();
        let found = match inner.find(bytes) {
            Some(found) => found,
            None if inner.grow(bytes)? => match inner.find(bytes) {
                Some(found) => found,
                None => return Ok(None),
            },
            None => return Ok(None),
        };
        let (index, run) = found;
        let taken = run.end - run.start;
        inner.counters.bytes_in_use += taken;
        inner.counters.bytes_peak = inner.counters.bytes_peak.max(inner.counters.bytes_in_use);
        let slab = inner.slabs[index].0.clone();
        drop(inner);
        let start = usize::try_from(run.start).unwrap_or(usize::MAX);
        let guard: Keep = Arc::new(Guard { pool: self.clone(), index, run: Some(run) });
        Ok(Some(slab.claim_with(start..start.saturating_add(bytes), Some(guard))?))
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

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn find(&mut self, bytes: usize) -> Option<(usize, std::ops::Range<u64>)> {
        self.slabs
            .iter_mut()
            .enumerate()
            .find_map(|(index, (_, extents))| extents.alloc(bytes as u64).map(|run| (index, run)))
    }

    /// Adds a slab that holds at least `bytes`, if the budget allows it.
    fn grow(&mut self, bytes: usize) -> Result<bool> {
        let left = self.budget_bytes - usize::try_from(self.counters.bytes_reserved).unwrap_or(usize::MAX);
        let granule = GRANULE_BYTES as usize;
        let slab_bytes = bytes.next_multiple_of(granule).max(self.slab_bytes).min(left) / granule * granule;
        if slab_bytes == 0 || slab_bytes < bytes {
            return Ok(false);
        }
        let slab = self.device.alloc_host(slab_bytes)?;
        self.slabs.push((slab, Extents::new(slab_bytes as u64, GRANULE_BYTES)));
        self.counters.bytes_reserved += slab_bytes as u64;
        Ok(true)
    }
}

/// Returns the run to the pool's books once the claim on the slab is gone.
struct Guard {
    pool: HostPool,
    index: usize,
    run: Option<std::ops::Range<u64>>,
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
