//! A session as a file, to outlive the process.
//!
//! Layout, integers little-endian: 8 bytes of magic, u64 length of the header, the header (JSON:
//! geometry, tokens per layer, pause, the caller's record), the payload (per layer keys, then
//! values), u64 xxh3 of everything before it. Written beside its place, synced, then renamed: the
//! name is either absent, the old file or the new one, whenever the process dies.

use std::{
    fs::File,
    hash::Hasher,
    io::{BufReader, BufWriter, Read, Write},
    path::Path,
};

use overspill_device::HostTape;
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::{
    Error, Geometry, Part, Pool, Refusal, Result,
    host_copy::{HostCopy, Place},
};

const MAGIC: &[u8; 8] = b"OVSPDJN1";
/// A header is a few KiB and a record of tokens; more than this is not one.
const HEADER_LIMIT_BYTES: u64 = 1 << 30;

#[derive(Serialize, Deserialize)]
struct Header {
    geometry: Geometry,
    tokens: Vec<usize>,
    pause: Option<usize>,
    record: String,
}

impl Pool {
    /// Writes session `id` and `record` to `path`. The session stays as it is.
    pub fn save(&mut self, id: u64, path: &Path, record: &str) -> Result<()> {
        if self.entry(id)?.session.is_running() {
            return Err(Error::Refused { id, refusal: Refusal::Running });
        }
        self.clean(id)?;
        let geometry = self.config.geometry;
        let entry = self.entry(id)?;
        let header = Header {
            geometry,
            tokens: entry.session.tokens(),
            pause: entry.session.pause(),
            record: record.to_owned(),
        };
        let header = serde_json::to_vec(&header).map_err(|error| file_error(path, &error))?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut scratch =
            tempfile::NamedTempFile::new_in(folder).map_err(|error| file_error(path, &error))?;
        let mut sink = Hashing { inner: BufWriter::new(scratch.as_file_mut()), hash: XxHash3_64::new() };
        let mut put = |bytes: &[u8]| sink.write_all(bytes).map_err(|error| file_error(path, &error));
        put(MAGIC)?;
        put(&(header.len() as u64).to_le_bytes())?;
        put(&header)?;
        for (layer, part) in (0..geometry.layers).flat_map(|layer| Part::BOTH.map(|part| (layer, part))) {
            for piece in entry.copy.run(layer, part).pieces.iter().filter(|piece| piece.bytes > 0) {
                match &piece.place {
                    Place::Host { tape, .. } => put(tape.as_slice(piece.bytes)?)?,
                    Place::Disk(extent) => {
                        let mut bytes = vec![0; extent.bytes()];
                        extent.read(&mut bytes)?;
                        put(&bytes[..piece.bytes])?;
                    }
                }
            }
        }
        let digest = sink.hash.finish();
        sink.inner.write_all(&digest.to_le_bytes()).map_err(|error| file_error(path, &error))?;
        sink.inner.flush().map_err(|error| file_error(path, &error))?;
        drop(sink);
        scratch.as_file().sync_all().map_err(|error| file_error(path, &error))?;
        scratch.persist(path).map_err(|error| file_error(path, &error))?;
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| file_error(path, &error))
    }

    /// Adds session `id` as it was saved at `path`; the record that was saved with it. On an error
    /// there is no such session.
    pub fn load(&mut self, id: u64, path: &Path) -> Result<String> {
        if self.sessions.contains_key(&id) {
            return Err(Error::Exists { id });
        }
        let geometry = self.config.geometry;
        let file = File::open(path).map_err(|error| file_error(path, &error))?;
        let file_bytes = file.metadata().map_err(|error| file_error(path, &error))?.len();
        let mut source = Hashing { inner: BufReader::new(file), hash: XxHash3_64::new() };
        let header = read_header(&mut source, path, &geometry, file_bytes)?;
        let mut copy = HostCopy::new(&geometry);
        for (layer, part) in (0..geometry.layers).flat_map(|layer| Part::BOTH.map(|part| (layer, part))) {
            let bytes = header.tokens[layer] * geometry.token_bytes;
            if bytes == 0 {
                continue;
            }
            let tape = HostTape::new(self.host_extent(bytes, id, true)?);
            tape.append_host(bytes, |into| source.read_exact(into).map_err(|error| damaged(path, &error)))?;
            copy.run_mut(layer, part).push(tape, bytes);
        }
        let digest = source.hash.finish();
        let mut stored = [0; 8];
        source.inner.read_exact(&mut stored).map_err(|error| damaged(path, &error))?;
        if digest != u64::from_le_bytes(stored) {
            return Err(damaged(path, &"its checksum is wrong"));
        }
        self.insert(id, header.tokens, header.pause, copy)?;
        Ok(header.record)
    }
}

fn read_header(source: &mut impl Read, path: &Path, geometry: &Geometry, file_bytes: u64) -> Result<Header> {
    let mut word = [0; 8];
    let mut read = |into: &mut [u8]| source.read_exact(into).map_err(|error| damaged(path, &error));
    read(&mut word)?;
    if &word != MAGIC {
        return Err(damaged(path, &"it starts with other bytes"));
    }
    read(&mut word)?;
    let length = u64::from_le_bytes(word);
    if length > HEADER_LIMIT_BYTES.min(file_bytes) {
        return Err(damaged(path, &"its header is longer than the file"));
    }
    let mut header = vec![0; usize::try_from(length).unwrap_or(0)];
    read(&mut header)?;
    let header: Header = serde_json::from_slice(&header).map_err(|error| damaged(path, &error))?;
    let same =
        (header.geometry.layers, header.geometry.token_bytes) == (geometry.layers, geometry.token_bytes);
    let fits = header.tokens.iter().all(|&tokens| tokens <= geometry.tokens);
    if !same || header.tokens.len() != geometry.layers || !fits {
        let (found, expected) = (header.geometry, geometry);
        return Err(damaged(path, &format!("it is of shape {found:?}, the pool's is {expected:?}")));
    }
    let payload: usize = header.tokens.iter().map(|tokens| 2 * tokens * geometry.token_bytes).sum();
    if file_bytes != 8 + 8 + length + payload as u64 + 8 {
        return Err(damaged(path, &"it is not as long as its header says"));
    }
    Ok(header)
}

/// Passes bytes on and hashes them.
struct Hashing<T> {
    inner: T,
    hash: XxHash3_64,
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.write(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Read for Hashing<T> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(bytes)?;
        self.hash.write(&bytes[..read]);
        Ok(read)
    }
}

fn file_error(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::File { path: path.to_owned(), reason: error.to_string() }
}

fn damaged(path: &Path, what: &dyn std::fmt::Display) -> Error {
    Error::Damaged { path: path.to_owned(), what: what.to_string() }
}
