//! The CUDA device: the only user of the driver's API.
//!
//! The driver's library is looked up when the first device is opened, so building needs no CUDA
//! toolkit and importing needs no GPU. The context is the device's primary one, which PyTorch uses
//! too; PyTorch's streams are wrapped and never owned; streams of our own do not wait for the
//! default stream. Host queues are the worker threads of [`crate::sim`]: no callback of the driver
//! runs our code.
//!
//! Ownership: a device, its streams, events, allocations and modules each hold the context, which is
//! released when the last of them is gone. What this module does not do: decide what moves where.

mod batch;
mod clock;
mod driver;
mod host;
mod module;
mod stream;

use std::{any::Any, sync::Arc};

use cudarc::driver::sys;

use self::{
    batch::BatchCopy,
    clock::Clock,
    driver::{Context, check},
};
pub use self::{
    driver::{device_count, version as driver_version},
    host::{HostCounters, HostMemory, huge_pages_possible},
    module::{Arg, Kernel, Launch, Module},
    stream::CudaStream,
};
use crate::{
    Device, DeviceInfo, DeviceRange, Error, Gate, HostSlab, QueueRef, Result, StreamRef, sim::SimDevice,
};

/// How a CUDA device is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaConfig {
    /// Which device, as the driver numbers those that the process may see.
    pub ordinal: usize,
    /// How host memory is page-locked; another kind is taken where this one is refused.
    pub host_memory: HostMemory,
    /// Whether several copies go to the driver in one call, where it has that.
    pub batch_copies: bool,
}

impl Default for CudaConfig {
    fn default() -> Self {
        Self { ordinal: 0, host_memory: HostMemory::best(), batch_copies: true }
    }
}

/// See the module.
pub struct CudaDevice {
    info: DeviceInfo,
    config: CudaConfig,
    context: Arc<Context>,
    shared: stream::Shared,
    /// The host's side: worker threads.
    workers: Arc<SimDevice>,
}

impl CudaDevice {
    /// Opens a device.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where there is no driver, no device or not that many.
    pub fn open(config: CudaConfig) -> Result<Arc<Self>> {
        let context = Arc::new(Context::retain(config.ordinal)?);
        let clock = Arc::new(Clock::start(&context)?);
        let mut shared = stream::Shared {
            context: Arc::clone(&context),
            clock,
            batch: None,
            host_counters: Arc::default(),
        };
        if config.batch_copies {
            shared.batch = BatchCopy::probe(&context, CudaStream::new(&shared)?.raw());
        }
        let info = DeviceInfo {
            backend: "cuda",
            name: context.name()?,
            total_bytes: Some(context.memory_bytes()?.1 as u64),
            pinned: config.host_memory != HostMemory::Pageable,
        };
        Ok(Arc::new(Self { info, config, context, shared, workers: SimDevice::threads() }))
    }

    /// Bytes of device memory that the driver says are free now.
    pub fn free_bytes(&self) -> Result<usize> {
        Ok(self.context.memory_bytes()?.0)
    }

    /// Compute capability, as 10 * major + minor: 90 is an H200's.
    pub fn compute_capability(&self) -> Result<u32> {
        self.context.compute_capability()
    }

    /// Number of multiprocessors.
    pub fn multiprocessors(&self) -> Result<u32> {
        self.context.multiprocessors()
    }

    /// Whether several copies go to the driver in one call.
    #[must_use]
    pub fn has_batch_copies(&self) -> bool {
        self.shared.batch.is_some()
    }

    /// Host memory held now, by kind.
    #[must_use]
    pub fn host_counters(&self) -> &HostCounters {
        &self.shared.host_counters
    }

    /// Reads device memory of ours, blocking. The caller orders it behind whatever writes there.
    pub fn read(&self, range: &DeviceRange) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; range.bytes()];
        if bytes.is_empty() {
            return Ok(bytes);
        }
        let _entered = self.context.enter()?;
        // SAFETY: the lease keeps the range allocated; the vector has as many bytes.
        let copied = unsafe { sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), range.addr(), range.bytes()) };
        check("cuMemcpyDtoH", copied)?;
        Ok(bytes)
    }

    /// Writes device memory of ours, blocking; as [`CudaDevice::read`].
    pub fn write(&self, range: &DeviceRange, bytes: &[u8]) -> Result<()> {
        if range.bytes() != bytes.len() {
            return Err(Error::SizeMismatch { src_bytes: bytes.len(), dst_bytes: range.bytes() });
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let _entered = self.context.enter()?;
        // SAFETY: the lease keeps the range allocated; it has as many bytes as the slice. Pageable
        // memory is staged by the driver before the call returns, but its last step may not be
        // done: the synchronisation below waits for it.
        let copied = unsafe { sys::cuMemcpyHtoD_v2(range.addr(), bytes.as_ptr().cast(), bytes.len()) };
        check("cuMemcpyHtoD", copied)?;
        // SAFETY: handle 0 is the default stream, which carried the copy.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(std::ptr::null_mut()) })
    }
}

impl Device for CudaDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn new_stream(&self, _label: &'static str) -> Result<StreamRef> {
        Ok(Arc::new(CudaStream::new(&self.shared)?))
    }

    fn wrap_stream(&self, handle: u64) -> Result<StreamRef> {
        Ok(Arc::new(CudaStream::wrap(&self.shared, handle)))
    }

    fn alloc_device(&self, bytes: usize) -> Result<DeviceRange> {
        let _entered = self.context.enter()?;
        let mut addr = 0;
        // SAFETY: the context is current; freed once, by the block.
        let asked = unsafe { sys::cuMemAlloc_v2(&raw mut addr, bytes.max(1)) };
        let never = asked != sys::CUresult::CUDA_SUCCESS && Some(bytes as u64) > self.info.total_bytes;
        if never || asked == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let available_bytes = self.context.memory_bytes().map_or(0, |(free, _)| free);
            return Err(Error::OutOfMemory { tier: "device", requested_bytes: bytes, available_bytes });
        }
        check("cuMemAlloc", asked)?;
        let block = Block { context: Arc::clone(&self.context), addr };
        // SAFETY: the block holds `bytes` at `addr` until it is dropped.
        Ok(unsafe { DeviceRange::from_raw(addr, bytes, Arc::new(block)) })
    }

    fn alloc_host(&self, bytes: usize) -> Result<HostSlab> {
        host::alloc(&self.context, &self.shared.host_counters, self.config.host_memory, bytes)
    }

    fn new_queue(&self, label: &'static str) -> Result<QueueRef> {
        self.workers.new_queue(label)
    }

    fn now_us(&self) -> f64 {
        self.shared.clock.now_us()
    }

    fn block_on(&self, gate: &Gate) -> Result<()> {
        self.workers.block_on(gate)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// An allocation of device memory.
struct Block {
    context: Arc<Context>,
    addr: u64,
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: allocated once; the last lease is gone, so no copy of ours runs on it.
            let _ = unsafe { sys::cuMemFree_v2(self.addr) };
        }
    }
}
