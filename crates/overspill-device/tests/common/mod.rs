//! The conformance suite: what every backend has to do, written once.
//!
//! A backend is a [`Rig`]; [`CASES`] are run on it and panic where it is wrong, and [`EDGES`] show
//! what each cross-stream edge is for: with it the bytes are right, without it they are not.

#![allow(dead_code, unused_imports, reason = "each test binary uses its part of the suite")]

mod cases;
mod cuda_rig;
mod edges;
mod sim_rig;

use overspill_device::{DeviceRange, DeviceRef, HostExtent, HostSlab, InFlight, StreamRef};

pub use cases::CASES;
pub use cuda_rig::CudaRig;
pub use edges::EDGES;
pub use sim_rig::SimRig;

/// A backend under test: a device, and work that its streams can be given.
pub trait Rig {
    fn device(&self) -> &DeviceRef;
    /// A stream on which work can be launched.
    fn stream(&self) -> StreamRef;
    /// Enqueues `bytes[i] = value`.
    fn fill(&self, stream: &StreamRef, range: &DeviceRange, value: u8);
    /// Enqueues `bytes[i] = bytes[i] * 31 + value`, which does not commute.
    fn fold(&self, stream: &StreamRef, range: &DeviceRange, value: u8);
    /// Enqueues a copy between two ranges of the device.
    fn copy(&self, stream: &StreamRef, to: &DeviceRange, from: &DeviceRange);
    /// Makes what is enqueued next on `stream` late.
    fn linger(&self, stream: &StreamRef);
    /// Writes device memory from the host, at once.
    fn write(&self, range: &DeviceRange, bytes: &[u8]);
    /// Reads device memory that nothing writes any more.
    fn read(&self, range: &DeviceRange) -> Vec<u8>;
    /// What random content and choices follow from.
    fn seed(&self) -> u64;

    fn device_memory(&self, bytes: usize) -> DeviceRange {
        self.device().alloc_device(bytes).expect("device memory")
    }

    fn slab(&self, bytes: usize) -> HostSlab {
        self.device().alloc_host(bytes).expect("host memory")
    }

    fn extent(&self, bytes: usize) -> HostExtent {
        self.slab(bytes).claim(0..bytes).expect("a fresh slab")
    }

    fn content(&self, salt: u64, bytes: usize) -> Vec<u8> {
        let mut rng = fastrand::Rng::with_seed(self.seed().wrapping_mul(1_000_003).wrapping_add(salt));
        (0..bytes).map(|_| rng.u8(..)).collect()
    }
}

/// Gives up the leases on device memory in the order of `stream`, as PyTorch's allocator needs them.
pub fn release_on(stream: &StreamRef, in_flight: &mut InFlight) {
    stream.wait(in_flight.event()).expect("wait");
    drop(in_flight.take_device_leases());
}

/// The host's twin of [`Rig::fold`].
pub fn folded(bytes: &[u8], value: u8) -> Vec<u8> {
    bytes.iter().map(|byte| byte.wrapping_mul(31).wrapping_add(value)).collect()
}

/// Runs `case` on a seeded schedule; a panic in it is printed with its seed.
pub fn with_seed(seed: u64, case: impl FnOnce()) {
    struct Name(u64);
    impl Drop for Name {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("failed on the schedule of seed {}", self.0);
            }
        }
    }
    let name = Name(seed);
    case();
    drop(name);
}
