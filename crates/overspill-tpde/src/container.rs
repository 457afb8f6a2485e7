//! The `.tpde` file: a safetensors file of four U8 tensors, in this order:
//!
//! | section | holds |
//! |---|---|
//! | `blob` | chunk payloads of all segments, tensors in order of name |
//! | `index` | 8-byte chunk records |
//! | `heads` | segment heads |
//! | `manifest` | tensors, shapes, bases, files: see [`crate::manifest`] |
//!
//! `__metadata__` carries version, kind, the two state ids, and a BLAKE3 of everything else. Where the blob is at
//! least 1 MiB, blob and index start on 4 KiB: blanks pad the header, zeros the blob. Opening a [`Patch`] reads
//! all but the blob and lays out its segments; nothing is trusted before [`Patch::authenticate`].

use std::path::Path;

use overspill_codec::{
    Base, BaseKind, CodecError, PatchKind, SegmentSpec, SegmentView, measure_segment, segments,
};
use rayon::prelude::*;

use crate::buffer::Buffer;
use crate::checkpoint::Kind;
use crate::manifest::{Entry, MAX_MANIFEST_BYTES, Manifest};
use crate::safetensors::{Metadata, read_header, write_header};
use crate::state::StateId;
use crate::store::Store;
use crate::work::Workers;
use crate::{Error, Result};

/// Version that this crate writes and the only one it reads.
const VERSION: &str = "1";
/// Where large blobs and their index start: a page.
pub(crate) const ALIGN_BYTES: usize = 4096;
/// Blobs of at least this size are aligned; in smaller files padding would be felt.
pub(crate) const ALIGNED_BLOB_BYTES: u64 = 1 << 20;
/// Most bytes of the index and heads sections each: 4 TB of raw weights.
const MAX_TABLE_BYTES: u64 = 256 << 20;
/// The blob is authenticated in reads of this size.
const HASH_BYTES: usize = 32 << 20;
/// Threads that fill a caller's memory read this much at a time.
const READ_BYTES: usize = 4 << 20;
const SECTIONS: [&str; 4] = ["blob", "index", "heads", "manifest"];

/// What a patch starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchType {
    /// Nothing: it holds whole tensors.
    Standalone,
    /// Exactly this state.
    Relative(StateId),
    /// This state, or already the final one: positions and final words.
    Absolute(StateId),
}

impl PatchType {
    /// `standalone`, `relative` or `absolute`.
    pub fn name(self) -> &'static str {
        match self {
            PatchType::Standalone => "standalone",
            PatchType::Relative(_) => "relative",
            PatchType::Absolute(_) => "absolute",
        }
    }

    /// State that it starts from.
    pub fn base(self) -> Option<StateId> {
        match self {
            PatchType::Standalone => None,
            PatchType::Relative(id) | PatchType::Absolute(id) => Some(id),
        }
    }

    pub(crate) fn codec_kind(self) -> PatchKind {
        match self {
            PatchType::Absolute(_) => PatchKind::Absolute,
            _ => PatchKind::Relative,
        }
    }

    fn base_text(self) -> String {
        self.base().map_or_else(String::new, |id| id.to_string())
    }
}

/// Where one segment lies.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    /// Its tensor, as an index of the manifest's entries.
    pub entry: usize,
    pub spec: SegmentSpec,
    pub head_start: usize,
    pub index_start: usize,
    /// Start of its payloads in the blob.
    pub blob_start: u64,
    pub blob_bytes: usize,
    /// Size of its head.
    pub head_bytes: usize,
}

impl Segment {
    /// Bytes of its final words.
    pub fn raw_bytes(&self) -> usize {
        self.spec.words * self.spec.dtype.word_bytes()
    }
}

/// An opened patch.
#[derive(Debug)]
pub struct Patch<'a> {
    store: Store<'a>,
    kind: PatchType,
    final_id: StateId,
    hash: StateId,
    manifest: Manifest,
    manifest_bytes: Vec<u8>,
    blob_offset_bytes: u64,
    blob_bytes: u64,
    index: Vec<u8>,
    heads: Vec<u8>,
    pub(crate) segments: Vec<Segment>,
}

impl Patch<'static> {
    /// Opens a `.tpde` file.
    ///
    /// # Errors
    /// A file that cannot be read, or whose header, manifest, heads or index are malformed.
    pub fn open(path: &Path) -> Result<Self> {
        Patch::from_store(Store::open(path)?)
    }

    /// A patch in memory that it holds, which stands in errors as `label`.
    ///
    /// # Errors
    /// As [`Patch::open`].
    pub fn from_owner(label: &str, bytes: Box<dyn AsRef<[u8]> + Send + Sync>) -> Result<Self> {
        Patch::from_store(Store::owned(Path::new(label), bytes))
    }
}

impl<'a> Patch<'a> {
    /// A patch in memory, which stands in errors as `label`.
    ///
    /// # Errors
    /// As [`Patch::open`].
    pub fn from_bytes(label: &str, bytes: &'a [u8]) -> Result<Self> {
        Patch::from_store(Store::memory(Path::new(label), bytes))
    }

    fn from_store(store: Store<'a>) -> Result<Self> {
        let path = store.path().to_owned();
        let header = read_header(&store, 0)?;
        let fields = header.metadata.as_ref().ok_or_else(|| Error::format(&path, "not a .tpde file"))?;
        let (kind, final_id, hash) = read_fields(&path, fields)?;
        let sections = &header.tensors;
        if !sections.iter().map(|t| t.name.as_str()).eq(SECTIONS) || sections.iter().any(|t| !is_bytes(t)) {
            return Err(Error::format(&path, "not the four sections of a .tpde file"));
        }
        let [blob, index, heads, manifest] =
            [0, 1, 2, 3].map(|i| (sections[i].offset_bytes, sections[i].bytes));
        for (section, limit) in
            [(index, MAX_TABLE_BYTES), (heads, MAX_TABLE_BYTES), (manifest, MAX_MANIFEST_BYTES)]
        {
            if section.1 > limit {
                return Err(Error::at(
                    &path,
                    section.0,
                    format!("section of {} bytes, limit {limit}", section.1),
                ));
            }
        }
        let load = |(offset, bytes): (u64, u64)| store.read_vec(offset, bytes as usize);
        let (index, heads, manifest_bytes) = (load(index)?, load(heads)?, load(manifest)?);
        let manifest = Manifest::decode(&path, &manifest_bytes)?;
        let segments = lay_out(&path, kind, &manifest, &heads, &index, blob.1)?;
        let (blob_offset_bytes, blob_bytes) = blob;
        let patch = Patch {
            store,
            kind,
            final_id,
            hash,
            manifest,
            manifest_bytes,
            blob_offset_bytes,
            blob_bytes,
            index,
            heads,
            segments,
        };
        patch.check_padding()?;
        Ok(patch)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.store.path()
    }

    /// What it starts from.
    pub fn kind(&self) -> PatchType {
        self.kind
    }

    /// The state it makes.
    pub fn final_id(&self) -> StateId {
        self.final_id
    }

    /// The tensors it makes.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Size of the file.
    pub fn file_bytes(&self) -> u64 {
        self.store.len_bytes()
    }

    /// Compares every byte of the patch with the hash in its header.
    ///
    /// # Errors
    /// A file that cannot be read, or any byte that differs from what was packed.
    pub(crate) fn authenticate(&self, workers: &Workers) -> Result<()> {
        self.authenticate_by(|hasher, piece| workers.install(|| hasher.add_blob(piece)))
    }

    /// As [`Patch::authenticate`], on the threads of whoever `add`s to the hash.
    pub(crate) fn authenticate_by(&self, add: impl Fn(&mut PatchHasher, &[u8])) -> Result<()> {
        let mut hasher = PatchHasher::new();
        let (mut at, mut scratch) = (0, Buffer::default());
        while at < self.blob_bytes {
            let bytes = HASH_BYTES.min((self.blob_bytes - at) as usize);
            let piece = self.store.read(self.blob_offset_bytes + at, bytes, &mut scratch)?;
            add(&mut hasher, piece);
            at += bytes as u64;
        }
        let found = hasher.finish(&self.index, &self.heads, &self.manifest_bytes, self.kind, self.final_id);
        if found == self.hash {
            return Ok(());
        }
        Err(Error::format(
            self.path(),
            format!("damaged: content hash {found}, its header says {}", self.hash),
        ))
    }

    /// The heads section.
    pub(crate) fn heads(&self) -> &[u8] {
        &self.heads
    }

    /// The index section: every chunk's record.
    pub fn index(&self) -> &[u8] {
        &self.index
    }

    /// Bytes of the blob section.
    pub fn blob_bytes(&self) -> u64 {
        self.blob_bytes
    }

    /// A range of the blob section: borrowed where the patch is in memory, else read into `scratch`.
    ///
    /// # Errors
    /// A file that cannot be read, or a range beyond the section.
    pub fn blob<'b>(&'b self, start: u64, bytes: usize, scratch: &'b mut Vec<u8>) -> Result<&'b [u8]> {
        let offset_bytes = self.blob_offset_bytes + start;
        if let Some(found) = self.store.borrow(offset_bytes, bytes)? {
            return Ok(found);
        }
        scratch.resize(bytes, 0);
        self.store.read_into(offset_bytes, scratch)?;
        Ok(scratch)
    }

    /// Copies a range of the blob section to `out`, several pieces at once: one reader leaves a disk waiting, and
    /// does not fill memory's bandwidth either where the file is cached.
    ///
    /// # Errors
    /// As for [`Patch::blob`]; `out` may be partly written then.
    pub fn read_blob(&self, start: u64, out: &mut [u8]) -> Result<()> {
        let offset_bytes = self.blob_offset_bytes + start;
        let piece = |(index, piece): (usize, &mut [u8])| {
            self.store.read_into(offset_bytes + (index * READ_BYTES) as u64, piece)
        };
        out.par_chunks_mut(READ_BYTES).enumerate().try_for_each(piece)
    }

    /// The manifest entry of a segment.
    pub(crate) fn entry(&self, segment: &Segment) -> &Entry {
        &self.manifest.entries[segment.entry]
    }

    /// Raw bytes of the largest segment.
    pub(crate) fn largest_segment_bytes(&self) -> usize {
        self.segments.iter().map(Segment::raw_bytes).max().unwrap_or(0)
    }

    /// Reads a segment's payloads and hands its view to `use_view`; codec errors get their place.
    pub(crate) fn with_view<R>(
        &self,
        segment: &Segment,
        use_view: impl FnOnce(&SegmentView<'_>) -> std::result::Result<R, CodecError>,
    ) -> Result<R> {
        let mut scratch = Vec::new();
        let offset_bytes = self.blob_offset_bytes + segment.blob_start;
        let mut blob = self.blob(segment.blob_start, segment.blob_bytes, &mut scratch)?;
        let mut heads = &self.heads[segment.head_start..];
        let mut index = &self.index[segment.index_start..];
        SegmentView::take(segment.spec, &mut heads, &mut index, &mut blob)
            .and_then(|view| use_view(&view))
            .map_err(|error| {
                let name = &self.entry(segment).tensor.name;
                Error::tensor(self.path(), name, Some(offset_bytes), error.to_string())
            })
    }

    /// Decodes a segment from its base's bytes into `out`.
    pub(crate) fn decode(&self, segment: &Segment, base: &[u8], out: &mut [u8]) -> Result<()> {
        let base = match segment.spec.base {
            BaseKind::None => Base::None,
            BaseKind::Words => Base::Words(base),
            BaseKind::Quantized(layout) => Base::Quantized(layout, base),
        };
        self.with_view(segment, |view| view.decode(base, out))
    }

    /// What follows the last payload is padding: zeros, less than a page.
    fn check_padding(&self) -> Result<()> {
        let used = self.segments.last().map_or(0, |s| s.blob_start + s.blob_bytes as u64);
        let padding = self.blob_bytes - used;
        let offset_bytes = self.blob_offset_bytes + used;
        if padding >= ALIGN_BYTES as u64
            || self.store.read_vec(offset_bytes, padding as usize)?.iter().any(|&byte| byte != 0)
        {
            return Err(Error::at(self.path(), offset_bytes, "bytes that no chunk owns"));
        }
        Ok(())
    }
}

fn is_bytes(section: &crate::Tensor) -> bool {
    section.kind == Kind::Plain(overspill_codec::Dtype::U8) && section.shape == [section.bytes]
}

fn read_fields(path: &Path, fields: &Metadata) -> Result<(PatchType, StateId, StateId)> {
    let get = |key: &str| fields.get(key).map(String::as_str);
    let version = get("tpde").ok_or_else(|| Error::format(path, "not a .tpde file"))?;
    if version != VERSION {
        return Err(Error::format(
            path,
            format!("format version {version:?}, this program reads {VERSION:?}"),
        ));
    }
    let id = |key: &'static str| {
        let text = get(key).ok_or_else(|| Error::format(path, format!("no {key} in its metadata")))?;
        text.parse::<StateId>().map_err(|why| Error::format(path, format!("{key} in its metadata: {why}")))
    };
    let kind = match get("kind") {
        Some("standalone") if get("base") == Some("") => PatchType::Standalone,
        Some("relative") => PatchType::Relative(id("base")?),
        Some("absolute") => PatchType::Absolute(id("base")?),
        _ => return Err(Error::format(path, "unknown kind in its metadata")),
    };
    if fields.len() != 5 {
        return Err(Error::format(path, "unknown fields in its metadata"));
    }
    Ok((kind, id("final")?, id("hash")?))
}

/// Finds every segment in the three sections, which must hold them and nothing else.
fn lay_out(
    path: &Path,
    kind: PatchType,
    manifest: &Manifest,
    heads: &[u8],
    index: &[u8],
    blob_section_bytes: u64,
) -> Result<Vec<Segment>> {
    let (mut head_start, mut index_start, mut blob_start) = (0, 0, 0u64);
    let mut found = Vec::new();
    for &entry_index in &manifest.by_name {
        let Entry { tensor, base, .. } = &manifest.entries[entry_index];
        let fail = |cause: String| Error::tensor(path, &tensor.name, None, cause);
        let Kind::Plain(dtype) = tensor.kind else {
            return Err(fail("quantized final".into()));
        };
        if *base != BaseKind::None && kind == PatchType::Standalone {
            return Err(fail("coded against a base in a standalone patch".into()));
        }
        for (first_word, words) in segments(tensor.words()) {
            let row_words = tensor.row_words();
            let spec =
                SegmentSpec { dtype, words, row_words, first_word, base: *base, kind: kind.codec_kind() };
            let sizes = measure_segment(spec, &heads[head_start..], &index[index_start..])
                .map_err(|error| fail(error.to_string()))?;
            let (entry, blob_bytes, head_bytes) = (entry_index, sizes.blob_bytes, sizes.head_bytes);
            found.push(Segment { entry, spec, head_start, index_start, blob_start, blob_bytes, head_bytes });
            head_start += sizes.head_bytes;
            index_start += sizes.index_bytes;
            blob_start += blob_bytes as u64;
            if blob_start > blob_section_bytes {
                return Err(fail("payloads run past the blob".into()));
            }
        }
    }
    if head_start != heads.len() || index_start != index.len() {
        return Err(Error::format(path, "heads or index records that no tensor owns"));
    }
    Ok(found)
}

/// BLAKE3 over sections and identity of a patch, cut to 128 bits.
pub(crate) struct PatchHasher {
    hasher: blake3::Hasher,
    blob_bytes: u64,
}

impl PatchHasher {
    pub fn new() -> Self {
        PatchHasher { hasher: blake3::Hasher::new_derive_key("overspill tpde patch 1"), blob_bytes: 0 }
    }

    /// The next piece of the blob, on all threads of the current pool.
    pub fn add_blob(&mut self, piece: &[u8]) {
        self.hasher.update_rayon(piece);
        self.blob_bytes += piece.len() as u64;
    }

    pub fn finish(
        mut self,
        index: &[u8],
        heads: &[u8],
        manifest: &[u8],
        kind: PatchType,
        final_id: StateId,
    ) -> StateId {
        for section in [index, heads, manifest] {
            self.hasher.update(section);
        }
        for bytes in [self.blob_bytes, index.len() as u64, heads.len() as u64, manifest.len() as u64] {
            self.hasher.update(&bytes.to_le_bytes());
        }
        let identity = format!("{VERSION} {} {} {final_id}", kind.name(), kind.base_text());
        self.hasher.update(identity.as_bytes());
        let mut id = [0; 16];
        id.copy_from_slice(&self.hasher.finalize().as_bytes()[..16]);
        StateId(id)
    }
}

/// To what a patch's sections are aligned, and the bytes of its blob section with padding.
pub(crate) fn aligned(used_bytes: u64) -> (usize, u64) {
    if used_bytes < ALIGNED_BLOB_BYTES {
        return (8, used_bytes);
    }
    (ALIGN_BYTES, used_bytes.next_multiple_of(ALIGN_BYTES as u64))
}

/// The header of a patch whose sections have these sizes.
pub(crate) fn patch_header(
    kind: PatchType,
    final_id: StateId,
    hash: StateId,
    section_bytes: [u64; 4],
    align_bytes: usize,
) -> Vec<u8> {
    let fields = [
        ("tpde", VERSION.to_owned()),
        ("kind", kind.name().to_owned()),
        ("base", kind.base_text()),
        ("final", final_id.to_string()),
        ("hash", hash.to_string()),
    ];
    let metadata: Metadata = fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    let shapes = section_bytes.map(|bytes| [bytes]);
    let sections = (0..4).map(|i| (SECTIONS[i], "U8", shapes[i].as_slice(), section_bytes[i]));
    write_header(Some(&metadata), sections, align_bytes)
}
