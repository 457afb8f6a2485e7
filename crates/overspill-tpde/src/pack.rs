//! Packing: base and final in, patch out.
//!
//! One pass: each segment is read, hashed (base and final) and encoded on a worker; its payloads are appended in
//! order. A blob that grows past [`FLUSH_BYTES`] goes to the output file as it grows, behind a page left for the
//! header; tables stay in memory (a few bytes a chunk).

use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use overspill_codec::{
    Base, BaseKind, CodecChoice, EncodeOptions, EncodedSegment, PatchKind, encode_segment, segments,
};

use crate::buffer::Buffer;
use crate::checkpoint::{Checkpoint, Kind, Layout, Tensor};
use crate::container::{ALIGN_BYTES, ALIGNED_BLOB_BYTES, PatchHasher, PatchType, aligned, patch_header};
use crate::manifest::{Entry, FAST_ZSTD_LEVEL, Manifest, ZSTD_LEVEL};
use crate::output::OutputFile;
use crate::state::{SegmentHash, StateHasher, StateId, hash_segment};
use crate::work::{Meter, Options, Progress, Workers};
use crate::{Error, Result};

/// Blob bytes held back before they are hashed and written.
const FLUSH_BYTES: usize = 32 << 20;

/// How to pack.
#[derive(Debug, Clone, Copy, Default)]
pub struct PackOptions {
    /// Positions and final words instead of steps: larger, may be applied twice.
    pub absolute: bool,
    /// Which codec.
    pub codec: CodecChoice,
    /// Memory and threads.
    pub run: Options,
}

/// What was packed.
#[derive(Debug, Clone, Copy)]
pub struct PackReport {
    /// What the patch starts from.
    pub kind: PatchType,
    /// State that it makes.
    pub final_id: StateId,
    /// Bytes of the final tensors.
    pub raw_bytes: u64,
    /// Bytes of the patch, everything counted.
    pub packed_bytes: u64,
}

/// Packs `final_state` against `base` into the file `target`.
///
/// # Errors
/// Inputs that cannot be read, a quantized final, or a target that cannot be written. Nothing is left behind.
pub fn pack(
    base: Option<&Checkpoint<'_>>,
    final_state: &Checkpoint<'_>,
    target: &Path,
    options: &PackOptions,
    progress: Progress<'_>,
) -> Result<PackReport> {
    let writer = BlobWriter::new(Some(target));
    let (report, writer) = pack_sections(base, final_state, writer, options, progress)?;
    match writer.output {
        Some(output) => output.commit()?,
        None => {
            let output = OutputFile::create(target)?;
            write_all(&output, &writer.pieces)?;
            output.commit()?;
        }
    }
    Ok(report)
}

/// Packs into memory. The patch is the pieces one after the other: whoever needs it in one run of bytes copies it once.
///
/// # Errors
/// As [`pack`].
pub fn pack_to_pieces(
    base: Option<&Checkpoint<'_>>,
    final_state: &Checkpoint<'_>,
    options: &PackOptions,
    progress: Progress<'_>,
) -> Result<(PackReport, Vec<Vec<u8>>)> {
    let (report, writer) = pack_sections(base, final_state, BlobWriter::new(None), options, progress)?;
    Ok((report, writer.pieces))
}

/// One segment to encode, or (without a final) a segment of the base that is only hashed.
///
/// Tensors are (index in their checkpoint, description).
struct Job<'c> {
    final_tensor: Option<(usize, &'c Tensor)>,
    base_tensor: Option<(usize, &'c Tensor)>,
    first_word: u64,
    words: usize,
}

struct Done {
    encoded: Option<EncodedSegment>,
    final_hash: Option<SegmentHash>,
    base_hash: Option<SegmentHash>,
}

/// The tensor of `base` that `tensor` is coded against, and its index: same name and dtype (or quantized), as many words.
pub(crate) fn counterpart<'c>(
    base: Option<&'c Checkpoint<'_>>,
    tensor: &Tensor,
    kind: PatchKind,
) -> Option<(usize, &'c Tensor)> {
    let index = base?.index_of(&tensor.name)?;
    let found = &base?.tensors()[index];
    let fits = match found.kind {
        Kind::Plain(_) => found.kind == tensor.kind,
        Kind::Quantized(_) => kind == PatchKind::Relative && tensor.kind.can_be_quantized(),
    };
    (fits && found.words() == tensor.words()).then_some((index, found))
}

fn plan<'c>(
    base: Option<&'c Checkpoint<'_>>,
    final_state: &'c Checkpoint<'_>,
    kind: PatchKind,
) -> Vec<Job<'c>> {
    let mut jobs = Vec::new();
    for &i in final_state.by_name() {
        let tensor = &final_state.tensors()[i];
        let base_tensor = counterpart(base, tensor, kind);
        jobs.extend(segments(tensor.words()).map(|(first_word, words)| Job {
            final_tensor: Some((i, tensor)),
            base_tensor,
            first_word,
            words,
        }));
    }
    let alone = |(_, tensor): &(usize, &Tensor)| match final_state.get(&tensor.name) {
        Some(final_tensor) => counterpart(base, final_tensor, kind).is_none(),
        None => true,
    };
    let base_tensors = base.iter().flat_map(|base| base.tensors().iter().enumerate());
    for (i, tensor) in base_tensors.filter(alone) {
        jobs.extend(segments(tensor.words()).map(|(first_word, words)| Job {
            final_tensor: None,
            base_tensor: Some((i, tensor)),
            first_word,
            words,
        }));
    }
    jobs
}

fn pack_sections(
    base: Option<&Checkpoint<'_>>,
    final_state: &Checkpoint<'_>,
    mut writer: BlobWriter,
    options: &PackOptions,
    progress: Progress<'_>,
) -> Result<(PackReport, BlobWriter)> {
    if options.absolute && base.is_none() {
        return Err(Error::misuse("an absolute patch needs a base"));
    }
    if let Some(tensor) = final_state.tensors().iter().find(|t| matches!(t.kind, Kind::Quantized(_))) {
        let cause = format!("{}: only a base may be quantized", tensor.kind.name());
        return Err(Error::tensor(&final_state.path, &tensor.name, None, cause));
    }
    let kind = if options.absolute { PatchKind::Absolute } else { PatchKind::Relative };
    let largest = final_state.largest_segment_bytes().max(base.map_or(0, Checkpoint::largest_segment_bytes));
    let workers = Workers::new(&options.run, largest)?;
    let jobs = plan(base, final_state, kind);
    let meter = Meter::new(progress, jobs.iter().map(|job| job.raw_bytes() as u64).sum());

    let mut final_hashes = Hashes::new(final_state);
    let mut base_hashes = base.map(Hashes::new);
    let mut changed = vec![0u64; final_state.tensors().len()];
    let (mut index, mut heads) = (Vec::new(), Vec::new());
    workers.run(
        &jobs,
        Job::raw_bytes,
        |job| {
            let mut scratch = [workers.buffer(), workers.buffer()];
            let done = run_job(job, base, final_state, kind, options, &mut scratch)?;
            scratch.into_iter().for_each(|buffer| workers.give_back(buffer));
            meter.add(job.raw_bytes());
            Ok(done)
        },
        |job, done| {
            if let (Some(hashes), Some((i, _)), Some(hash)) =
                (&mut base_hashes, job.base_tensor, done.base_hash)
            {
                hashes.by_tensor[i].push(hash);
            }
            if let (Some((i, _)), Some(hash)) = (job.final_tensor, done.final_hash) {
                final_hashes.by_tensor[i].push(hash);
            }
            if let (Some((i, _)), Some(encoded)) = (job.final_tensor, done.encoded) {
                changed[i] += encoded.stats.changed;
                index.extend_from_slice(&encoded.index_bytes());
                heads.extend_from_slice(&encoded.head);
                writer.push(encoded.blob, &workers)?;
            }
            Ok(())
        },
    )?;

    let kind = match base_hashes {
        None => PatchType::Standalone,
        Some(hashes) if options.absolute => PatchType::Absolute(hashes.finish()),
        Some(hashes) => PatchType::Relative(hashes.finish()),
    };
    let final_id = final_hashes.finish();
    let level = if writer.used_bytes() < ALIGNED_BLOB_BYTES { ZSTD_LEVEL } else { FAST_ZSTD_LEVEL };
    let manifest = describe(base, final_state, kind.codec_kind(), &changed);
    let manifest = manifest.encode(&final_state.path, level)?;
    let packed_bytes = writer.finish(index, heads, manifest, kind, final_id, &workers)?;
    let raw_bytes = final_state.total_bytes();
    Ok((PackReport { kind, final_id, raw_bytes, packed_bytes }, writer))
}

impl Job<'_> {
    fn raw_bytes(&self) -> usize {
        let bytes = |(_, tensor): (usize, &Tensor)| tensor.kind.bytes_of(self.words as u64) as usize;
        self.final_tensor.or(self.base_tensor).map_or(0, bytes)
    }
}

fn run_job(
    job: &Job<'_>,
    base: Option<&Checkpoint<'_>>,
    final_state: &Checkpoint<'_>,
    kind: PatchKind,
    options: &PackOptions,
    [base_scratch, final_scratch]: &mut [Buffer; 2],
) -> Result<Done> {
    let old = match (base, job.base_tensor) {
        (Some(base), Some((_, tensor))) => {
            Some(tensor.read(base.store(tensor), job.first_word, job.words, base_scratch)?)
        }
        _ => None,
    };
    let base_hash = old.map(hash_segment);
    let Some((_, tensor)) = job.final_tensor else {
        return Ok(Done { encoded: None, final_hash: None, base_hash });
    };
    let new = tensor.read(final_state.store(tensor), job.first_word, job.words, final_scratch)?;
    let final_hash = if old == Some(new) { base_hash } else { Some(hash_segment(new)) };
    let Kind::Plain(dtype) = tensor.kind else {
        return Err(Error::tensor(&final_state.path, &tensor.name, None, "only a base may be quantized"));
    };
    let coded_against = match (old, job.base_tensor.map(|(_, t)| t.kind)) {
        (Some(bytes), Some(Kind::Plain(_))) => Base::Words(bytes),
        (Some(bytes), Some(Kind::Quantized(layout))) => Base::Quantized(layout, bytes),
        _ => Base::None,
    };
    let encode = EncodeOptions {
        kind,
        codec: options.codec,
        row_words: tensor.row_words(),
        first_word: job.first_word,
        ..EncodeOptions::default()
    };
    let encoded = encode_segment(coded_against, new, dtype, &encode)
        .map_err(|error| Error::tensor(&final_state.path, &tensor.name, None, error.to_string()))?;
    Ok(Done { encoded: Some(encoded), final_hash, base_hash })
}

/// The manifest of `final_state` coded against `base`, tensor by tensor with as many changed words.
pub(crate) fn describe(
    base: Option<&Checkpoint<'_>>,
    final_state: &Checkpoint<'_>,
    kind: PatchKind,
    changed: &[u64],
) -> Manifest {
    let entries = final_state.tensors().iter().zip(changed).map(|(tensor, &changed)| {
        let base = match counterpart(base, tensor, kind).map(|(_, t)| t.kind) {
            None => BaseKind::None,
            Some(Kind::Plain(_)) => BaseKind::Words,
            Some(Kind::Quantized(layout)) => BaseKind::Quantized(layout),
        };
        let changed = if base == BaseKind::None { 0 } else { changed };
        Entry { tensor: tensor.clone(), base, changed }
    });
    let Layout { files, index } = final_state.layout.clone();
    Manifest::new(Layout { files, index }, entries.collect())
}

/// Segment hashes of a checkpoint, by tensor, in order.
struct Hashes<'c, 'd> {
    checkpoint: &'c Checkpoint<'d>,
    by_tensor: Vec<Vec<SegmentHash>>,
}

impl<'c, 'd> Hashes<'c, 'd> {
    fn new(checkpoint: &'c Checkpoint<'d>) -> Self {
        Hashes { checkpoint, by_tensor: vec![Vec::new(); checkpoint.tensors().len()] }
    }

    fn finish(&self) -> StateId {
        let mut hasher = StateHasher::new();
        for &i in self.checkpoint.by_name() {
            hasher.add(&self.checkpoint.tensors()[i], &self.by_tensor[i]);
        }
        hasher.finish()
    }
}

/// Where the patch grows: in memory while small, else in the output file behind a page for the header.
struct BlobWriter {
    target: Option<PathBuf>,
    output: Option<OutputFile>,
    /// The blob's pieces that are not yet hashed; after [`BlobWriter::finish`] without an output, the whole patch.
    pieces: Vec<Vec<u8>>,
    pieces_bytes: usize,
    written_bytes: u64,
    hasher: PatchHasher,
}

impl BlobWriter {
    fn new(target: Option<&Path>) -> Self {
        BlobWriter {
            target: target.map(Path::to_owned),
            output: None,
            pieces: Vec::new(),
            pieces_bytes: 0,
            written_bytes: 0,
            hasher: PatchHasher::new(),
        }
    }

    /// Bytes of the blob so far.
    fn used_bytes(&self) -> u64 {
        self.written_bytes + self.pieces_bytes as u64
    }

    fn push(&mut self, payloads: Vec<u8>, workers: &Workers) -> Result<()> {
        self.pieces_bytes += payloads.len();
        self.pieces.push(payloads);
        let Some(target) = self.target.as_ref().filter(|_| self.pieces_bytes >= FLUSH_BYTES) else {
            return Ok(());
        };
        if self.output.is_none() {
            let output = OutputFile::create(target)?;
            let start = SeekFrom::Start(ALIGN_BYTES as u64);
            output.file().seek(start).map_err(Error::io(target, "write"))?;
            self.output = Some(output);
        }
        self.flush(workers)
    }

    /// Hashes the pieces and, where there is an output, writes them.
    fn flush(&mut self, workers: &Workers) -> Result<()> {
        workers.install(|| self.pieces.iter().for_each(|piece| self.hasher.add_blob(piece)));
        if let Some(output) = &self.output {
            write_all(output, &self.pieces)?;
            self.pieces.clear();
        }
        self.written_bytes += self.pieces_bytes as u64;
        self.pieces_bytes = 0;
        Ok(())
    }

    /// Pads the blob, appends the tables, puts the header in front. Returns the patch's size.
    fn finish(
        &mut self,
        index: Vec<u8>,
        heads: Vec<u8>,
        manifest: Vec<u8>,
        kind: PatchType,
        final_id: StateId,
        workers: &Workers,
    ) -> Result<u64> {
        let used_bytes = self.used_bytes();
        let (align_bytes, blob_bytes) = aligned(used_bytes);
        let padding = (blob_bytes - used_bytes) as usize;
        self.pieces.push(vec![0; padding]);
        self.pieces_bytes += padding;
        self.flush(workers)?;
        let hasher = std::mem::replace(&mut self.hasher, PatchHasher::new());
        let hash = hasher.finish(&index, &heads, &manifest, kind, final_id);
        let tables = [index.len() as u64, heads.len() as u64, manifest.len() as u64];
        let section_bytes = [blob_bytes, tables[0], tables[1], tables[2]];
        let header = patch_header(kind, final_id, hash, section_bytes, align_bytes);
        let total_bytes = header.len() as u64 + section_bytes.iter().sum::<u64>();
        let tables = [index, heads, manifest];
        match &self.output {
            Some(output) => {
                write_all(output, &tables)?;
                // A blob that was flushed is large: its header fills the page in front exactly.
                let start = output.file().seek(SeekFrom::Start(0));
                start
                    .and_then(|_| output.file().write_all(&header))
                    .map_err(Error::io(output.path(), "write"))?;
            }
            None => {
                self.pieces.insert(0, header);
                self.pieces.extend(tables);
            }
        }
        Ok(total_bytes)
    }
}

fn write_all(output: &OutputFile, pieces: &[Vec<u8>]) -> Result<()> {
    let mut file = output.file();
    pieces.iter().try_for_each(|piece| file.write_all(piece)).map_err(Error::io(output.path(), "write"))
}
