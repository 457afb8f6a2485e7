//! A slot: bytes that left the device, wherever they are now.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64};

use overspill_device::HostExtent;

use crate::disk::DiskExtent;

/// Bytes of one offload. Clones share it; the bytes are given up with the last clone.
#[derive(Clone)]
pub struct Slot(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    /// Total, in bytes.
    pub bytes: usize,
    /// Position of the last copy in the order of offloads; see `Engine::release_source`.
    pub sequence: AtomicU64,
    segments: Mutex<Vec<Segment>>,
}

/// A piece of a slot.
pub(crate) struct Segment {
    /// Offset in the slot.
    pub offset_bytes: usize,
    /// Length.
    pub bytes: usize,
    /// Where it is.
    pub place: Place,
}

/// Where a segment is. `Spilling` is still readable; it becomes `Disk`, or `Host` again if the
/// write fails.
#[derive(Clone)]
pub(crate) enum Place {
    Host(Arc<HostExtent>),
    Spilling(Arc<HostExtent>),
    Disk(Arc<DiskExtent>),
}

impl Slot {
    /// Without segments yet; the engine adds them as it sends them.
    pub(crate) fn new(bytes: usize) -> Self {
        Self(Arc::new(Inner { bytes, sequence: AtomicU64::new(0), segments: Mutex::default() }))
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Bytes of it that are in host memory.
    #[must_use]
    pub fn host_bytes(&self) -> usize {
        let on_host = |segment: &&Segment| !matches!(segment.place, Place::Disk(_));
        self.0.segments().iter().filter(on_host).map(|segment| segment.bytes).sum()
    }
}

impl Inner {
    pub(crate) fn segments(&self) -> MutexGuard<'_, Vec<Segment>> {
        self.segments.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
