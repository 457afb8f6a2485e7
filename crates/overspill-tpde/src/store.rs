//! Where bytes lie: a file, read by ranges, or memory, borrowed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::buffer::Buffer;
use crate::{Error, Result};

/// A run of bytes that can be read at any offset from many threads.
pub(crate) struct Store<'a> {
    path: PathBuf,
    bytes: Bytes<'a>,
}

enum Bytes<'a> {
    File { file: File, len_bytes: u64 },
    Memory(&'a [u8]),
    Owned(Owned),
}

/// Bytes in memory, and whoever keeps them there.
pub(crate) type Owned = Box<dyn AsRef<[u8]> + Send + Sync>;

impl std::fmt::Debug for Store<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({}, {} bytes)", self.path.display(), self.len_bytes())
    }
}

impl<'a> Store<'a> {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        let meta = file.metadata().map_err(Error::io(path, "read the size"))?;
        if !meta.is_file() {
            return Err(Error::format(path, "not a file"));
        }
        Ok(Store { path: path.to_owned(), bytes: Bytes::File { file, len_bytes: meta.len() } })
    }

    pub fn memory(label: &Path, bytes: &'a [u8]) -> Self {
        Store { path: label.to_owned(), bytes: Bytes::Memory(bytes) }
    }

    pub fn owned(label: &Path, bytes: Owned) -> Self {
        Store { path: label.to_owned(), bytes: Bytes::Owned(bytes) }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the bytes have to be read to be seen.
    pub fn is_file(&self) -> bool {
        matches!(self.bytes, Bytes::File { .. })
    }

    pub fn len_bytes(&self) -> u64 {
        match &self.bytes {
            Bytes::File { len_bytes, .. } => *len_bytes,
            Bytes::Memory(bytes) => bytes.len() as u64,
            Bytes::Owned(bytes) => bytes.as_ref().as_ref().len() as u64,
        }
    }

    /// `bytes` bytes from `offset_bytes`: borrowed from memory, or read into `scratch`.
    pub fn read<'b>(&'b self, offset_bytes: u64, bytes: usize, scratch: &'b mut Buffer) -> Result<&'b [u8]> {
        match self.borrow(offset_bytes, bytes)? {
            Some(found) => Ok(found),
            None => {
                let room = scratch.room(bytes)?;
                self.read_into(offset_bytes, room)?;
                Ok(room)
            }
        }
    }

    /// `bytes` bytes from `offset_bytes` where they lie in memory, `None` where they lie in a file.
    pub fn borrow(&self, offset_bytes: u64, bytes: usize) -> Result<Option<&[u8]>> {
        let inside = offset_bytes.checked_add(bytes as u64).is_some_and(|end| end <= self.len_bytes());
        if !inside {
            return Err(Error::at(&self.path, offset_bytes, format!("ends before {bytes} bytes more")));
        }
        let start = offset_bytes as usize;
        Ok(match &self.bytes {
            Bytes::Memory(all) => Some(&all[start..start + bytes]),
            Bytes::Owned(all) => Some(&all.as_ref().as_ref()[start..start + bytes]),
            Bytes::File { .. } => None,
        })
    }

    /// Fills `room` with the bytes from `offset_bytes` on.
    pub fn read_into(&self, offset_bytes: u64, room: &mut [u8]) -> Result<()> {
        if let Some(found) = self.borrow(offset_bytes, room.len())? {
            room.copy_from_slice(found);
        } else if let Bytes::File { file, .. } = &self.bytes {
            file.read_exact_at(room, offset_bytes).map_err(Error::io(&self.path, "read"))?;
        }
        Ok(())
    }

    /// Like [`Store::read`], owned.
    pub fn read_vec(&self, offset_bytes: u64, bytes: usize) -> Result<Vec<u8>> {
        // Checked before memory is taken for it.
        if let Some(found) = self.borrow(offset_bytes, bytes)? {
            return Ok(found.to_vec());
        }
        let mut room = vec![0; bytes];
        self.read_into(offset_bytes, &mut room)?;
        Ok(room)
    }
}
