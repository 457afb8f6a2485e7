//! Segments: the unit that is encoded, and the view that decodes one.
//!
//! A [`SegmentView`] borrows the encoded bytes. Decoding is by chunk and in place: the caller's buffer holds the
//! base's words and afterwards the final ones. Chunks are independent, so disjoint buffers may be decoded from
//! many threads at once; nothing is shared but the read-only view.

use std::ops::Range;

use crate::chunk::{ChunkMode, apply_payload};
use crate::dense;
use crate::head::Head;
use crate::quant::{self, Prediction, QuantContext};
use crate::record::{ChunkRecord, parse_records, payload_check, segment_seed};
use crate::words::Word;
use crate::{CodecError, Dtype, RECORD_BYTES};

/// Most words in a segment. Longer tensors are cut into segments of exactly this many, the last one shorter.
pub const SEGMENT_WORDS: usize = 1 << 24;

/// What a relative patch refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchKind {
    /// Coded given the base's bits: smallest, must be applied to exactly that base.
    Relative,
    /// Positions and final words only: may be applied twice, and to weights held in another layout.
    Absolute,
}

/// Block layout of a quantized base, as GGUF stores it: blocks of 32 weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantLayout {
    /// f16 scale d, 16 bytes of 4-bit q: weight = d * (q - 8). 18 bytes.
    Q4_0,
    /// f16 scale d, f16 minimum m, 16 bytes of 4-bit q: weight = d * q + m. 20 bytes.
    Q4_1,
    /// f16 scale d, 32 signed bytes q: weight = d * q. 34 bytes.
    Q8_0,
}

impl QuantLayout {
    /// Weights in a block.
    pub const BLOCK_WORDS: usize = 32;

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            QuantLayout::Q4_0 => 18,
            QuantLayout::Q4_1 => 20,
            QuantLayout::Q8_0 => 34,
        }
    }
}

/// The base of a segment (or of one chunk of it): the words that the final ones are coded against.
#[derive(Debug, Clone, Copy)]
pub enum Base<'a> {
    /// No base: the final words stand alone.
    None,
    /// Words of the same dtype, as many as the final has.
    Words(&'a [u8]),
    /// Blocks of 32 quantized weights, row-major, for as many words as the final has (a multiple of 32).
    Quantized(QuantLayout, &'a [u8]),
}

/// What kind of base a segment was encoded against; the container stores it per tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseKind {
    /// [`Base::None`]
    None,
    /// [`Base::Words`]
    Words,
    /// [`Base::Quantized`]
    Quantized(QuantLayout),
}

impl<'a> Base<'a> {
    /// What kind of base this is, without its bytes.
    pub fn kind(self) -> BaseKind {
        match self {
            Base::None => BaseKind::None,
            Base::Words(_) => BaseKind::Words,
            Base::Quantized(layout, _) => BaseKind::Quantized(layout),
        }
    }

    /// The part of the base that covers `words`, whose start is a multiple of 32.
    pub fn slice(self, words: Range<usize>, word_bytes: usize) -> Base<'a> {
        match self {
            Base::None => Base::None,
            Base::Words(bytes) => Base::Words(&bytes[words.start * word_bytes..words.end * word_bytes]),
            Base::Quantized(layout, blocks) => {
                let block = QuantLayout::BLOCK_WORDS;
                let range =
                    words.start / block * layout.block_bytes()..words.end / block * layout.block_bytes();
                Base::Quantized(layout, &blocks[range])
            }
        }
    }

    pub(crate) fn check_len(self, words: usize, word_bytes: usize) -> Result<(), CodecError> {
        let (expected_bytes, found_bytes) = match self {
            Base::None => return Ok(()),
            Base::Words(bytes) => (words * word_bytes, bytes.len()),
            Base::Quantized(layout, blocks) => {
                if !words.is_multiple_of(QuantLayout::BLOCK_WORDS) {
                    return Err(CodecError::Base { why: "a quantized base needs a multiple of 32 weights" });
                }
                (words / QuantLayout::BLOCK_WORDS * layout.block_bytes(), blocks.len())
            }
        };
        check_len("base", expected_bytes, found_bytes)
    }
}

pub(crate) fn check_len(
    what: &'static str,
    expected_bytes: usize,
    found_bytes: usize,
) -> Result<(), CodecError> {
    if expected_bytes == found_bytes {
        return Ok(());
    }
    Err(CodecError::Length { what, expected_bytes: expected_bytes as u64, found_bytes: found_bytes as u64 })
}

/// What a decoder must know about a segment besides its encoded bytes; the container stores it per tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentSpec {
    /// Element type.
    pub dtype: Dtype,
    /// Words in this segment, at most [`SEGMENT_WORDS`].
    pub words: usize,
    /// Words of a row (the tensor's last dimension), 0 if unknown. Rows that did not change are skipped.
    pub row_words: u64,
    /// Index of this segment's first word within the tensor.
    pub first_word: u64,
    /// What the segment was encoded against.
    pub base: BaseKind,
    /// Relative or absolute.
    pub kind: PatchKind,
}

/// Cut a tensor of `words` words into segments: (first word, words) of each.
pub fn segments(words: u64) -> impl Iterator<Item = (u64, usize)> {
    let step = SEGMENT_WORDS as u64;
    (0..words.div_ceil(step)).map(move |i| (i * step, (words - i * step).min(step) as usize))
}

/// A parsed segment: head, records and blob, all checked against each other, payloads not yet read.
#[derive(Debug)]
pub struct SegmentView<'a> {
    spec: SegmentSpec,
    head: Head,
    records: Vec<ChunkRecord>,
    blob: &'a [u8],
    seed: u64,
}

impl<'a> SegmentView<'a> {
    /// Parse one segment off the front of the three sections and move each slice past what was used. After the
    /// last segment the caller must find all three empty: bytes left over mean a damaged head.
    ///
    /// Costs memory in proportion to the records and tables present, never to what they declare.
    pub fn take(
        spec: SegmentSpec,
        heads: &mut &'a [u8],
        index: &mut &'a [u8],
        blob: &mut &'a [u8],
    ) -> Result<Self, CodecError> {
        if spec.words > SEGMENT_WORDS {
            return Err(CodecError::Limit {
                what: "words in a segment",
                found: spec.words as u64,
                limit: SEGMENT_WORDS as u64,
            });
        }
        let all_heads = *heads;
        let head = Head::take(heads, &spec)?;
        let seed = segment_seed(&all_heads[..all_heads.len() - heads.len()], &spec);
        let chunks = head.chunk_count(spec.words);
        let records = parse_records(index, chunks)?;
        let blob_bytes = records.last().map_or(0, |record| record.end_bytes as usize);
        let own_blob =
            blob.get(..blob_bytes).ok_or(CodecError::malformed("blob", "shorter than its index says"))?;
        *index = &index[chunks * RECORD_BYTES..];
        *blob = &blob[blob_bytes..];
        Ok(SegmentView { spec, head, records, blob: own_blob, seed })
    }

    /// The spec it was parsed with.
    pub fn spec(&self) -> SegmentSpec {
        self.spec
    }

    /// Number of chunks. 0 when no word of the segment differs from the base (or, without one, from zero).
    pub fn chunks(&self) -> usize {
        self.records.len()
    }

    /// Words of a chunk, counted within the segment. Starts are multiples of 32.
    pub fn chunk_words(&self, chunk: usize) -> Range<usize> {
        let start = chunk << self.head.chunk_log2;
        start..(start + (1 << self.head.chunk_log2)).min(self.spec.words)
    }

    /// Encoded bytes of a chunk, record not counted.
    pub fn payload(&self, chunk: usize) -> &'a [u8] {
        let start = if chunk == 0 { 0 } else { self.records[chunk - 1].end_bytes as usize };
        &self.blob[start..self.records[chunk].end_bytes as usize]
    }

    /// Encoded bytes of the segment's blob.
    pub fn blob_bytes(&self) -> usize {
        self.blob.len()
    }

    /// Mode of a chunk.
    pub fn mode(&self, chunk: usize) -> Result<ChunkMode, CodecError> {
        ChunkMode::of(self.payload(chunk))
    }

    /// Compare a chunk's payload with its record's check.
    pub fn check_chunk(&self, chunk: usize) -> Result<(), CodecError> {
        let (expected, found) =
            (self.records[chunk].check, payload_check(self.payload(chunk), chunk, self.seed));
        if expected == found { Ok(()) } else { Err(CodecError::Check { chunk, expected, found }) }
    }

    /// Turn the base's words of one chunk into the final ones, in place.
    ///
    /// `words` holds exactly the chunk's words; without a base their content does not matter. The payload's
    /// check is compared before the first write. An error after that leaves `words` unspecified: it can only
    /// come from a base that is not the one the patch was made for, or from bytes made to pass the check.
    pub fn apply_chunk(&self, chunk: usize, words: &mut [u8]) -> Result<(), CodecError> {
        self.check_len(chunk, words.len())?;
        if matches!(self.spec.base, BaseKind::Quantized(_)) {
            return Err(CodecError::Base { why: "a quantized base cannot be patched in place" });
        }
        self.check_chunk(chunk)?;
        let writes_all = matches!(self.mode(chunk)?, ChunkMode::Raw | ChunkMode::Planes);
        if self.spec.base == BaseKind::None && !writes_all {
            words.fill(0);
        }
        apply_payload(self.payload(chunk), &self.head, &self.spec, self.chunk_words(chunk).start, words)
    }

    /// Decode one chunk from `base` (that chunk's part of the base) into `out`.
    pub fn decode_chunk(&self, chunk: usize, base: Base<'_>, out: &mut [u8]) -> Result<(), CodecError> {
        if base.kind() != self.spec.base {
            return Err(CodecError::Base {
                why: "not the kind of base that the segment was encoded against",
            });
        }
        self.check_len(chunk, out.len())?;
        base.check_len(self.chunk_words(chunk).len(), self.spec.dtype.word_bytes())?;
        let Base::Quantized(layout, blocks) = base else {
            if let Base::Words(bytes) = base {
                out.copy_from_slice(bytes);
            }
            return self.apply_chunk(chunk, out);
        };
        quant::check_dtype(self.spec.dtype)?;
        self.check_chunk(chunk)?;
        match self.spec.dtype.word_bytes() {
            2 => self.decode_quantized::<u16>(chunk, layout, blocks, out),
            _ => self.decode_quantized::<u32>(chunk, layout, blocks, out),
        }
    }

    fn decode_quantized<W: Word>(
        &self,
        chunk: usize,
        layout: QuantLayout,
        blocks: &[u8],
        out: &mut [u8],
    ) -> Result<(), CodecError> {
        let prediction = Prediction::<W>::new(layout, blocks, self.spec.dtype);
        out.copy_from_slice(&prediction.words);
        let (payload, first_word) = (self.payload(chunk), self.chunk_words(chunk).start);
        if let (ChunkMode::Dense, Some(tables)) = (ChunkMode::of(payload)?, &self.head.dense) {
            let context = QuantContext { prediction: &prediction, class_of_key: &tables.class_of_key };
            return dense::apply::<W>(&payload[1..], tables, &context, out);
        }
        apply_payload(payload, &self.head, &self.spec, first_word, out)
    }

    /// Turn the base's words of the whole segment into the final ones, in place, chunk after chunk.
    pub fn apply(&self, words: &mut [u8]) -> Result<(), CodecError> {
        self.check_segment_len(words.len())?;
        if matches!(self.spec.base, BaseKind::Quantized(_)) {
            return Err(CodecError::Base { why: "a quantized base cannot be patched in place" });
        }
        if self.chunks() == 0 && self.spec.base == BaseKind::None {
            words.fill(0);
        }
        for chunk in 0..self.chunks() {
            self.apply_chunk(chunk, &mut words[self.byte_range(chunk)])?;
        }
        Ok(())
    }

    /// Decode the whole segment from `base` into `out`, chunk after chunk.
    pub fn decode(&self, base: Base<'_>, out: &mut [u8]) -> Result<(), CodecError> {
        self.check_segment_len(out.len())?;
        base.check_len(self.spec.words, self.spec.dtype.word_bytes())?;
        if self.chunks() == 0 {
            match base {
                Base::None => out.fill(0),
                Base::Words(bytes) => out.copy_from_slice(bytes),
                Base::Quantized(layout, blocks) => {
                    out.copy_from_slice(&quant::dequantize(layout, blocks, self.spec.dtype)?);
                }
            }
        }
        for chunk in 0..self.chunks() {
            let part = base.slice(self.chunk_words(chunk), self.spec.dtype.word_bytes());
            self.decode_chunk(chunk, part, &mut out[self.byte_range(chunk)])?;
        }
        Ok(())
    }

    fn byte_range(&self, chunk: usize) -> Range<usize> {
        let (words, bytes) = (self.chunk_words(chunk), self.spec.dtype.word_bytes());
        words.start * bytes..words.end * bytes
    }

    fn check_len(&self, chunk: usize, found_bytes: usize) -> Result<(), CodecError> {
        check_len("chunk buffer", self.byte_range(chunk).len(), found_bytes)
    }

    fn check_segment_len(&self, found_bytes: usize) -> Result<(), CodecError> {
        check_len("segment buffer", self.spec.words * self.spec.dtype.word_bytes(), found_bytes)
    }
}

/// Decode `blob` as the one payload of a segment of one chunk, without comparing any check: for fuzzers and tests
/// that look at what a decoder does with bytes no encoder wrote.
#[doc(hidden)]
pub fn decode_unchecked(
    spec: SegmentSpec,
    base: Base<'_>,
    mut head: &[u8],
    blob: &[u8],
    out: &mut [u8],
) -> Result<(), CodecError> {
    let head_bytes = head;
    let seed = segment_seed(head_bytes, &spec);
    let check = payload_check(blob, 0, seed);
    let record = ChunkRecord { end_bytes: blob.len() as u32, check };
    let parsed = Head::take(&mut head, &spec)?;
    if !head.is_empty() || parsed.chunk_count(spec.words) != 1 {
        return Err(CodecError::malformed("head", "not one of a single chunk"));
    }
    SegmentView { spec, head: parsed, records: vec![record], blob, seed }.decode(base, out)
}
