//! What can go wrong in the engine, with the facts.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Where bytes can live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// The device's own memory.
    Device,
    /// Host memory that the copy engines reach.
    Host,
    /// The spill file.
    Disk,
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Device => "device",
            Self::Host => "host",
            Self::Disk => "disk",
        })
    }
}

/// An error of a tier or a transfer. The bytes it speaks of are where they were before the call.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A tier's budget is used up.
    #[error(
        "{tier} tier is full: {requested_bytes} bytes asked for, {available_bytes} of {budget_bytes} bytes \
         free; {advice}"
    )]
    Full {
        /// The tier.
        tier: Tier,
        /// What was asked for.
        requested_bytes: u64,
        /// What is free, in one or more pieces.
        available_bytes: u64,
        /// The tier's limit.
        budget_bytes: u64,
        /// What to do about it.
        advice: &'static str,
    },
    /// The spill folder cannot be used.
    #[error("cannot use spill folder {}: {reason}; choose another with --spill-dir", path.display())]
    SpillDir {
        /// The folder.
        path: PathBuf,
        /// The operating system's words.
        reason: String,
    },
    /// A read or a write of the spill file failed.
    #[error("{operation} of {bytes} bytes at offset {offset_bytes} of the spill file failed: {reason}")]
    Io {
        /// "read" or "write".
        operation: &'static str,
        /// Where in the file.
        offset_bytes: u64,
        /// How many bytes.
        bytes: usize,
        /// The operating system's words.
        reason: String,
    },
    /// What came back from disk is not what was written.
    #[error(
        "spill file is damaged at offset {offset_bytes}: checksum {found:#018x}, expected {expected:#018x}"
    )]
    Checksum {
        /// Where in the file.
        offset_bytes: u64,
        /// Checksum of what was read.
        found: u64,
        /// Checksum of what was written.
        expected: u64,
    },
    /// Destination and slot differ in size.
    #[error("slot holds {slot_bytes} bytes, the destination {destination_bytes} bytes")]
    SizeMismatch {
        /// Bytes in the slot.
        slot_bytes: usize,
        /// Bytes of the destination.
        destination_bytes: usize,
    },
    /// The device refused.
    #[error(transparent)]
    Device(#[from] overspill_device::Error),
}
