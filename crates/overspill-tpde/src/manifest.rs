//! The manifest section: which tensors a patch makes, from what, and in which files they go.
//!
//! JSON in columns, compressed with Zstandard: on a 100-tensor model about 500 bytes, which matters where a
//! whole patch is 70 KB. Segments follow the tensors in order of name.

use std::collections::HashSet;
use std::path::Path;

use overspill_codec::{BaseKind, Dtype};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Kind, Layout, Tensor, base_code, base_from_code, is_plain_name};
use crate::{Error, Result};

/// Most bytes of a manifest, compressed or not: a million tensors.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 128 << 20;

/// Zstandard level for the manifest of a patch that is made once: it is small, and its bytes count.
pub(crate) const ZSTD_LEVEL: i32 = 19;
/// The level where somebody waits, or beside a large blob, where its bytes do not count: [`ZSTD_LEVEL`] takes 4 ms for
/// a hundred tensors.
pub(crate) const FAST_ZSTD_LEVEL: i32 = 3;

/// One tensor that a patch makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The tensor; its place is that in the output's files.
    pub tensor: Tensor,
    /// What it is coded against.
    pub base: BaseKind,
    /// Words that differ from the base; 0 without a base.
    pub changed: u64,
}

/// All tensors that a patch makes, in the order of the output's files.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    pub(crate) layout: Layout,
    pub(crate) entries: Vec<Entry>,
    pub(crate) by_name: Vec<usize>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Columns {
    layout: Layout,
    names: Vec<String>,
    dtypes: Vec<u8>,
    shapes: Vec<Vec<u64>>,
    bases: Vec<u8>,
    changed: Vec<u64>,
}

impl Manifest {
    pub(crate) fn new(layout: Layout, entries: Vec<Entry>) -> Self {
        let mut by_name: Vec<usize> = (0..entries.len()).collect();
        by_name.sort_by(|&a, &b| entries[a].tensor.name.cmp(&entries[b].tensor.name));
        Manifest { layout, entries, by_name }
    }

    /// The entries in the order of the output's files.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Raw bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.tensor.bytes).sum()
    }

    /// The section's bytes.
    pub(crate) fn encode(&self, path: &Path, level: i32) -> Result<Vec<u8>> {
        let column = |f: fn(&Entry) -> u8| self.entries.iter().map(f).collect();
        let columns = Columns {
            layout: self.layout.clone(),
            names: self.entries.iter().map(|e| e.tensor.name.clone()).collect(),
            dtypes: column(|e| e.tensor.kind.code()),
            shapes: self.entries.iter().map(|e| e.tensor.shape.clone()).collect(),
            bases: column(|e| base_code(e.base)),
            changed: self.entries.iter().map(|e| e.changed).collect(),
        };
        let text = serde_json::to_vec(&columns).map_err(|e| Error::format(path, e.to_string()))?;
        if text.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(Error::format(path, "too many tensors for one patch"));
        }
        zstd::bulk::compress(&text, level).map_err(Error::io(path, "compress the manifest"))
    }

    /// Inverse of [`Manifest::encode`], everything checked.
    pub(crate) fn decode(path: &Path, section: &[u8]) -> Result<Self> {
        let fail = |cause: String| Error::format(path, format!("bad manifest: {cause}"));
        let text = decompress(section).map_err(|e| fail(e.to_string()))?;
        let columns: Columns = serde_json::from_slice(&text).map_err(|e| fail(e.to_string()))?;
        let layout = columns.layout;
        let count = columns.names.len();
        let lengths =
            [columns.dtypes.len(), columns.shapes.len(), columns.bases.len(), columns.changed.len()];
        if lengths != [count; 4] {
            return Err(fail("columns of different lengths".into()));
        }
        check_layout(&layout, count).map_err(|why| fail(why.into()))?;
        let mut seen = HashSet::new();
        let mut places = layout.files.iter().enumerate().flat_map(|(i, f)| std::iter::repeat_n(i, f.tensors));
        let (mut offset_bytes, mut store) = (0u64, 0);
        let mut entries = Vec::with_capacity(count);
        let rows = columns.names.into_iter().zip(columns.dtypes).zip(columns.shapes);
        let rows = rows.zip(columns.bases).zip(columns.changed);
        for ((((name, dtype), shape), base), changed) in rows {
            let fail = |cause: &str| Error::tensor(path, &name, None, format!("bad manifest: {cause}"));
            if !seen.insert(name.clone()) {
                return Err(fail("stands twice"));
            }
            let kind = Kind::Plain(Dtype::from_code(dtype).ok_or_else(|| fail("reserved dtype code"))?);
            let base = base_from_code(base).ok_or_else(|| fail("reserved base code"))?;
            let bytes = kind.tensor_bytes(&shape).ok_or_else(|| fail("shape too large"))?;
            let place = places.next().unwrap_or(0);
            if place != store {
                (store, offset_bytes) = (place, 0);
            }
            let tensor = Tensor { name, kind, shape, store, offset_bytes, bytes };
            offset_bytes = offset_bytes.checked_add(bytes).ok_or_else(|| fail_total(path))?;
            if changed > tensor.words() {
                return Err(Error::tensor(path, &tensor.name, None, "bad manifest: more changes than words"));
            }
            entries.push(Entry { tensor, base, changed });
        }
        let total = entries.iter().try_fold(0u64, |sum, entry| sum.checked_add(entry.tensor.bytes));
        total.ok_or_else(|| fail_total(path))?;
        Ok(Manifest::new(layout, entries))
    }
}

fn fail_total(path: &Path) -> Error {
    Error::format(path, "bad manifest: sizes overflow")
}

fn check_layout(layout: &Layout, tensors: usize) -> std::result::Result<(), &'static str> {
    let sum = layout.files.iter().try_fold(0usize, |sum, file| sum.checked_add(file.tensors));
    if sum != Some(tensors) {
        return Err("files and tensors do not add up");
    }
    if layout.index.is_none() && layout.files.len() != 1 {
        return Err("several files without an index");
    }
    let mut seen = HashSet::new();
    if layout.files.iter().any(|file| !is_plain_name(&file.name) || !seen.insert(&file.name)) {
        return Err("file names that are not plain, or that stand twice");
    }
    Ok(())
}

fn decompress(section: &[u8]) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut text = Vec::new();
    zstd::Decoder::new(section)?.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(std::io::Error::other("beyond the size limit"));
    }
    Ok(text)
}
