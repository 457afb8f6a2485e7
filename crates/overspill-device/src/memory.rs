//! Ranges of device memory and extents of host memory, as leases.
//!
//! [`HostSlab`] is one large allocation; [`HostSlab::claim`] hands out disjoint extents of it and
//! checks that they are disjoint, so that a faulty allocator above gets an error and never two
//! owners of one byte. An extent gives its range back when it is dropped.

use std::{
    any::Any,
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{Error, EventRef, Result};

/// Whatever keeps a piece of memory alive: a torch tensor, an allocation of ours.
pub type Keep = Arc<dyn Any + Send + Sync>;

/// A run of device bytes, kept alive by whoever owns them.
#[derive(Clone)]
pub struct DeviceRange {
    addr: u64,
    bytes: usize,
    keep: Keep,
}

impl DeviceRange {
    /// Takes a lease on memory that someone else allocated.
    ///
    /// # Safety
    /// `addr .. addr + bytes` is device memory (host memory on the simulated device) that stays
    /// allocated while `keep` lives.
    #[must_use]
    pub unsafe fn from_raw(addr: u64, bytes: usize, keep: Keep) -> Self {
        Self { addr, bytes, keep }
    }

    /// An empty range that leases nothing.
    pub(crate) fn released() -> Self {
        Self { addr: 0, bytes: 0, keep: Arc::new(()) }
    }

    /// First byte's address.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A part of this range, under the same lease.
    pub fn slice(&self, range: Range<usize>) -> Result<Self> {
        check(&range, self.bytes)?;
        Ok(Self { addr: self.addr + range.start as u64, bytes: range.len(), keep: Arc::clone(&self.keep) })
    }
}

impl std::fmt::Debug for DeviceRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceRange({:#x}, {} bytes)", self.addr, self.bytes)
    }
}

/// One allocation of host memory that the copy engines reach directly.
#[derive(Clone)]
pub struct HostSlab(Arc<Slab>);

struct Slab {
    addr: u64,
    bytes: usize,
    /// start -> end of the extents that are out.
    claimed: Mutex<BTreeMap<usize, usize>>,
    /// Called with each range that comes back, before it can be claimed again.
    on_return: Option<OnReturn>,
    _keep: Keep,
}

type OnReturn = Box<dyn Fn(u64, usize) + Send + Sync>;

impl HostSlab {
    /// Wraps an allocation of a backend.
    ///
    /// # Safety
    /// `addr .. addr + bytes` is initialised, writable host memory that nobody else touches and
    /// that stays mapped while `keep` lives. `on_return`, if any, may write the range it is given.
    #[must_use]
    pub unsafe fn from_raw(addr: u64, bytes: usize, keep: Keep, on_return: Option<OnReturn>) -> Self {
        Self(Arc::new(Slab { addr, bytes, claimed: Mutex::default(), on_return, _keep: keep }))
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Takes `range` for oneself; an error if any byte of it is out already.
    pub fn claim(&self, range: Range<usize>) -> Result<HostExtent> {
        self.claim_with(range, None)
    }

    /// As [`HostSlab::claim`]; `guard` is dropped right after the range has come back.
    pub fn claim_with(&self, range: Range<usize>, guard: Option<Keep>) -> Result<HostExtent> {
        check(&range, self.0.bytes)?;
        let mut claimed = self.0.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        let overlaps = claimed
            .range(..range.end.max(range.start + 1))
            .next_back()
            .is_some_and(|(_, &end)| end > range.start);
        if overlaps {
            return Err(bad_range(&range, self.0.bytes, "claimed already"));
        }
        if !range.is_empty() {
            claimed.insert(range.start, range.end);
        }
        Ok(HostExtent {
            slab: self.clone(),
            start: range.start,
            bytes: range.len(),
            filled: Mutex::new(None),
            _guard: guard,
        })
    }
}

/// A run of a slab that one owner has, until it is dropped.
pub struct HostExtent {
    slab: HostSlab,
    start: usize,
    bytes: usize,
    /// The event of the copy that fills it, while that may still run.
    filled: Mutex<Option<EventRef>>,
    /// Dropped after the claim is given back (fields drop after `Drop::drop`).
    _guard: Option<Keep>,
}

impl HostExtent {
    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Offset in the slab, in bytes.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.start
    }

    /// First byte's address.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.slab.0.addr + self.start as u64
    }

    /// The bytes, after the copy that fills them (if any) has passed; blocks until then.
    pub fn as_slice(&self) -> Result<&[u8]> {
        self.settle()?;
        // SAFETY: the slab keeps the memory mapped and initialised; the claim makes this extent its
        // only owner; no copy writes it, since `settle` has waited for the last one and the next
        // one needs `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts(self.addr() as *const u8, self.bytes) })
    }

    /// The bytes, to be overwritten by the host.
    pub fn as_mut_slice(&mut self) -> Result<&mut [u8]> {
        self.settle()?;
        // SAFETY: as in `as_slice`; `&mut self` excludes every reader, since copies that read an
        // extent hold it in an `Arc` until their event has passed.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.addr() as *mut u8, self.bytes) })
    }

    /// The event that a reader has to wait for, if the filling copy may still run.
    #[must_use]
    pub fn filled(&self) -> Option<EventRef> {
        self.filled.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes the event of the copy that was just enqueued to fill this extent.
    pub(crate) fn set_filled(&self, event: EventRef) {
        *self.filled.lock().unwrap_or_else(PoisonError::into_inner) = Some(event);
    }

    fn settle(&self) -> Result<()> {
        if let Some(event) = self.filled() {
            event.synchronize()?;
            *self.filled.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        Ok(())
    }
}

impl Drop for HostExtent {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let slab = &self.slab.0;
        if let Some(on_return) = &slab.on_return {
            on_return(self.addr(), self.bytes);
        }
        slab.claimed.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.start);
    }
}

impl std::fmt::Debug for HostExtent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostExtent({}, {} bytes)", self.start, self.bytes)
    }
}

fn check(range: &Range<usize>, bytes: usize) -> Result<()> {
    if range.start <= range.end && range.end <= bytes {
        Ok(())
    } else {
        Err(bad_range(range, bytes, "out of bounds"))
    }
}

fn bad_range(range: &Range<usize>, bytes: usize, what: &'static str) -> Error {
    Error::BadRange { start: range.start, end: range.end, bytes, what }
}
