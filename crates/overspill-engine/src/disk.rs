//! The disk tier: extents in one file, each with a checksum.

use std::{
    ops::Range,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use twox_hash::XxHash3_64;

use crate::{Error, Extents, Result, SpillConfig, Tier, pool::GRANULE_BYTES, storage};

/// A spill file. Clones share it.
#[derive(Clone)]
pub struct SpillFile(Arc<Inner>);

struct Inner {
    storage: Box<dyn storage::Storage>,
    limit_bytes: u64,
    extents: Mutex<Extents>,
}

/// Bytes on disk, freed when dropped.
pub struct DiskExtent {
    file: SpillFile,
    run: Option<Range<u64>>,
    bytes: usize,
    checksum: u64,
}

impl SpillFile {
    /// Creates the file; an error if the folder cannot be written or has less room than the limit.
    pub fn create(config: &SpillConfig) -> Result<Self> {
        let refuse = |reason: String| Error::SpillDir { path: PathBuf::from(&config.dir), reason };
        let stat = rustix::fs::statvfs(&config.dir).map_err(|errno| refuse(errno.to_string()))?;
        let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free_bytes < config.limit_bytes {
            return Err(Error::Full {
                tier: Tier::Disk,
                requested_bytes: config.limit_bytes,
                available_bytes: free_bytes,
                budget_bytes: config.limit_bytes,
                advice: "free some disk, lower the spill limit, or choose another --spill-dir",
            });
        }
        let file = storage::DirectFile::create_in(&config.dir).map_err(|error| refuse(error.to_string()))?;
        Ok(Self::on(Box::new(file), config.limit_bytes))
    }

    /// On a storage of the caller's, for tests with faults.
    #[must_use]
    pub fn on(storage: Box<dyn storage::Storage>, limit_bytes: u64) -> Self {
        let extents = Mutex::new(Extents::new(limit_bytes, GRANULE_BYTES));
        Self(Arc::new(Inner { storage, limit_bytes, extents }))
    }

    /// Bytes in use.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.extents().used_bytes()
    }

    fn extents(&self) -> std::sync::MutexGuard<'_, Extents> {
        self.0.extents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes `bytes`; on an error nothing is kept and the caller still has them.
    pub fn write(&self, bytes: &[u8]) -> Result<DiskExtent> {
        let run = {
            let mut extents = self.extents();
            extents.alloc(bytes.len() as u64).ok_or_else(|| Error::Full {
                tier: Tier::Disk,
                requested_bytes: bytes.len() as u64,
                available_bytes: extents.free_bytes(),
                budget_bytes: self.0.limit_bytes,
                advice: "raise the spill limit or the host budget",
            })?
        };
        let offset_bytes = run.start;
        let extent = DiskExtent {
            file: self.clone(),
            run: Some(run),
            bytes: bytes.len(),
            checksum: XxHash3_64::oneshot(bytes),
        };
        self.0.storage.write_at(offset_bytes, bytes).map_err(|error| Error::Io {
            operation: "write",
            offset_bytes,
            bytes: bytes.len(),
            reason: error.to_string(),
        })?;
        Ok(extent)
    }
}

impl DiskExtent {
    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Reads back what was written, or says that it is not that.
    pub fn read(&self, into: &mut [u8]) -> Result<()> {
        let offset_bytes = self.run.as_ref().map_or(0, |run| run.start);
        self.file.0.storage.read_at(offset_bytes, into).map_err(|error| Error::Io {
            operation: "read",
            offset_bytes,
            bytes: into.len(),
            reason: error.to_string(),
        })?;
        let found = XxHash3_64::oneshot(into);
        if found == self.checksum {
            Ok(())
        } else {
            Err(Error::Checksum { offset_bytes, found, expected: self.checksum })
        }
    }
}

impl Drop for DiskExtent {
    fn drop(&mut self) {
        if let Some(run) = self.run.take() {
            self.file.extents().free(run);
        }
    }
}
