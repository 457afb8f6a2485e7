//! The four traits a backend implements.

use std::{any::Any, sync::Arc};

use crate::{DeviceRange, Gate, HostSlab, Result};

/// A device, shared.
pub type DeviceRef = Arc<dyn Device>;
/// A stream, shared.
pub type StreamRef = Arc<dyn Stream>;
/// An event, shared.
pub type EventRef = Arc<dyn Event>;
/// A queue of host jobs, shared.
pub type QueueRef = Arc<dyn HostQueue>;
/// Work for a [`HostQueue`]. It must not call Python.
pub type Job = Box<dyn FnOnce() + Send>;

/// What a device says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// "sim" or "cuda".
    pub backend: &'static str,
    /// Product name, or a description of the simulation.
    pub name: String,
    /// Bytes of device memory; `None` where the device tier is the process's own RAM.
    pub total_bytes: Option<u64>,
    /// Whether host slabs are page-locked.
    pub pinned: bool,
}

/// A place where tensors are computed on, and the memory beside it.
pub trait Device: Send + Sync {
    /// What this device is.
    fn info(&self) -> &DeviceInfo;

    /// A new stream of our own, ordered, not synchronised with any other.
    fn new_stream(&self, label: &'static str) -> Result<StreamRef>;

    /// Wraps a stream that someone else owns (PyTorch's), never destroying it.
    ///
    /// `handle` is the driver's stream handle as an integer; 0 is the default stream. On the
    /// simulated device every handle names the calling thread itself: its work is done when the
    /// call that does it returns, so a wait on it blocks and an event on it has passed at once.
    fn wrap_stream(&self, handle: u64) -> Result<StreamRef>;

    /// Device memory of our own, freed when the last range of it is dropped.
    fn alloc_device(&self, bytes: usize) -> Result<DeviceRange>;

    /// Host memory that the copy engines reach directly (page-locked where the device needs it).
    fn alloc_host(&self, bytes: usize) -> Result<HostSlab>;

    /// A queue whose jobs run in order, off the caller's thread.
    fn new_queue(&self, label: &'static str) -> Result<QueueRef>;

    /// Host time on the clock of [`Event::time_us`], in microseconds since the device was opened.
    fn now_us(&self) -> f64;

    /// Blocks the host until `gate` opens. An error where it never will.
    fn block_on(&self, gate: &Gate) -> Result<()>;

    /// The backend's own type, for what only it can do.
    fn as_any(&self) -> &dyn Any;
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Away from the device.
    Offload,
    /// Toward the device.
    Onboard,
}

/// One copy, as addresses. Made by [`crate::offload`] and [`crate::onboard`], which hold the leases.
#[derive(Debug, Clone, Copy)]
pub struct RawCopy {
    /// Which of the two addresses is the device's.
    pub direction: Direction,
    /// Address copied from.
    pub src_addr: u64,
    /// Address copied to.
    pub dst_addr: u64,
    /// Bytes copied.
    pub bytes: usize,
}

/// An ordered queue of device work.
pub trait Stream: Send + Sync {
    /// Enqueues copies, in any order among themselves.
    ///
    /// # Safety
    /// Both ranges of every copy stay mapped, and neither is written by anyone else nor the
    /// destination read, until an event recorded after this call has passed.
    unsafe fn copy(&self, batch: &[RawCopy]) -> Result<()>;

    /// An event that passes when everything enqueued so far is done.
    fn record(&self) -> Result<EventRef>;

    /// Makes everything enqueued from now on wait for `event`, which must be of the same device.
    fn wait(&self, event: &EventRef) -> Result<()>;

    /// Blocks the host until everything enqueued so far is done.
    fn synchronize(&self) -> Result<()>;

    /// The same for every handle on one stream, another for any other stream of the device that is alive.
    fn id(&self) -> u64;

    /// The backend's own type, for its kernels.
    fn as_any(&self) -> &dyn Any;
}

/// A point in a stream.
pub trait Event: Send + Sync {
    /// Whether the stream has come past it; never blocks.
    fn is_done(&self) -> Result<bool>;

    /// Blocks the host until it has.
    fn synchronize(&self) -> Result<()>;

    /// Device time of a passed event in microseconds since the device was opened.
    fn time_us(&self) -> Result<f64>;

    /// The backend's own type, for its streams.
    fn as_any(&self) -> &dyn Any;
}

/// Host jobs in order.
pub trait HostQueue: Send + Sync {
    /// Appends a job. Jobs of one queue run one after the other; they may push more jobs and
    /// enqueue copies, but must not wait for a gate that a later job of the same queue opens.
    fn push(&self, job: Job);
}
