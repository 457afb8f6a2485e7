//! The seam between overspill and the file system.
//!
//! [`Storage`] is a file as the engine sees it: positioned reads and writes of whole buffers.
//! [`DirectFile`] is the real one; [`FaultyStorage`] wraps any other and fails on purpose.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::Mutex,
};

/// A file of positioned, whole reads and writes. A short read or write is an error.
pub trait Storage: Send + Sync {
    /// Writes all of `bytes` at `offset_bytes`.
    fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()>;
    /// Fills all of `bytes` from `offset_bytes`.
    fn read_at(&self, offset_bytes: u64, bytes: &mut [u8]) -> io::Result<()>;
}

/// A nameless file, read and written past the page cache where the file system allows it.
#[derive(Debug)]
pub struct DirectFile {
    direct: Option<File>,
    buffered: File,
}

/// What direct I/O asks of addresses, offsets and lengths; 4096 satisfies every disk in use.
const DIRECT_ALIGN: usize = 4096;

impl DirectFile {
    /// Creates a file in `dir` that has no name once this returns, so that nothing is left behind
    /// whatever happens to the process.
    pub fn create_in(dir: &Path) -> io::Result<Self> {
        let path = dir.join(format!(".overspill-{}-{:x}", std::process::id(), unique()));
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let buffered = options.clone().create_new(true).mode(0o600).open(&path)?;
        let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap_or(0);
        let direct = options.custom_flags(flags).open(&path).ok();
        std::fs::remove_file(&path)?;
        Ok(Self { direct, buffered })
    }

    /// Whether transfers bypass the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    fn file_for(&self, offset_bytes: u64, bytes: &[u8]) -> &File {
        let aligned = bytes.as_ptr().addr().is_multiple_of(DIRECT_ALIGN)
            && bytes.len().is_multiple_of(DIRECT_ALIGN)
            && offset_bytes.is_multiple_of(DIRECT_ALIGN as u64);
        self.direct.as_ref().filter(|_| aligned).unwrap_or(&self.buffered)
    }
}

impl Storage for DirectFile {
    fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        // The tail of an odd length goes through the page cache: the kernel keeps the two coherent
        // for ranges that do not overlap.
        let whole = bytes.len() / DIRECT_ALIGN * DIRECT_ALIGN;
        let (head, tail) = bytes.split_at(whole);
        self.file_for(offset_bytes, head).write_all_at(head, offset_bytes)?;
        if tail.is_empty() { Ok(()) } else { self.buffered.write_all_at(tail, offset_bytes + whole as u64) }
    }

    fn read_at(&self, offset_bytes: u64, bytes: &mut [u8]) -> io::Result<()> {
        let whole = bytes.len() / DIRECT_ALIGN * DIRECT_ALIGN;
        let (head, tail) = bytes.split_at_mut(whole);
        self.file_for(offset_bytes, head).read_exact_at(head, offset_bytes)?;
        if tail.is_empty() { Ok(()) } else { self.buffered.read_exact_at(tail, offset_bytes + whole as u64) }
    }
}

fn unique() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_nanos())
}

/// A fault to inject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The disk is full.
    NoSpace,
    /// Half of the buffer is written, then the write fails.
    ShortWrite,
    /// The read fails.
    ReadError,
    /// The read succeeds, with one bit flipped.
    BitFlip,
}

/// A storage that does what `plan` says at each operation, counted from 0, reads and writes alike.
pub struct FaultyStorage<S> {
    inner: S,
    plan: Box<dyn Fn(u64) -> Option<Fault> + Send + Sync>,
    operations: Mutex<u64>,
}

impl<S: Storage> FaultyStorage<S> {
    /// Wraps `inner`.
    pub fn new(inner: S, plan: impl Fn(u64) -> Option<Fault> + Send + Sync + 'static) -> Self {
        Self { inner, plan: Box::new(plan), operations: Mutex::new(0) }
    }

    fn next(&self) -> Option<Fault> {
        let mut operations = self.operations.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *operations += 1;
        (self.plan)(*operations - 1)
    }
}

impl<S: Storage> Storage for FaultyStorage<S> {
    fn write_at(&self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        match self.next() {
            Some(Fault::NoSpace) => Err(io::Error::from(io::ErrorKind::StorageFull)),
            Some(Fault::ShortWrite) => {
                self.inner.write_at(offset_bytes, &bytes[..bytes.len() / 2])?;
                Err(io::Error::from(io::ErrorKind::WriteZero))
            }
            _ => self.inner.write_at(offset_bytes, bytes),
        }
    }

    fn read_at(&self, offset_bytes: u64, bytes: &mut [u8]) -> io::Result<()> {
        let fault = self.next();
        if fault == Some(Fault::ReadError) {
            return Err(io::Error::other("injected read error"));
        }
        self.inner.read_at(offset_bytes, bytes)?;
        if let (Some(Fault::BitFlip), Some(first)) = (fault, bytes.first_mut()) {
            *first ^= 1;
        }
        Ok(())
    }
}
