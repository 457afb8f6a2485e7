//! Machine code on disk, so that a kernel is compiled once a machine.
//!
//! A file's name is the hash of all that decides its content: source, options (the architecture among
//! them) and the compiler's version. It starts with the hash of the rest, so that a damaged file is
//! compiled anew and never loaded. Several processes may fill it at once: a file appears whole, by
//! renaming. A folder that cannot be written to costs the time of compiling, nothing else.

use std::{env, fs, path::PathBuf};

use super::Nvrtc;
use crate::{Result, kernels::Source};

/// Names the folder that holds the machine code.
pub const FOLDER_VARIABLE: &str = "OVERSPILL_KERNEL_CACHE";

const HASH_BYTES: usize = 32;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelCache {
    folder: Option<PathBuf>,
}

impl KernelCache {
    /// In the folder that the environment names, or the user's cache.
    #[must_use]
    pub fn of_user() -> Self {
        let in_home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
        let of_user = || env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(in_home);
        let named = env::var_os(FOLDER_VARIABLE).map(PathBuf::from);
        Self { folder: named.or_else(|| of_user().map(|cache| cache.join("overspill").join("kernels"))) }
    }

    /// In `folder`.
    #[must_use]
    pub fn at(folder: PathBuf) -> Self {
        Self { folder: Some(folder) }
    }

    /// Machine code of `source`: the one on disk, or freshly compiled and then kept.
    pub fn cubin(&self, nvrtc: &Nvrtc, source: &Source, compute_capability: u32) -> Result<Vec<u8>> {
        let path = self.path(nvrtc, source, compute_capability);
        if let Some(cubin) = path.as_ref().and_then(read) {
            return Ok(cubin);
        }
        let cubin = nvrtc.compile(source, compute_capability)?.cubin;
        if let Some(path) = path {
            // Kept or not, the caller has its code; the next start tries again.
            let _ = write(&path, &cubin);
        }
        Ok(cubin)
    }

    fn path(&self, nvrtc: &Nvrtc, source: &Source, compute_capability: u32) -> Option<PathBuf> {
        let mut hash = blake3::Hasher::new();
        let (major, minor) = nvrtc.version();
        let mut parts =
            vec![format!("nvrtc {major}.{minor}"), source.name.to_owned(), source.text.to_owned()];
        parts.extend(nvrtc.options(source, compute_capability));
        for part in parts {
            hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        Some(self.folder.as_ref()?.join(format!("{}.cubin", hash.finalize().to_hex())))
    }
}

fn read(path: &PathBuf) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    if bytes.len() < HASH_BYTES {
        return None;
    }
    let cubin = bytes.split_off(HASH_BYTES);
    (blake3::hash(&cubin).as_bytes()[..] == bytes[..]).then_some(cubin)
}

fn write(path: &PathBuf, cubin: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let unfinished = path.with_extension(format!("{}.tmp", std::process::id()));
    fs::write(&unfinished, [&blake3::hash(cubin).as_bytes()[..], cubin].concat())?;
    fs::rename(&unfinished, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_not_taken() {
        let path = env::temp_dir().join(format!("overspill-cubin-{}", std::process::id()));
        assert_eq!(read(&path), None);
        write(&path, b"machine code").expect("written");
        assert_eq!(read(&path).as_deref(), Some(&b"machine code"[..]));
        let mut bytes = fs::read(&path).expect("read");
        *bytes.last_mut().expect("not empty") ^= 1;
        fs::write(&path, &bytes).expect("written");
        let damaged = read(&path);
        fs::write(&path, &bytes[..HASH_BYTES - 1]).expect("written");
        let cut = read(&path);
        fs::remove_file(&path).expect("removed");
        assert_eq!((damaged, cut), (None, None));
    }
}
