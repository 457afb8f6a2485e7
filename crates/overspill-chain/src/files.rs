//! The seam between a chain and the file system: a folder of named files, and when its changes are durable.
//!
//! A chain's crash safety is an order of these calls. [`Folder`] is the real one; the tests have another, which
//! forgets, at a crash, any part of what was not flushed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// What writes a file's content to the path that it is given.
pub type Make<'m> = &'m mut dyn FnMut(&Path) -> Result<()>;

/// A folder of files, two levels deep. Names are relative, with `/`.
pub trait Files: Send + Sync {
    /// Where the file `name` lies for readers of other crates.
    fn path(&self, name: &str) -> PathBuf;
    /// Names in the subfolder `dir`, without it; empty if it is not there.
    fn list(&self, dir: &str) -> Result<Vec<String>>;
    /// Creates the subfolder `dir` where it is not there.
    fn create_dir(&self, dir: &str) -> Result<()>;
    /// Lets `make` write a new file. Neither content nor name is durable yet.
    fn create(&self, name: &str, make: Make<'_>) -> Result<()>;
    /// Makes the content of `name` durable.
    fn flush(&self, name: &str) -> Result<()>;
    /// Makes the names in `dir` durable ("" is the folder itself).
    fn flush_dir(&self, dir: &str) -> Result<()>;
    /// Renames within the folder, over what stood there.
    fn rename(&self, from: &str, to: &str) -> Result<()>;
    /// Removes a file.
    fn remove(&self, name: &str) -> Result<()>;
}

/// A folder of the file system.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
}

impl Folder {
    /// The folder `root`, which need not be there yet.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Folder { root: root.to_owned() }
    }
}

impl Files for Folder {
    fn path(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.root.clone() } else { self.root.join(name) }
    }

    fn list(&self, dir: &str) -> Result<Vec<String>> {
        let path = self.path(dir);
        let entries = match fs::read_dir(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(Error::io(&path, "list"))?,
        };
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        names.collect::<std::io::Result<_>>().map_err(Error::io(&path, "list"))
    }

    fn create_dir(&self, dir: &str) -> Result<()> {
        let path = self.path(dir);
        fs::create_dir_all(&path).map_err(Error::io(&path, "create"))
    }

    fn create(&self, name: &str, make: Make<'_>) -> Result<()> {
        make(&self.path(name))
    }

    fn flush(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        File::open(&path).and_then(|file| file.sync_all()).map_err(Error::io(&path, "flush"))
    }

    fn flush_dir(&self, dir: &str) -> Result<()> {
        self.flush(dir)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        fs::rename(self.path(from), self.path(to)).map_err(Error::io(&self.path(to), "rename to"))
    }

    fn remove(&self, name: &str) -> Result<()> {
        fs::remove_file(self.path(name)).map_err(Error::io(&self.path(name), "remove"))
    }
}
