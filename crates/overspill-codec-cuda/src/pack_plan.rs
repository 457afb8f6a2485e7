//! What the encoders' kernels are given and what is made of what they say: pure bookkeeping, the same for a device
//! and for the tests' emulation.

use std::ops::Range;

use overspill_codec::{
    BaseKind, COUNT_GRAIN_WORDS, ChunkRecord, FlatSegment, FlatTables, PatchKind, PlaneCounts, RECORD_BYTES,
    SegmentCounts, SegmentSpec, ZSTD_PROBE_WORDS, flags_head, key_field, planes_head, sampled_one_in,
    sparse_head,
};

use crate::decoder::Result;
use crate::plan::{Job, SPARSE_THREADS, THREADS, put_segment};

/// Threads of a block of the kernels that count, list, clear and gather.
pub const COUNT_THREADS: u32 = 256;
/// 32-bit words in which a segment is counted.
pub const CELLS: usize = 65536 + 256 + 4;
/// Different (key, symbol) of a segment that are listed; segments with more are the host's.
pub const LISTED: usize = 1024;
/// 32-bit words of a segment's list.
pub const LIST_WORDS: usize = 4 + 256 + 2 * LISTED;
/// Dynamic shared memory of a block that packs a chunk: three fit a multiprocessor of 228 KiB.
pub const PACK_BYTES: u32 = 46 << 10;
/// 32-bit words that a chunk's outcome takes: place in the scratch memory, bytes, check.
pub const OUTCOME_WORDS: usize = 3;
/// What of an outcome's second word is the payload's bytes.
const PAYLOAD_MASK: u32 = (1 << 30) - 1;

/// In which mode kernels pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackMode {
    /// Mode S: the smallest.
    Sparse,
    /// Mode F: packed and applied sooner.
    Flags,
}

impl PackMode {
    /// Chunks that a block packs.
    pub fn chunks_a_block(self) -> u32 {
        match self {
            PackMode::Sparse => 1,
            PackMode::Flags => THREADS / 32,
        }
    }

    /// Threads of a block.
    pub fn threads(self) -> u32 {
        match self {
            PackMode::Sparse => SPARSE_THREADS,
            PackMode::Flags => THREADS,
        }
    }
}

/// A segment to pack: where its base and its final words lie.
#[derive(Debug, Clone, Copy)]
pub struct PackJob {
    /// What it is.
    pub spec: SegmentSpec,
    /// Address of the base's first word.
    pub base: u64,
    /// Address of the first final word.
    pub last: u64,
}

impl PackJob {
    /// Whether kernels can pack its steps: from words of at most 32 bits.
    pub fn is_for_kernels(&self) -> bool {
        let SegmentSpec { base, kind, words, dtype, .. } = self.spec;
        base == BaseKind::Words && kind == PatchKind::Relative && words > 0 && dtype.word_bytes() <= 4
    }

    /// Whether kernels can pack its planes: of words of at most 32 bits without a base.
    pub fn is_for_planes(&self) -> bool {
        self.spec.base == BaseKind::None && self.spec.words > 0 && self.spec.dtype.word_bytes() <= 4
    }

    fn grains(&self) -> usize {
        self.spec.words.div_ceil(COUNT_GRAIN_WORDS)
    }
}

/// The first look at segments whose words are equally wide.
#[derive(Debug, Default)]
pub struct CountPlan {
    /// The kernels' list.
    pub segments: Vec<u8>,
    /// First grain of each segment; the last entry is how many there are.
    pub grains: Vec<usize>,
}

impl CountPlan {
    /// Plans `jobs`.
    pub fn new(jobs: &[PackJob]) -> Self {
        let mut plan = CountPlan { segments: Vec::new(), grains: vec![0] };
        for job in jobs {
            let at = plan.grains.last().copied().unwrap_or_default();
            let (key_shift, key_mask) = key_field(&job.spec);
            // Shorter rows would not fit into the kernel's bits of 2^15 words; they are hardly ever context.
            let row_words = job.spec.row_words;
            let rows = if row_words >= 64 && row_words <= job.spec.words as u64 { row_words } else { 0 };
            let flat =
                FlatSegment { key_shift, key_mask, rows: rows != 0, ..FlatSegment::unparsed(job.spec) };
            let places = Job { segment: &flat, base: job.base, out: job.last, blob: 0, index: 0 };
            let one_in = sampled_one_in(job.spec.words) as u32;
            put_segment(&mut plan.segments, &places, at as u32, 0, false, one_in);
            plan.grains.push(at + job.grains());
        }
        plan
    }

    /// Grains of all segments.
    pub fn grain_count(&self) -> usize {
        self.grains.last().copied().unwrap_or_default()
    }

    /// The head of segment `number`: of no chunks if nothing changed, `None` if it is the host's.
    pub fn head(
        &self,
        number: usize,
        job: &PackJob,
        mode: PackMode,
        list: &[u32],
        grains: &[u32],
    ) -> Option<Vec<u8>> {
        let grains = &grains[self.grains[number]..self.grains[number + 1]];
        if grains.iter().all(|&changed| changed == 0) {
            return Some(vec![0]);
        }
        let found = list[0] as usize;
        if found > LISTED {
            return None;
        }
        let one_in = sampled_one_in(job.spec.words) as u64;
        let mut population = [0; 256];
        for (to, &from) in population.iter_mut().zip(&list[4..260]) {
            *to = u64::from(from) * one_in;
        }
        if key_field(&job.spec).1 == 0 {
            population[0] = job.spec.words as u64;
        }
        let (cells, _) = list[260..260 + 2 * found].as_chunks::<2>();
        let values = cells.iter().map(|&[cell, count]| ((cell >> 8) as u8, cell as u8, count)).collect();
        let raw_bits = u64::from(list[2]) << 32 | u64::from(list[1]);
        let rows_changed = u64::from(list[3]);
        let counts = SegmentCounts { grains: grains.to_vec(), population, values, raw_bits, rows_changed };
        match mode {
            PackMode::Sparse => sparse_head(&counts, &job.spec),
            PackMode::Flags => flags_head(&counts, &job.spec),
        }
    }
}

/// 32-bit words in which the planes of a segment of words of so many bytes are counted: all of them, then the sample.
pub fn plane_cells(word_bytes: usize) -> usize {
    2 * 256 * word_bytes
}

/// Bytes of the words that the host looks at of a segment without a base.
pub fn probe_bytes(word_bytes: usize) -> usize {
    ZSTD_PROBE_WORDS * word_bytes
}

/// The head of a segment without a base: of no chunks if all words are zeros, `None` if it is the host's.
pub fn head_of_planes(job: &PackJob, grains: &[u32], cells: &[u32], probe: &[u8]) -> Option<Vec<u8>> {
    if grains.iter().all(|&changed| changed == 0) {
        return Some(vec![0]);
    }
    let (bytes, sample) = cells.split_at(cells.len() / 2);
    planes_head(&PlaneCounts { grains, bytes, sample, probe }, &job.spec)
}

/// The chunks to pack of segments whose heads are known.
#[derive(Debug)]
pub struct ChunkPlan {
    chunks_a_block: u32,
    /// The kernels' list.
    pub segments: Vec<u8>,
    /// How many segments are in it.
    pub count: u32,
    /// Blocks that pack.
    pub blocks: u32,
    /// Their tables.
    pub tables: FlatTables,
    /// First chunk of each segment, also of those that are not in the list; the last entry is how many there are.
    pub chunks: Vec<u32>,
}

impl ChunkPlan {
    /// No segments yet; a block packs so many chunks.
    pub fn new(chunks_a_block: u32) -> Self {
        let (segments, tables) = (Vec::new(), FlatTables::new());
        ChunkPlan { chunks_a_block, segments, count: 0, blocks: 0, tables, chunks: vec![0] }
    }

    /// Plans more segments, those that have a head with chunks; `grains` is where the kernels counted their changes.
    ///
    /// # Errors
    /// None that heads of [`CountPlan::head`] can cause.
    pub fn add(
        &mut self,
        jobs: &[PackJob],
        heads: &[Option<Vec<u8>>],
        counts: &CountPlan,
        grains: u64,
    ) -> Result<()> {
        for (number, (job, head)) in jobs.iter().zip(heads).enumerate() {
            let at = self.chunk_count();
            let Some(head) = head.as_ref().filter(|head| head[0] != 0) else {
                self.chunks.push(at);
                continue;
            };
            let records = job.spec.words.div_ceil(1 << (head[0] & 31)) * RECORD_BYTES;
            let flat = self.tables.take(job.spec, &mut &head[..], &mut &vec![0; records][..])?;
            let blob = grains + 4 * counts.grains[number] as u64;
            let places = Job { segment: &flat, base: job.base, out: job.last, blob, index: 0 };
            put_segment(&mut self.segments, &places, self.blocks, at, false, 0);
            self.count += 1;
            self.blocks += flat.chunks.div_ceil(self.chunks_a_block);
            self.chunks.push(at + flat.chunks);
        }
        Ok(())
    }

    /// `bytes` for the kernels: list and tables where they belong, zeros elsewhere.
    pub fn upload(&self, segments: &Range<usize>, tables: &Range<usize>, bytes: usize) -> Vec<u8> {
        let mut made = vec![0; bytes];
        made[segments.clone()].copy_from_slice(&self.segments);
        for (bytes, word) in made[tables.clone()].chunks_exact_mut(4).zip(self.tables.words()) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        made
    }

    /// Chunks of all segments.
    pub fn chunk_count(&self) -> u32 {
        self.chunks.last().copied().unwrap_or_default()
    }

    /// Whether a chunk of segment `number` has its bit in a bitmap.
    pub fn is_left(&self, number: usize, bitmap: &[u32]) -> bool {
        let is_set = |chunk: u32| bitmap[(chunk / 32) as usize] >> (chunk % 32) & 1 == 1;
        (self.chunks[number]..self.chunks[number + 1]).any(is_set)
    }

    /// Leaves the payloads of segment `number` out.
    pub fn skip(&self, number: usize, places: &mut Vec<u64>) {
        places.extend((self.chunks[number]..self.chunks[number + 1]).map(|_| u64::MAX));
    }

    /// Records of segment `number` and, put behind those of `places`, where each payload lies in a blob of which
    /// `blob_bytes` are taken.
    pub fn records(
        &self,
        number: usize,
        outcomes: &[u32],
        blob_bytes: u64,
        places: &mut Vec<u64>,
    ) -> Vec<ChunkRecord> {
        let mut end_bytes = 0u32;
        let record = |chunk: u32| {
            let outcome = &outcomes[chunk as usize * OUTCOME_WORDS..];
            places.push(blob_bytes + u64::from(end_bytes));
            end_bytes += outcome[1] & PAYLOAD_MASK;
            ChunkRecord { end_bytes, check: outcome[2] }
        };
        (self.chunks[number]..self.chunks[number + 1]).map(record).collect()
    }
}
