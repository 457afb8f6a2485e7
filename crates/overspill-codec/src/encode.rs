//! The encoder's front door: one segment in, head, records and blob out.

use crate::chunk::ChunkMode;
use crate::elias;
use crate::head::Head;
use crate::record::payload_check;
use crate::segment::{SEGMENT_WORDS, SegmentSpec, check_len};
use crate::words::Word;
use crate::{Base, ChunkRecord, CodecError, Dtype, PatchKind};

/// Which codec the encoder may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CodecChoice {
    /// The cheapest mode of each chunk.
    #[default]
    Auto,
    /// `elias-zstd` for every chunk that changed: the first design.
    EliasZstd,
}

/// Options of [`encode_segment`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Relative or absolute.
    pub kind: PatchKind,
    /// Which codec.
    pub codec: CodecChoice,
    /// Zstandard level of mode `elias-zstd`.
    pub zstd_level: i32,
    /// Words of a row (the tensor's last dimension), 0 if unknown.
    pub row_words: u64,
    /// Index of the segment's first word within the tensor.
    pub first_word: u64,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        EncodeOptions {
            kind: PatchKind::Relative,
            codec: CodecChoice::Auto,
            zstd_level: 3,
            row_words: 0,
            first_word: 0,
        }
    }
}

/// Chunks and payload bytes of one mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ModeCount {
    /// Chunks coded in this mode.
    pub chunks: u64,
    /// Their payload bytes.
    pub bytes: u64,
}

/// What an encoded segment holds, for reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SegmentStats {
    /// Words in the segment.
    pub words: u64,
    /// Words that differ from the base (from zero where there is none).
    pub changed: u64,
    /// Per mode, indexed by [`ChunkMode`] code.
    pub modes: [ModeCount; ChunkMode::ALL.len()],
}

/// An encoded segment. The container appends head, records and blob to its sections in segment order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedSegment {
    /// Chunk size and shared tables, self-delimiting.
    pub head: Vec<u8>,
    /// One record a chunk; none for a segment without changes.
    pub index: Vec<ChunkRecord>,
    /// Payloads, back to back.
    pub blob: Vec<u8>,
    /// What was coded.
    pub stats: SegmentStats,
}

impl EncodedSegment {
    /// Bytes of head, records and blob together.
    pub fn total_bytes(&self) -> usize {
        self.head.len() + self.index.len() * crate::RECORD_BYTES + self.blob.len()
    }

    /// The records as they stand in the index section.
    pub fn index_bytes(&self) -> Vec<u8> {
        self.index.iter().flat_map(|record| record.to_bytes()).collect()
    }
}

/// Encode the final words of one segment against `base`.
///
/// `new` is little-endian words of `dtype`, at most [`SEGMENT_WORDS`] of them; `base` covers the same words.
///
/// # Errors
/// Lengths that are not whole words, too many words, or a base of another length.
pub fn encode_segment(
    base: Base<'_>,
    new: &[u8],
    dtype: Dtype,
    options: &EncodeOptions,
) -> Result<EncodedSegment, CodecError> {
    let word_bytes = dtype.word_bytes();
    let words = new.len() / word_bytes;
    check_len("final", words * word_bytes, new.len())?;
    base.check_len(words, word_bytes)?;
    if words > SEGMENT_WORDS {
        return Err(CodecError::Limit {
            what: "words in a segment",
            found: words as u64,
            limit: SEGMENT_WORDS as u64,
        });
    }
    let spec = SegmentSpec {
        dtype,
        words,
        row_words: options.row_words,
        first_word: options.first_word,
        base: base.kind(),
        kind: options.kind,
    };
    match word_bytes {
        1 => encode_typed::<u8>(base, new, &spec, options),
        2 => encode_typed::<u16>(base, new, &spec, options),
        4 => encode_typed::<u32>(base, new, &spec, options),
        _ => encode_typed::<u64>(base, new, &spec, options),
    }
}

fn encode_typed<W: Word>(
    base: Base<'_>,
    new: &[u8],
    spec: &SegmentSpec,
    options: &EncodeOptions,
) -> Result<EncodedSegment, CodecError> {
    let zeros;
    let base = match base {
        Base::Words(bytes) => bytes,
        Base::None => {
            zeros = vec![0; new.len()];
            &zeros
        }
        Base::Quantized(..) => {
            return Err(CodecError::Base { why: "quantized bases are not supported yet" });
        }
    };
    let mut stats = SegmentStats { words: spec.words as u64, ..SegmentStats::default() };
    if base == new {
        return Ok(EncodedSegment { head: vec![0], index: vec![], blob: vec![], stats });
    }
    let head = Head { chunk_log2: 16 };
    let mut encoded = EncodedSegment { head: vec![], index: vec![], blob: vec![], stats };
    head.write(&mut encoded.head);
    let chunk_bytes = W::BYTES << head.chunk_log2;
    for (chunk, (old, new)) in base.chunks(chunk_bytes).zip(new.chunks(chunk_bytes)).enumerate() {
        let changed = count_changed(old, new, W::BYTES);
        let start = encoded.blob.len();
        if changed > 0 {
            encoded.blob.push(ChunkMode::EliasZstd as u8);
            elias::encode::<W>(old, new, spec, options.zstd_level, &mut encoded.blob)?;
            if encoded.blob.len() - start > new.len() + 1 {
                encoded.blob.truncate(start);
                encoded.blob.push(ChunkMode::Raw as u8);
                encoded.blob.extend_from_slice(new);
            }
        }
        let payload = &encoded.blob[start..];
        let mode = &mut stats.modes[ChunkMode::of(payload)? as usize];
        mode.chunks += 1;
        mode.bytes += payload.len() as u64;
        stats.changed += changed;
        let check = payload_check(payload, chunk);
        encoded.index.push(ChunkRecord { end_bytes: encoded.blob.len() as u32, check });
    }
    encoded.stats = stats;
    Ok(encoded)
}

fn count_changed(old: &[u8], new: &[u8], word_bytes: usize) -> u64 {
    old.chunks_exact(word_bytes).zip(new.chunks_exact(word_bytes)).filter(|(a, b)| a != b).count() as u64
}
