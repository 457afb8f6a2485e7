//! The safetensors header, read with limits and written in the one canonical way.
//!
//! A file is a u64 header length, a JSON header, and the tensors' bytes without holes. Canonical: metadata first,
//! tensors in order of their bytes, no blanks but the padding to 8, which is what the reference writer does, so
//! a checkpoint that it wrote comes back byte for byte.

use std::collections::HashSet;
use std::fmt::Write as _;

use indexmap::IndexMap;
use overspill_codec::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::checkpoint::{Kind, Tensor};
use crate::store::Store;
use crate::{Error, Result};

/// The reference implementation's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Free-form text metadata, in the file's order.
pub(crate) type Metadata = IndexMap<String, String>;

/// A parsed header: tensors in order of their bytes, offsets counted from the start of the file.
#[derive(Debug)]
pub(crate) struct Header {
    pub metadata: Option<Metadata>,
    pub tensors: Vec<Tensor>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's JSON, duplicate keys refused.
struct RawHeader {
    metadata: Option<Metadata>,
    entries: Vec<(String, Entry)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = RawHeader;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut header = RawHeader { metadata: None, entries: Vec::new() };
                let mut seen = HashSet::new();
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("{key:?} stands twice")));
                    }
                    if key == "__metadata__" {
                        header.metadata = Some(map.next_value()?);
                    } else {
                        header.entries.push((key, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

/// Reads and checks the header of `store`, which becomes store number `store_index`.
pub(crate) fn read_header(store: &Store<'_>, store_index: usize) -> Result<Header> {
    let path = store.path();
    if store.len_bytes() < 8 {
        return Err(Error::format(path, "too short for a safetensors file"));
    }
    let length = store.read_vec(0, 8)?;
    let header_bytes = length.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    if header_bytes > MAX_HEADER_BYTES || header_bytes > store.len_bytes() - 8 {
        return Err(Error::at(
            path,
            0,
            format!(
                "a header of {header_bytes} bytes, beyond the file or the limit: cut off, or not a safetensors file"
            ),
        ));
    }
    let text = store.read_vec(8, header_bytes as usize)?;
    if text.first() != Some(&b'{') {
        return Err(Error::at(path, 8, "not a safetensors header"));
    }
    let raw: RawHeader = serde_json::from_slice(&text)
        .map_err(|error| Error::at(path, 8 + error.column() as u64, format!("bad header: {error}")))?;
    let data_start = 8 + header_bytes;
    let mut entries = raw.entries;
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut at = 0u64;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let fail = |cause: String| Error::tensor(path, &name, Some(data_start.saturating_add(at)), cause);
        let dtype =
            Dtype::from_name(&entry.dtype).ok_or_else(|| fail(format!("unknown dtype {:?}", entry.dtype)))?;
        let kind = Kind::Plain(dtype);
        let bytes = kind.tensor_bytes(&entry.shape).ok_or_else(|| fail("shape too large".into()))?;
        let (begin, end) = entry.data_offsets;
        if begin != at || end.checked_sub(begin) != Some(bytes) {
            return Err(fail(format!("bytes {begin}..{end}, expected {bytes} bytes from {at}")));
        }
        at = end;
        tensors.push(Tensor {
            name,
            kind,
            shape: entry.shape,
            store: store_index,
            offset_bytes: data_start.saturating_add(begin),
            bytes,
        });
    }
    if data_start.checked_add(at) != Some(store.len_bytes()) {
        return Err(Error::format(
            path,
            format!(
                "{} bytes long, its header describes {}",
                store.len_bytes(),
                data_start.saturating_add(at)
            ),
        ));
    }
    Ok(Header { metadata: raw.metadata, tensors })
}

/// Length prefix and canonical header for (name, dtype name, shape, bytes) in the order of their bytes, padded
/// with blanks until the data starts at a multiple of `align_bytes`.
pub(crate) fn write_header<'t>(
    metadata: Option<&Metadata>,
    tensors: impl Iterator<Item = (&'t str, &'t str, &'t [u64], u64)>,
    align_bytes: usize,
) -> Vec<u8> {
    let quote = |text: &str| serde_json::Value::from(text).to_string();
    let mut text = String::from("{");
    if let Some(metadata) = metadata {
        let pairs: Vec<String> = metadata.iter().map(|(k, v)| format!("{}:{}", quote(k), quote(v))).collect();
        let _ = write!(text, "\"__metadata__\":{{{}}}", pairs.join(","));
    }
    let mut at = 0u64;
    for (name, dtype, shape, bytes) in tensors {
        if text.len() > 1 {
            text.push(',');
        }
        let dims: Vec<String> = shape.iter().map(u64::to_string).collect();
        let _ = write!(
            text,
            "{}:{{\"dtype\":\"{dtype}\",\"shape\":[{}],\"data_offsets\":[{at},{}]}}",
            quote(name),
            dims.join(","),
            at + bytes
        );
        at += bytes;
    }
    text.push('}');
    let header_bytes = (8 + text.len()).next_multiple_of(align_bytes) - 8;
    let mut out = (header_bytes as u64).to_le_bytes().to_vec();
    out.extend_from_slice(text.as_bytes());
    out.resize(8 + header_bytes, b' ');
    out
}
