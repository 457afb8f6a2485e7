//! The simulated device: real bytes on the host, streams as ordered queues.
//!
//! Two schedules run the same queues. *Threads* ([`SimDevice::threads`]): one worker per queue; this
//! is the device of a machine without a GPU, whose device memory is the process's RAM. *Seeded*
//! ([`SimDevice::seeded`]): no threads; every call may run some operations of any queue, chosen by
//! a random generator, and a wait runs them until it is over. The second finds orderings that the
//! first shows once a year, and finds them again from the seed.
//!
//! On a seeded device freed memory is poisoned and kept mapped, so that a use after free is wrong
//! bytes in a test and not undefined behaviour; its clock counts operations. What it does not do:
//! speed. A copy takes as long as it takes.

mod core;
mod memory;
mod queue;

use std::{any::Any, sync::Arc};

pub use self::queue::SimQueue;
use self::{core::Core, queue::HostStream};
use crate::{Device, DeviceInfo, DeviceRange, Error, Gate, HostSlab, QueueRef, Result, StreamRef};

/// A bug to plant in a seeded device, so that tests can show that they would find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Planted {
    /// None: the device is right.
    #[default]
    Nothing,
    /// Events claim to have passed at once: leases are given up, and extents reused, under copies.
    EventsPassEarly,
    /// No stream waits for the events it is told to wait for.
    StreamWaitsIgnored,
    /// One stream does not wait for another's events; both by label, the caller's being "caller".
    WaitIgnored {
        /// The stream that is told to wait.
        by: &'static str,
        /// The stream whose events it passes over.
        on: &'static str,
    },
}

/// How a seeded device behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SimConfig {
    /// Seed of the schedule; failures name it.
    pub seed: u64,
    /// A bug to plant.
    pub planted: Planted,
    /// The allocation (counted from 0, device and host alike) that fails, if any.
    pub fail_allocation: Option<u64>,
    /// One allocation in so many fails, by chance; none if absent.
    pub fail_one_allocation_in: Option<u64>,
}

/// See the module.
pub struct SimDevice {
    info: DeviceInfo,
    core: Arc<Core>,
}

impl SimDevice {
    /// A device whose queues run on threads of their own.
    #[must_use]
    pub fn threads() -> Arc<Self> {
        Self::with_core(Core::threads(), "RAM of this process".to_owned())
    }

    /// A device whose queues are interleaved by a seeded generator.
    #[must_use]
    pub fn seeded(config: SimConfig) -> Arc<Self> {
        Self::with_core(Core::seeded(config), format!("simulated, seed {}", config.seed))
    }

    fn with_core(core: Core, name: String) -> Arc<Self> {
        let info = DeviceInfo { backend: "sim", name, total_bytes: None, pinned: false };
        Arc::new(Self { info, core: Arc::new(core) })
    }

    /// A queue that takes copies, waits and jobs alike: a stream on which tests can launch work.
    pub fn new_sim_queue(&self, label: &'static str) -> Result<Arc<SimQueue>> {
        SimQueue::start(&self.core, label)
    }

    /// Reads device memory of ours. For tests; the caller orders it behind whatever writes there.
    #[must_use]
    pub fn read(&self, range: &DeviceRange) -> Vec<u8> {
        memory::read(range)
    }

    /// Writes device memory of ours. For tests, as [`SimDevice::read`].
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn write(&self, range: &DeviceRange, bytes: &[u8]) {
        memory::write(range, bytes);
    }

    fn allocation_may_fail(&self, tier: &'static str, requested_bytes: usize) -> Result<()> {
        if self.core.next_allocation_fails() {
            return Err(Error::OutOfMemory { tier, requested_bytes, available_bytes: 0 });
        }
        Ok(())
    }
}

impl Device for SimDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn new_stream(&self, label: &'static str) -> Result<StreamRef> {
        Ok(SimQueue::start(&self.core, label)?)
    }

    fn wrap_stream(&self, _handle: u64) -> Result<StreamRef> {
        Ok(Arc::new(HostStream::new(Arc::clone(&self.core))))
    }

    fn alloc_device(&self, bytes: usize) -> Result<DeviceRange> {
        self.core.advance();
        self.allocation_may_fail("device", bytes)?;
        memory::alloc_device(bytes, self.core.is_seeded())
    }

    fn alloc_host(&self, bytes: usize) -> Result<HostSlab> {
        self.core.advance();
        self.allocation_may_fail("host", bytes)?;
        memory::alloc_host(bytes, self.core.is_seeded())
    }

    fn new_queue(&self, label: &'static str) -> Result<QueueRef> {
        Ok(SimQueue::start(&self.core, label)?)
    }

    fn now_us(&self) -> f64 {
        self.core.now_us()
    }

    fn block_on(&self, gate: &Gate) -> Result<()> {
        if self.core.is_seeded() {
            return self.core.run_until(|| gate.is_open());
        }
        gate.sleep();
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
