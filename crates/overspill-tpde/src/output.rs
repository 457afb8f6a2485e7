//! Outputs that appear whole or not at all: written beside their target, flushed, then renamed.

use std::fs::File;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile, TempDir};

use crate::{Error, Result};

/// A file in the making. Dropped before [`OutputFile::commit`], it leaves nothing.
#[derive(Debug)]
pub(crate) struct OutputFile {
    temp: NamedTempFile,
    target: PathBuf,
}

fn folder_of(target: &Path) -> &Path {
    match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

fn sync_folder(target: &Path) -> Result<()> {
    let folder = folder_of(target);
    File::open(folder).and_then(|dir| dir.sync_all()).map_err(Error::io(folder, "flush"))
}

/// The system's answer alone: `tempfile` puts a path behind it that nobody chose, and no way around its text.
fn system_error(error: io::Error) -> io::Error {
    let text = error.to_string();
    io::Error::new(error.kind(), text.split(" at path ").next().unwrap_or_default().to_owned())
}

impl OutputFile {
    pub fn create(target: &Path) -> Result<Self> {
        if target.is_dir() {
            return Err(Error::misuse(format!("{}: is a folder, a file is to be written", target.display())));
        }
        let temp = Builder::new()
            .prefix(".overspill-")
            .suffix(".part")
            .permissions(std::fs::Permissions::from_mode(0o666))
            .tempfile_in(folder_of(target))
            .map_err(system_error)
            .map_err(Error::io(target, "create a file beside"))?;
        Ok(OutputFile { temp, target: target.to_owned() })
    }

    pub fn file(&self) -> &File {
        self.temp.as_file()
    }

    pub fn path(&self) -> &Path {
        &self.target
    }

    pub fn commit(self) -> Result<()> {
        self.file().sync_all().map_err(Error::io(&self.target, "flush"))?;
        self.temp.persist(&self.target).map_err(|e| Error::io(&self.target, "rename to")(e.error))?;
        sync_folder(&self.target)
    }
}

/// A folder of files in the making, for sharded checkpoints.
#[derive(Debug)]
pub(crate) struct OutputFolder {
    temp: TempDir,
    target: PathBuf,
}

impl OutputFolder {
    pub fn create(target: &Path) -> Result<Self> {
        if target.exists() {
            let what = format!("{}: exists; a sharded checkpoint goes to a new folder", target.display());
            return Err(Error::misuse(what));
        }
        let temp = Builder::new()
            .prefix(".overspill-")
            .permissions(std::fs::Permissions::from_mode(0o777))
            .tempdir_in(folder_of(target))
            .map_err(system_error)
            .map_err(Error::io(target, "create a folder beside"))?;
        Ok(OutputFolder { temp, target: target.to_owned() })
    }

    pub fn create_file(&self, name: &str) -> Result<File> {
        let path = self.temp.path().join(name);
        File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(Error::io(&path, "create"))
    }

    pub fn path(&self) -> &Path {
        &self.target
    }

    /// The files, flushed by the caller, become visible together.
    pub fn commit(self) -> Result<()> {
        let made = self.temp.path();
        File::open(made).and_then(|dir| dir.sync_all()).map_err(Error::io(&self.target, "flush"))?;
        std::fs::rename(made, &self.target).map_err(Error::io(&self.target, "rename to"))?;
        let _ = self.temp.keep();
        sync_folder(&self.target)
    }
}
