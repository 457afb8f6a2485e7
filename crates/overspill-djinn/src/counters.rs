//! What a pool has done so far.

use serde::Serialize;

/// Counts and bytes since the pool was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Bytes copied from the device to host copies.
    pub offloaded_bytes: u64,
    /// Of these, copied because a session had to leave: not written through before.
    pub offloaded_at_eviction_bytes: u64,
    /// Bytes copied back.
    pub onboarded_bytes: u64,
    /// Bytes written to disk.
    pub spilled_bytes: u64,
    /// Bytes read from disk.
    pub unspilled_bytes: u64,
    /// Sessions that left the device.
    pub evictions: u64,
    /// Sessions that came back.
    pub restores: u64,
    /// Host copies of sessions on the device that were given up for want of host memory.
    pub host_copies_dropped: u64,
}
