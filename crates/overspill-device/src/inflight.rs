//! Copies with their leases: rule 1 as a type.

use std::sync::Arc;

use crate::{DeviceRange, Direction, Error, EventRef, HostExtent, Keep, RawCopy, Result, StreamRef};

/// A copy on its way, with the leases it needs.
///
/// Drop it once [`InFlight::is_done`]; dropped before that, it blocks until the event has passed,
/// because freeing memory under a copy is never right.
#[must_use = "dropping a copy in flight blocks until it has passed"]
pub struct InFlight {
    /// The device's side and whatever holds the host's.
    pairs: Vec<(DeviceRange, Keep)>,
    bytes: usize,
    event: EventRef,
}

impl std::fmt::Debug for InFlight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "InFlight({} bytes)", self.bytes)
    }
}

impl std::fmt::Debug for dyn crate::Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Event")
    }
}

impl InFlight {
    /// The event that passes when all copies are done.
    #[must_use]
    pub fn event(&self) -> &EventRef {
        &self.event
    }

    /// Bytes moved.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether the copies are done; dropping it does not block then.
    pub fn is_done(&self) -> Result<bool> {
        self.event.is_done()
    }

    /// Takes out the leases on device memory before the copies have passed. Only for memory whose
    /// owner reuses it in the order of a stream that has been made to wait for [`InFlight::event`],
    /// as PyTorch's allocator does for tensors of its current stream. The host extents stay leased.
    #[must_use = "drop the leases outside of any lock"]
    pub fn take_device_leases(&mut self) -> Vec<DeviceRange> {
        self.pairs.iter_mut().map(|(range, _)| std::mem::replace(range, DeviceRange::released())).collect()
    }

    /// The leases of copies that [`InFlight::is_done`] said have passed, with no further call into
    /// the device: for who counts on the host memory being free before anything else can run.
    #[must_use = "drop the leases outside of any lock"]
    pub fn settle(mut self) -> (Vec<DeviceRange>, Vec<Keep>) {
        std::mem::take(&mut self.pairs).into_iter().unzip()
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.pairs.is_empty() {
            // A device whose events fail has lost its context: nothing runs on it any more.
            let _ = self.event.synchronize();
        }
    }
}

/// Copies device ranges into host extents, which from then on are read-only and make their readers
/// wait for the copy.
pub fn offload(
    stream: &StreamRef,
    pairs: Vec<(DeviceRange, HostExtent)>,
) -> Result<(InFlight, Vec<Arc<HostExtent>>)> {
    let pairs: Vec<_> = pairs.into_iter().map(|(range, extent)| (range, Arc::new(extent))).collect();
    let extents: Vec<_> = pairs.iter().map(|(_, extent)| Arc::clone(extent)).collect();
    let in_flight = enqueue(stream, Direction::Offload, pairs)?;
    for extent in &extents {
        extent.set_filled(Arc::clone(&in_flight.event));
    }
    Ok((in_flight, extents))
}

/// Copies host extents into device ranges, behind whatever still fills the extents.
///
/// The caller has made `stream` wait for the point from which the destination may be written.
pub fn onboard(stream: &StreamRef, pairs: Vec<(DeviceRange, Arc<HostExtent>)>) -> Result<InFlight> {
    for (_, extent) in &pairs {
        if let Some(event) = extent.filled() {
            stream.wait(&event)?;
        }
    }
    enqueue(stream, Direction::Onboard, pairs)
}

fn enqueue(
    stream: &StreamRef,
    direction: Direction,
    pairs: Vec<(DeviceRange, Arc<HostExtent>)>,
) -> Result<InFlight> {
    let mut batch = Vec::with_capacity(pairs.len());
    for (range, extent) in &pairs {
        let (src_addr, dst_addr, src_bytes, dst_bytes) = match direction {
            Direction::Offload => (range.addr(), extent.addr(), range.bytes(), extent.bytes()),
            Direction::Onboard => (extent.addr(), range.addr(), extent.bytes(), range.bytes()),
        };
        if src_bytes != dst_bytes {
            return Err(Error::SizeMismatch { src_bytes, dst_bytes });
        }
        batch.push(RawCopy { direction, src_addr, dst_addr, bytes: src_bytes });
    }
    let leases = pairs.into_iter().map(|(range, extent)| (range, extent as Keep)).collect();
    // SAFETY: the ranges and extents live in the InFlight until the event has passed; an extent
    // being filled makes its readers wait (`set_filled`), and one being read cannot be written,
    // since writing needs it outside its Arc.
    unsafe { send(stream, &batch, leases) }
}

/// Enqueues copies and records their event.
///
/// # Safety
/// As [`crate::Stream::copy`]; `leases` keep both sides of every copy mapped.
pub(crate) unsafe fn send(
    stream: &StreamRef,
    batch: &[RawCopy],
    pairs: Vec<(DeviceRange, Keep)>,
) -> Result<InFlight> {
    // SAFETY: the caller's promise is ours.
    let sent = unsafe { stream.copy(batch) };
    match sent.and_then(|()| stream.record()) {
        Ok(event) => {
            let bytes = batch.iter().map(|copy| copy.bytes).sum();
            Ok(InFlight { pairs, bytes, event })
        }
        Err(error) => {
            // Part of the batch may be under way: its leases must outlive it.
            let _ = stream.synchronize();
            Err(error)
        }
    }
}
