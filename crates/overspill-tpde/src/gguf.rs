//! GGUF headers, as far as a base needs them: tensors and where they lie, key-values skipped.
//!
//! Quantized types whose dequantizer the codec specifies (Q4_0, Q4_1, Q8_0) become quantized tensors, F16, BF16 and
//! F32 plain ones; others are left out, as if the base did not have them. Dimensions are stored fastest first and
//! are turned around here. Names stay as they stand in the file.

use overspill_codec::{Dtype, QuantLayout};

use crate::checkpoint::{Kind, Tensor};
use crate::store::Store;
use crate::{Error, Result};

const MAGIC: &[u8; 4] = b"GGUF";
const VERSIONS: std::ops::RangeInclusive<u32> = 2..=3;
const DEFAULT_ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";
/// Most bytes of a header: vocabularies stand in it.
const MAX_HEADER_BYTES: u64 = 256 << 20;
const MAX_DIMS: u32 = 8;
const MAX_NESTING: u32 = 4;

/// The tensors of a GGUF file.
pub(crate) fn read_header(store: &Store<'_>) -> Result<Vec<Tensor>> {
    let bytes = store.read_vec(0, store.len_bytes().min(MAX_HEADER_BYTES) as usize)?;
    let mut reader = Reader { store, bytes: &bytes, at: 0 };
    if reader.take(4)? != MAGIC {
        return Err(reader.fail("not a GGUF file"));
    }
    let version = reader.u32()?;
    if !VERSIONS.contains(&version) {
        return Err(reader.fail(format!("GGUF version {version}, this program reads 2 and 3")));
    }
    let (tensor_count, key_count) = (reader.u64()?, reader.u64()?);
    let mut alignment = DEFAULT_ALIGNMENT;
    for _ in 0..key_count {
        let key = reader.string()?;
        let value = reader.value(0)?;
        if key == ALIGNMENT_KEY {
            alignment = value.filter(|a| a.is_power_of_two()).ok_or_else(|| reader.fail("bad alignment"))?;
        }
    }
    let mut tensors = Vec::new();
    for _ in 0..tensor_count {
        tensors.extend(reader.tensor()?);
    }
    let data_start = (reader.at as u64).next_multiple_of(alignment);
    for tensor in &mut tensors {
        let offset_bytes = data_start.checked_add(tensor.offset_bytes);
        let end = offset_bytes.and_then(|offset| offset.checked_add(tensor.bytes));
        match (offset_bytes, end) {
            (Some(offset_bytes), Some(end)) if end <= store.len_bytes() => tensor.offset_bytes = offset_bytes,
            _ => return Err(Error::tensor(store.path(), &tensor.name, None, "lies beyond the file")),
        }
    }
    Ok(tensors)
}

struct Reader<'r> {
    store: &'r Store<'r>,
    bytes: &'r [u8],
    at: usize,
}

impl<'r> Reader<'r> {
    fn fail(&self, cause: impl Into<String>) -> Error {
        Error::at(self.store.path(), self.at as u64, cause)
    }

    fn take(&mut self, bytes: u64) -> Result<&'r [u8]> {
        let end = usize::try_from(bytes).ok().and_then(|bytes| self.at.checked_add(bytes));
        let found = end.and_then(|end| self.bytes.get(self.at..end));
        let found = found.ok_or_else(|| self.fail("header ends early"))?;
        self.at += found.len();
        Ok(found)
    }

    fn u32(&mut self) -> Result<u32> {
        let bytes = self.take(4)?;
        Ok(bytes.first_chunk().map_or(0, |b| u32::from_le_bytes(*b)))
    }

    fn u64(&mut self) -> Result<u64> {
        let bytes = self.take(8)?;
        Ok(bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b)))
    }

    fn string(&mut self) -> Result<String> {
        let length = self.u64()?;
        let bytes = self.take(length)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| self.fail("a name that is not UTF-8"))
    }

    /// Reads past a value of the type that stands before it; gives it back where it is a u32.
    fn value(&mut self, nesting: u32) -> Result<Option<u64>> {
        let kind = self.u32()?;
        self.value_of(kind, nesting)
    }

    fn value_of(&mut self, kind: u32, nesting: u32) -> Result<Option<u64>> {
        match kind {
            0 | 1 | 7 => self.take(1).map(|_| None),
            2 | 3 => self.take(2).map(|_| None),
            4 => self.u32().map(|value| Some(u64::from(value))),
            5 | 6 => self.take(4).map(|_| None),
            10..=12 => self.take(8).map(|_| None),
            8 => {
                let length = self.u64()?;
                self.take(length).map(|_| None)
            }
            9 if nesting < MAX_NESTING => {
                let (kind, count) = (self.u32()?, self.u64()?);
                for _ in 0..count {
                    self.value_of(kind, nesting + 1)?;
                }
                Ok(None)
            }
            _ => Err(self.fail(format!("unknown value type {kind}"))),
        }
    }

    fn tensor(&mut self) -> Result<Option<Tensor>> {
        let name = self.string()?;
        let dims = self.u32()?;
        if dims > MAX_DIMS {
            return Err(self.fail(format!("tensor {name:?} of {dims} dimensions")));
        }
        let mut shape = (0..dims).map(|_| self.u64()).collect::<Result<Vec<u64>>>()?;
        shape.reverse();
        let kind = match self.u32()? {
            0 => Kind::Plain(Dtype::F32),
            1 => Kind::Plain(Dtype::F16),
            2 => Kind::Quantized(QuantLayout::Q4_0),
            3 => Kind::Quantized(QuantLayout::Q4_1),
            8 => Kind::Quantized(QuantLayout::Q8_0),
            30 => Kind::Plain(Dtype::Bf16),
            _ => {
                self.u64()?;
                return Ok(None);
            }
        };
        let offset_bytes = self.u64()?;
        let bytes =
            kind.tensor_bytes(&shape).ok_or_else(|| self.fail(format!("tensor {name:?}: bad shape")))?;
        Ok(Some(Tensor { name, kind, shape, store: 0, offset_bytes, bytes }))
    }
}
