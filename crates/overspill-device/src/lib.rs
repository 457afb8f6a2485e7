//! Devices, streams, events and memory.
//!
//! The bottom layer: everything above it moves bytes through the four traits here and never learns
//! which backend runs. Two backends implement them: [`sim`], real bytes on the host with seeded or
//! threaded streams, and [`cuda`], the only user of the driver API.
//!
//! Ownership: a copy in flight owns leases on its source and its destination until its event has
//! passed ([`InFlight`]); an extent of host memory remembers the event of the copy that fills it
//! and makes every reader wait for it ([`HostExtent`], [`HostTape`] where it only grows). What this crate does not do: budgets,
//! placement, policy, files.

pub mod cuda;
mod error;
pub mod facts;
mod gate;
mod inflight;
pub mod kernels;
pub mod measure;
mod memory;
pub mod nvrtc;
mod process;
pub mod sim;
mod tape;
mod traits;

pub use error::{Error, Result};
pub use gate::Gate;
pub use inflight::{InFlight, offload, onboard};
pub use memory::{DeviceRange, HostExtent, HostSlab, Keep};
pub use process::{ProcessMemory, process_memory, resident_peak_bytes, return_freed_tensors};
pub use tape::{HostTape, append, play};
pub use traits::{
    Device, DeviceInfo, DeviceRef, Direction, Event, EventRef, HostQueue, Job, QueueRef, RawCopy, Stream,
    StreamRef,
};
