//! Checking a chain: every record, every byte of every object and, if asked, every step decoded.

use std::collections::HashSet;

use overspill_tpde::{Patch, Progress, verify};

use crate::chain::{Chain, hash_file};
use crate::record::Object;
use crate::{Error, Result};

/// What was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Verified {
    /// Steps.
    pub steps: u64,
    /// Objects, each read once.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Whether every step was decoded as well.
    pub decoded: bool,
}

impl Chain {
    /// Reads every record and object and compares hashes; with `decode`, decodes every step and compares states.
    ///
    /// # Errors
    /// The first damage found, with its file.
    pub fn verify(&self, decode: bool, progress: Progress<'_>) -> Result<Verified> {
        let mut found = Verified { decoded: decode, ..Verified::default() };
        let mut seen = HashSet::new();
        let log = self.log()?;
        for record in &log {
            for object in record.parts.values().flat_map(|part| part.objects()) {
                if seen.insert(object.clone()) {
                    self.verify_object(object)?;
                    found.objects += 1;
                    found.bytes += object.bytes;
                }
            }
            found.steps += 1;
            progress(found.steps, log.len() as u64);
        }
        if decode {
            for part in log.iter().flat_map(|record| record.parts.values()) {
                let patch = Patch::open(&self.files.path(&part.patch.name()))?;
                if patch.final_id().to_string() != part.state {
                    let cause = format!("makes state {}, the record says {}", patch.final_id(), part.state);
                    return Err(Error::damaged(patch.path(), cause));
                }
                self.with_base(part, &self.files.path("cache/verify"), |base| {
                    verify(&patch, Some(base), &self.options, &|_, _| ())?;
                    Ok(())
                })?;
            }
        }
        Ok(found)
    }

    fn verify_object(&self, object: &Object) -> Result<()> {
        let path = self.files.path(&object.name());
        let (hash, bytes) = hash_file(&path)?;
        if hash == object.hash && bytes == object.bytes {
            return Ok(());
        }
        Err(Error::damaged(&path, format!("{bytes} bytes with hash {hash}, {} are recorded", object.bytes)))
    }
}
