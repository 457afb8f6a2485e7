//! One writer at a time, by the operating system's lock: it ends with the process that held it, however that ended.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};

use crate::{Error, Result};

/// Held while a chain is written to.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of the chain in `folder`.
    ///
    /// # Errors
    /// [`Error::Locked`] with who holds it; a folder that cannot be written.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join("lock");
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).map_err(Error::io(&path, "open"))?;
        if let Err(error) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(Error::io(&path, "lock")(error.into()));
            }
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            let holder = if holder.trim().is_empty() { "another process" } else { holder.trim() };
            return Err(Error::Locked { path: folder.to_owned(), holder: holder.to_owned() });
        }
        // Only for people who meet the lock; nothing is decided by it.
        let note = format!("process {} since {} s after 1970\n", std::process::id(), now_s());
        file.rewind()
            .and_then(|()| file.set_len(0))
            .and_then(|()| file.write_all(note.as_bytes()))
            .map_err(Error::io(&path, "write"))?;
        Ok(Lock { _file: file })
    }
}

/// Seconds since 1970.
pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
