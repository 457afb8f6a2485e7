//! Streams, ours and PyTorch's, and events on them.

use std::{any::Any, sync::Arc};

use cudarc::driver::sys::{self, CUstream};

use super::{
    batch::BatchCopy,
    clock::{Base, Clock, RawEvent, destroy_stream, new_stream},
    driver::{Context, check},
    host::{HostCounters, HostMemory},
};
use crate::{Direction, Error, Event, EventRef, RawCopy, Result, Stream};

/// Handles of the driver that name a default stream; batch copies refuse the first.
const SPECIAL_HANDLES: std::ops::RangeInclusive<u64> = 0..=2;

/// A stream: ours, destroyed when dropped, or someone else's, only wrapped.
pub struct CudaStream {
    shared: Shared,
    raw: CUstream,
    owned: bool,
}

/// What the streams of one device share.
#[derive(Clone)]
pub(super) struct Shared {
    pub context: Arc<Context>,
    pub clock: Arc<Clock>,
    pub batch: Option<BatchCopy>,
    pub host_counters: Arc<HostCounters>,
}

// SAFETY: the driver locks streams; a handle may be used on any thread.
unsafe impl Send for CudaStream {}
// SAFETY: as above.
unsafe impl Sync for CudaStream {}

impl CudaStream {
    pub(super) fn new(shared: &Shared) -> Result<Self> {
        let raw = new_stream(&shared.context)?;
        Ok(Self { shared: shared.clone(), raw, owned: true })
    }

    pub(super) fn wrap(shared: &Shared, handle: u64) -> Self {
        let raw = std::ptr::with_exposed_provenance_mut(handle as usize);
        let mut shared = shared.clone();
        shared.batch = shared.batch.filter(|_| !SPECIAL_HANDLES.contains(&handle));
        Self { shared, raw, owned: false }
    }

    /// The batch copy, if it can take this batch: it is not made for memory that is not page-locked.
    fn together(&self, batch: &[RawCopy]) -> Option<BatchCopy> {
        let locked = || self.shared.host_counters.bytes(HostMemory::Pageable) == 0;
        self.shared.batch.filter(|_| batch.len() > 1 && locked())
    }

    pub(super) fn raw(&self) -> CUstream {
        self.raw
    }
}

impl Stream for CudaStream {
    unsafe fn copy(&self, batch: &[RawCopy]) -> Result<()> {
        let _entered = self.shared.context.enter()?;
        if let Some(together) = self.together(batch) {
            // SAFETY: the caller's promise is ours.
            return unsafe { together.send(batch, self.raw) };
        }
        for copy in batch.iter().filter(|copy| copy.bytes > 0) {
            // SAFETY: the caller's promise is ours.
            unsafe { send_one(copy, self.raw) }?;
        }
        Ok(())
    }

    fn record(&self) -> Result<EventRef> {
        let base = self.shared.clock.base()?;
        Ok(Arc::new(CudaEvent { event: RawEvent::record(&self.shared.context, self.raw)?, base }))
    }

    fn wait(&self, event: &EventRef) -> Result<()> {
        let Some(event) = event.as_any().downcast_ref::<CudaEvent>() else {
            return Err(Error::ForeignEvent { backend: "cuda" });
        };
        let _entered = self.shared.context.enter()?;
        // SAFETY: stream and event live.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.raw, event.event.raw, 0) })
    }

    fn synchronize(&self) -> Result<()> {
        let _entered = self.shared.context.enter()?;
        // SAFETY: the stream lives.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.raw) })
    }

    fn id(&self) -> u64 {
        self.raw.addr() as u64
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        if self.owned {
            destroy_stream(&self.shared.context, self.raw);
        }
    }
}

/// Enqueues one copy.
///
/// # Safety
/// As [`Stream::copy`]; the context is current.
unsafe fn send_one(copy: &RawCopy, stream: CUstream) -> Result<()> {
    match copy.direction {
        Direction::Offload => {
            let to = std::ptr::with_exposed_provenance_mut(copy.dst_addr as usize);
            // SAFETY: the caller's promise.
            let sent = unsafe { sys::cuMemcpyDtoHAsync_v2(to, copy.src_addr, copy.bytes, stream) };
            check("cuMemcpyDtoHAsync", sent)
        }
        Direction::Onboard => {
            let from = std::ptr::with_exposed_provenance(copy.src_addr as usize);
            // SAFETY: the caller's promise.
            let sent = unsafe { sys::cuMemcpyHtoDAsync_v2(copy.dst_addr, from, copy.bytes, stream) };
            check("cuMemcpyHtoDAsync", sent)
        }
    }
}

/// A point in a stream.
struct CudaEvent {
    event: RawEvent,
    base: Arc<Base>,
}

impl Event for CudaEvent {
    fn is_done(&self) -> Result<bool> {
        self.event.is_done()
    }

    fn synchronize(&self) -> Result<()> {
        self.event.synchronize()
    }

    fn time_us(&self) -> Result<f64> {
        self.base.time_us(&self.event)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
