//! Segment heads: the chunk size and the tables that a segment's chunks share.
//!
//! Byte 0: bits 0-4 the chunk size as a power of two of words, bits 5-7 whether sparse, dense and plane tables
//! follow. The tables are one bit stream, padded to a byte: sparse (bit: rows are context, then their rate in 7
//! bits; class table), dense (class table), planes.

use std::sync::OnceLock;

use crate::CodecError;
use crate::bits::{BitReader, BitWriter};
use crate::classes::{ClassKind, ClassPlan, DenseClass, read_dense, read_sparse, write_dense, write_sparse};
use crate::gap;
use crate::planes::{self, PlaneTables};
use crate::segment::{BaseKind, PatchKind, SEGMENT_WORDS, SegmentSpec};
use crate::sparse::SparseTables;
use crate::tables::Frequencies;
use crate::values::magnitude_alphabet;
use crate::words::Word;

/// Smallest and largest chunk, as powers of two of words.
pub(crate) const CHUNK_LOG2: std::ops::RangeInclusive<u32> = 10..=SEGMENT_WORDS.ilog2();

const SPARSE: u8 = 1 << 5;
const DENSE: u8 = 1 << 6;
const PLANES: u8 = 1 << 7;

/// What an encoder puts into a head.
#[derive(Default)]
pub(crate) struct HeadPlan {
    pub(crate) chunk_log2: u32,
    pub(crate) sparse: Option<(Option<u32>, Vec<ClassPlan>)>,
    pub(crate) dense: Option<Vec<(u8, Frequencies)>>,
    pub(crate) planes: Option<Vec<Option<Frequencies>>>,
}

impl HeadPlan {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let flag = |is_there: bool, bit: u8| if is_there { bit } else { 0 };
        let mut out = vec![
            self.chunk_log2 as u8
                | flag(self.sparse.is_some(), SPARSE)
                | flag(self.dense.is_some(), DENSE)
                | flag(self.planes.is_some(), PLANES),
        ];
        let mut bits = BitWriter::new();
        if let Some((row_rate, classes)) = &self.sparse {
            bits.put(row_rate.is_some().into(), 1);
            if let Some(rate) = row_rate {
                bits.put((*rate).into(), 7);
            }
            write_sparse(&mut bits, classes);
        }
        if let Some(classes) = &self.dense {
            write_dense(&mut bits, classes);
        }
        if let Some(frequencies) = &self.planes {
            planes::write_tables(&mut bits, frequencies);
        }
        out.extend_from_slice(&bits.finish());
        out
    }
}

/// A parsed head.
#[derive(Debug)]
pub(crate) struct Head {
    /// Words in a chunk as a power of two; 0 for a segment without chunks.
    pub(crate) chunk_log2: u32,
    pub(crate) sparse: Option<SparseTables>,
    pub(crate) dense: Option<DenseTables>,
    pub(crate) planes: Option<PlaneTables>,
}

/// The head's tables for mode D.
#[derive(Debug)]
pub(crate) struct DenseTables {
    pub(crate) classes: Vec<DenseClass>,
    /// Class of each key.
    pub(crate) class_of_key: [u8; 256],
    slots: OnceLock<Vec<u32>>,
}

impl Head {
    /// Parse a head off the front of `heads`.
    pub(crate) fn take(heads: &mut &[u8], spec: &SegmentSpec) -> Result<Self, CodecError> {
        match spec.dtype.word_bytes() {
            1 => Self::take_typed::<u8>(heads, spec),
            2 => Self::take_typed::<u16>(heads, spec),
            4 => Self::take_typed::<u32>(heads, spec),
            _ => Self::take_typed::<u64>(heads, spec),
        }
    }

    fn take_typed<W: Word>(heads: &mut &[u8], spec: &SegmentSpec) -> Result<Self, CodecError> {
        let bad = |why| CodecError::malformed("head", why);
        let (&first, rest) = heads.split_first().ok_or(bad("ends early"))?;
        let chunk_log2 = u32::from(first & 0x1f);
        if first == 0 {
            *heads = rest;
            return Ok(Head { chunk_log2: 0, sparse: None, dense: None, planes: None });
        }
        if !CHUNK_LOG2.contains(&chunk_log2) {
            return Err(bad("chunk size out of range"));
        }
        if spec.words == 0 {
            return Err(bad("chunks in a segment of no words"));
        }
        let mut bits = BitReader::new(rest);
        let is_step = spec.kind == PatchKind::Relative && spec.base != BaseKind::None;
        let sparse = match first & SPARSE {
            0 => None,
            _ => Some(read_sparse_tables::<W>(&mut bits, spec, is_step)?),
        };
        let dense = match first & DENSE {
            0 => None,
            _ if !is_step => return Err(bad("dense tables without a base")),
            _ => Some(DenseTables::new(read_dense(&mut bits, magnitude_alphabet::<W>())?)),
        };
        let planes = match first & PLANES {
            0 => None,
            _ => Some(planes::read_tables(&mut bits, W::BYTES)?),
        };
        *heads = &rest[bits.bytes_read()..];
        Ok(Head { chunk_log2, sparse, dense, planes })
    }

    /// Chunks in a segment of `words` words.
    pub(crate) fn chunk_count(&self, words: usize) -> usize {
        if self.chunk_log2 == 0 { 0 } else { words.div_ceil(1 << self.chunk_log2) }
    }
}

fn read_sparse_tables<W: Word>(
    bits: &mut BitReader<'_>,
    spec: &SegmentSpec,
    is_step: bool,
) -> Result<SparseTables, CodecError> {
    let bad = |why| CodecError::malformed("head", why);
    let row_rate = match bits.get(1)? {
        0 => None,
        _ => Some(bits.get(7)? as u32),
    };
    if let Some(rate) = row_rate {
        if !(gap::RATE_MIN..=gap::RATE_MAX).contains(&rate) {
            return Err(bad("row rate out of range"));
        }
        if spec.row_words == 0 || spec.row_words > SEGMENT_WORDS as u64 {
            return Err(bad("rows are context and their length is not usable"));
        }
    }
    let alphabet = if is_step { magnitude_alphabet::<W>() } else { 256 };
    let classes = read_sparse(bits, alphabet)?;
    let mut kinds = classes.iter().map(|class| class.kind).filter(|&kind| kind != ClassKind::Still);
    let is_flags = |kind| matches!(kind, ClassKind::Flags(_));
    let flags = kinds.clone().any(is_flags);
    if flags && !(kinds.all(is_flags) && is_step && row_rate.is_none()) {
        return Err(bad("flags beside other classes, rows or final words"));
    }
    Ok(SparseTables { row_rate, classes, flags })
}

impl DenseTables {
    fn new(classes: Vec<DenseClass>) -> Self {
        let mut class_of_key = [0; 256];
        for key in 0..=255u8 {
            class_of_key[usize::from(key)] = classes.partition_point(|class| class.high < key) as u8;
        }
        DenseTables { classes, class_of_key, slots: OnceLock::new() }
    }

    /// The decoding tables of all classes, one behind the other.
    pub(crate) fn slots(&self) -> &[u32] {
        self.slots.get_or_init(|| {
            let tables = self.classes.iter();
            tables.flat_map(|class| class.values.slots().as_slice()).copied().collect()
        })
    }
}
