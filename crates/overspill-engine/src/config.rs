//! How large the tiers are.

use std::path::PathBuf;

/// Sizes of an engine's tiers. Nothing here grows beyond what is stated.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Most bytes of host memory to hold, slabs included.
    pub host_budget_bytes: usize,
    /// Size of one slab; the pool grows a slab at a time.
    pub slab_bytes: usize,
    /// Transfers are cut into pieces of at most this size, so that a stage can start on the first
    /// while the second still travels, and a tensor may be larger than the pool.
    pub segment_bytes: usize,
    /// The disk tier, if there is one.
    pub spill: Option<SpillConfig>,
    /// Whether to keep a timeline of every transfer.
    pub trace: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            host_budget_bytes: 64 << 20,
            slab_bytes: 64 << 20,
            segment_bytes: 16 << 20,
            spill: None,
            trace: false,
        }
    }
}

/// The disk tier.
#[derive(Debug, Clone)]
pub struct SpillConfig {
    /// Folder of the spill file. The file has no name in it: it is gone when the process is.
    pub dir: PathBuf,
    /// Most bytes the file may take.
    pub limit_bytes: u64,
    /// Write to disk as soon as bytes are in host memory, rather than when it is full. Right where
    /// the host tier is only a staging area (no GPU).
    pub eager: bool,
}
