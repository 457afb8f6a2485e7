//! Host memory for transfers: a few large slabs, sub-allocated exactly, never freed on the hot path.
//!
//! The pool hands out [`HostExtent`]s. An extent's bytes come back when its last owner drops it,
//! and a copy in flight is an owner, so a byte is never reused before its copy has passed. Slabs go
//! back to the device when the pool and all its extents are gone.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

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
pub struct HostPool {
    inner: Arc<Mutex<Inner>>,
    /// Held while a slab is allocated, so that others wait for it instead of finding the budget
    /// spent and no slab. Only callers of the pool take it, never a job of the device's.
    growth: Arc<Mutex<()>>,
}

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
        Self { inner: Arc::new(Mutex::new(inner)), growth: Arc::default() }
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

    /// Adds a slab that holds at least `bytes`, if the budget allows it. Page-locking takes the
    /// operating system its time, so the books are not locked meanwhile. True as well if somebody
    /// else has added one since the caller saw `slabs_seen`: then look again.
    fn grow(&self, bytes: usize, slabs_seen: usize) -> Result<bool> {
        let _growth = self.growth.lock().unwrap_or_else(PoisonError::into_inner);
        let (device, slab_bytes) = {
            let mut inner = self.lock();
            if inner.slabs.len() > slabs_seen {
                return Ok(true);
            }
            let Some(slab_bytes) = inner.next_slab_bytes(bytes) else { return Ok(false) };
            inner.counters.bytes_reserved += slab_bytes as u64;
            (Arc::clone(&inner.device), slab_bytes)
        };
        let slab = device.alloc_host(slab_bytes);
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

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
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
