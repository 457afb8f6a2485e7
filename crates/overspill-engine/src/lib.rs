#![forbid(unsafe_code)]
//! Tiers and transfers: bytes leave the device for pinned RAM and disk, and come back.
//!
//! An [`Engine`] owns a pool of host memory ([`HostPool`]), optionally a spill file ([`SpillFile`]),
//! one stream per direction and one queue per disk direction. [`Engine::offload`] turns a lease on
//! device bytes into a [`Slot`]; [`Engine::onboard`] brings a slot back into a device range. Which
//! tensors go, and when they return, is decided above (STORM, Djinn); when the host pool is full
//! the engine spills the oldest slots to disk by itself.
//!
//! Order of every cross-stream dependency: `docs/stream-ordering.md`.

mod config;
mod disk;
mod engine;
mod error;
mod extents;
mod pool;
mod slot;
mod stats;
pub mod storage;
mod ticket;
mod trace;

pub use config::{EngineConfig, SpillConfig};
pub use disk::{DiskExtent, SpillFile};
pub use engine::{Engine, Onboarding};
pub use error::{Error, Result, Tier};
pub use extents::Extents;
pub use pool::{HostPool, PoolCounters};
pub use slot::Slot;
pub use stats::{Cause, Flow, Stats};
pub use trace::{Trace, TraceEvent};
