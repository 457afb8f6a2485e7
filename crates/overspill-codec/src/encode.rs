//! The encoder's front door: one segment in, head, records and blob out.

use crate::chunk::ChunkMode;
use crate::chunk::KeyContext;
use crate::classes::{ClassKind, ClassPlan};
use crate::head::{Head, HeadPlan};
use crate::quant::{self, Prediction, QuantContext};
use crate::record::{payload_check, segment_seed};
use crate::segment::{SEGMENT_WORDS, SegmentSpec, check_len};
use crate::sparse::Changes;
use crate::survey::{Survey, is_dense};
use crate::words::Word;
use crate::{Base, ChunkRecord, CodecError, Dtype, PatchKind};
use crate::{dense, elias, flags, groups, planes, sparse};

/// Words in a chunk when `elias-zstd` is asked for, as a power of two.
const ELIAS_CHUNK_LOG2: u32 = 16;

/// Words that are compressed to find out whether Zstandard is worth trying.
pub const ZSTD_PROBE_WORDS: usize = 4096;

/// One run in so many must occur again among them.
const REPEATS_WORTHWHILE: usize = 128;

/// Which codec the encoder may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CodecChoice {
    /// The cheapest mode of each chunk.
    #[default]
    Auto,
    /// `elias-zstd` for every chunk that changed: the first design.
    EliasZstd,
    /// Modes F and G for steps from words; else the cheapest. What a GPU applies fastest: a few percent larger, and slower
    /// on a CPU.
    Gpu,
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
    match base {
        Base::Words(old) => encode_against::<W>(Some(old), None, new, spec, options),
        Base::None => encode_against::<W>(None, None, new, spec, options),
        Base::Quantized(layout, blocks) => {
            quant::check_dtype(spec.dtype)?;
            let prediction = Prediction::new(layout, blocks, spec.dtype);
            encode_against::<W>(Some(&prediction.words), Some(&prediction), new, spec, options)
        }
    }
}

/// Encode against the words that the decoder starts from (`None`: zeros); `prediction` if they come from quantized
/// blocks.
fn encode_against<W: Word>(
    old: Option<&[u8]>,
    prediction: Option<&Prediction<W>>,
    new: &[u8],
    spec: &SegmentSpec,
    options: &EncodeOptions,
) -> Result<EncodedSegment, CodecError> {
    let stats = SegmentStats { words: spec.words as u64, ..SegmentStats::default() };
    if old.map_or_else(|| new.iter().all(|&byte| byte == 0), |old| old == new) {
        return Ok(EncodedSegment { head: vec![0], index: vec![], blob: vec![], stats });
    }
    let survey = Survey::<W>::of(old, prediction, new, spec);
    let mut plan = match options.codec {
        CodecChoice::Auto => survey.plan(new, spec),
        CodecChoice::Gpu => survey.plan_gpu(new, spec),
        CodecChoice::EliasZstd => HeadPlan { chunk_log2: ELIAS_CHUNK_LOG2, ..HeadPlan::default() },
    };
    let chunk_bytes = W::BYTES << plan.chunk_log2;
    let zeros = vec![0; if old.is_none() { chunk_bytes.min(new.len()) } else { 0 }];
    let old_of = |chunk: usize, bytes: usize| match old {
        Some(old) => &old[chunk * chunk_bytes..][..bytes],
        None => &zeros[..bytes],
    };
    let chunks = || new.chunks(chunk_bytes).enumerate();
    let pairs = || chunks().map(|(chunk, new)| (chunk, (old_of(chunk, new.len()), new)));
    let mut changes = Vec::new();
    let is_flags = |class: &ClassPlan| matches!(class.kind, ClassKind::Flags(_));
    let sparse = plan.sparse.as_mut().filter(|(_, classes)| !classes.iter().any(is_flags));
    if let Some((row_rate, classes)) = sparse {
        for (chunk, (old, new)) in pairs() {
            let changed = survey.changed_in(chunk, plan.chunk_log2);
            if changed > 0 && !is_dense(changed, new.len() / W::BYTES) {
                let first_word = chunk << plan.chunk_log2;
                let found = survey.changes_from(chunk, plan.chunk_log2);
                changes.push(sparse::gather(old, found, classes, row_rate.is_some(), spec, first_word));
            }
        }
        sparse::find_clusters(classes, &changes);
    }
    let head_bytes = plan.to_bytes();
    let head = Head::take(&mut head_bytes.as_slice(), spec)?;
    let seed = segment_seed(&head_bytes, spec);
    let mut encoded = EncodedSegment { head: head_bytes, index: vec![], blob: vec![], stats };
    let changes = changes.iter();
    let scratch = planes::Scratch::default();
    let mut encoder =
        ChunkEncoder { head: &head, spec, options, prediction, changes, try_zstd: None, scratch };
    for (chunk, (old, new)) in pairs() {
        let changed = survey.changed_in(chunk, head.chunk_log2);
        let start = encoded.blob.len();
        if changed > 0 {
            encoder.encode(chunk << head.chunk_log2, old, new, changed, &mut encoded.blob)?;
        }
        let payload = &encoded.blob[start..];
        let mode = &mut encoded.stats.modes[ChunkMode::of(payload)? as usize];
        mode.chunks += 1;
        mode.bytes += payload.len() as u64;
        encoded.stats.changed += changed;
        let check = payload_check(payload, chunk, seed);
        encoded.index.push(ChunkRecord { end_bytes: encoded.blob.len() as u32, check });
    }
    Ok(encoded)
}

/// Encodes the chunks of one segment, cheapest mode each.
struct ChunkEncoder<'a, W> {
    head: &'a Head,
    spec: &'a SegmentSpec,
    options: &'a EncodeOptions,
    prediction: Option<&'a Prediction<W>>,
    /// Of the sparse chunks, in order.
    changes: std::slice::Iter<'a, Changes<W>>,
    /// Whether a probe found that Zstandard beats byte planes here; `None` before the first probe.
    try_zstd: Option<bool>,
    scratch: planes::Scratch,
}

impl<W: Word> ChunkEncoder<'_, W> {
    /// Append the payload of one chunk with `changed` > 0 changed words.
    fn encode(
        &mut self,
        first_word: usize,
        old: &[u8],
        new: &[u8],
        changed: u64,
        out: &mut Vec<u8>,
    ) -> Result<(), CodecError> {
        let start = out.len();
        let is_sparse = !is_dense(changed, new.len() / W::BYTES);
        let is_float = self.spec.dtype.float_layout().is_some();
        match (&self.head.sparse, &self.head.dense, &self.head.planes) {
            (Some(tables), _, _) if tables.flags => {
                out.push(ChunkMode::Flags as u8);
                flags::encode::<W>(old, new, tables, self.spec, out);
            }
            (Some(tables), _, _) if is_sparse => {
                out.push(ChunkMode::Sparse as u8);
                let changes = self.changes.next().expect("gathered for every sparse chunk");
                sparse::encode(changes, tables, self.spec, out);
            }
            (_, Some(tables), _) if self.options.codec == CodecChoice::Gpu && self.prediction.is_none() => {
                out.push(ChunkMode::Groups as u8);
                let context = KeyContext::new(self.spec, tables);
                groups::encode::<W>(old, new, &tables.classes, &context, out);
            }
            (_, Some(tables), _) => {
                out.push(ChunkMode::Dense as u8);
                match self.prediction {
                    None => {
                        let context = KeyContext::new(self.spec, tables);
                        dense::encode::<W>(old, new, &tables.classes, &context, 0, out);
                    }
                    Some(prediction) => {
                        let context = QuantContext { prediction, class_of_key: &tables.class_of_key };
                        dense::encode::<W>(old, new, &tables.classes, &context, first_word, out);
                    }
                }
            }
            (_, _, Some(tables)) => {
                out.push(ChunkMode::Planes as u8);
                planes::encode::<W>(new, tables, is_float, &mut self.scratch, out);
                if self.zstd_may_win(old, new, out.len() - start)? {
                    let coded = out.split_off(start);
                    self.elias(old, new, out)?;
                    if coded.len() <= out.len() - start {
                        out.truncate(start);
                        out.extend_from_slice(&coded);
                    }
                }
            }
            _ => self.elias(old, new, out)?,
        }
        if out.len() - start > new.len() {
            out.truncate(start);
            out.push(ChunkMode::Raw as u8);
            out.extend_from_slice(new);
        }
        Ok(())
    }

    fn elias(&self, old: &[u8], new: &[u8], out: &mut Vec<u8>) -> Result<(), CodecError> {
        out.push(ChunkMode::EliasZstd as u8);
        elias::encode::<W>(old, new, self.spec, self.options.zstd_level, out)
    }

    /// Compress the first words of the segment's first such chunk and compare with the planes' share of them.
    fn zstd_may_win(&mut self, old: &[u8], new: &[u8], planes_bytes: usize) -> Result<bool, CodecError> {
        if let Some(known) = self.try_zstd {
            return Ok(known);
        }
        let probe = ZSTD_PROBE_WORDS * W::BYTES;
        if new.len() <= probe {
            // Nothing to save by a probe; and the lanes of the planes may cost a short chunk more than they gain.
            return Ok(true);
        }
        let wins = repeats_itself::<W>(&new[..probe]) && {
            let mut out = Vec::new();
            self.elias(&old[..probe], &new[..probe], &mut out)?;
            out.len() * new.len() < planes_bytes * probe
        };
        self.try_zstd = Some(wins);
        Ok(wins)
    }
}

/// Whether Zstandard may be tried on a segment whose first chunk that is not all zeros starts with these words,
/// [`ZSTD_PROBE_WORDS`] of them.
pub(crate) fn may_try_zstd(words: &[u8], word_bytes: usize) -> bool {
    match word_bytes {
        1 => repeats_itself::<u8>(words),
        2 => repeats_itself::<u16>(words),
        4 => repeats_itself::<u32>(words),
        _ => repeats_itself::<u64>(words),
    }
}

/// Whether enough runs of 4 bytes or more occur again for a compressor that refers back to them to be worth trying:
/// without them it codes the bytes of all planes alike, which costs more than one table for each.
fn repeats_itself<W: Word>(words: &[u8]) -> bool {
    const SLOTS_LOG2: u32 = 13;
    const RUN_MASK: u64 = (1 << 48) - 1;
    const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut seen = vec![0u64; 1 << SLOTS_LOG2];
    let (mut run, mut again) = (0u64, 0);
    for word in words.chunks_exact(W::BYTES) {
        let word = W::load(word).to_u64();
        run = if W::BITS < 32 { (run << W::BITS | word) & RUN_MASK } else { word };
        // Not 0, which is a slot that was not used.
        let key = run.wrapping_add(1);
        let slot = &mut seen[(run.wrapping_mul(MULTIPLIER) >> (u64::BITS - SLOTS_LOG2)) as usize];
        again += usize::from(*slot == key);
        *slot = key;
    }
    again * REPEATS_WORTHWHILE > words.len() / W::BYTES
}
