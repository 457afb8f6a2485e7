//! What is launched for a list of segments: pure bookkeeping, the same for a device and for the tests' emulation.
//!
//! Every segment is in the list of each kernel that decodes one of its modes; one of them, the first that it is
//! in, also copies (modes Z and raw) and notes the chunks that no kernel takes. A segment without chunks is one
//! copy or fill. Lists are cut by word size because kernels are.

use overspill_codec::{BaseKind, FlatSegment};
use overspill_device::cuda::Arg;

/// Threads of a block, but of modes S and D; the kernels are written for it.
pub const THREADS: u32 = 256;
/// Threads of a block of mode D: its tables are large, and shared by all warps.
pub const DENSE_THREADS: u32 = 768;
/// Threads of a block of mode G.
pub const GROUPS_THREADS: u32 = 640;
/// Threads of a block of mode S. Its first warp decodes alone while the others wait, so small blocks, more of them.
pub const SPARSE_THREADS: u32 = 128;
/// Dynamic shared memory that a block of mode S has at first: six blocks fit a multiprocessor of 228 KiB.
pub const USUAL_SPARSE_BYTES: u32 = 18_880;
/// Slots of a table.
const SLOTS: u32 = 4096;
/// Bytes of a slot table with one byte a slot, and of the list of its entries.
const SLOT_BYTES: u32 = SLOTS + 4 * 261;
/// Bytes of a class's tables in mode G: a slot table, and of each symbol that words of so many bytes have an entry.
const fn groups_bytes(word_bytes: u32) -> u32 {
    SLOTS + 8 * ((32 + 8 * (8 * word_bytes - 5)) | 1)
}
/// Bytes of a slot table with a word a slot.
const FULL_SLOT_BYTES: u32 = 4 * SLOTS;

const IS_FLOAT: u32 = 1;
const IS_STEP: u32 = 2;
const HAS_BASE: u32 = 4;
const COPIES: u32 = 8;

/// One segment and where its parts lie in device memory. In place, `base` equals `out`.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// The parsed segment.
    pub segment: &'a FlatSegment,
    /// Address of its base's first word or block; not used without a base.
    pub base: u64,
    /// Address of its first final word.
    pub out: u64,
    /// Address of its blob.
    pub blob: u64,
    /// Address of its records, a multiple of 4.
    pub index: u64,
}

/// A launch of one kernel over a list of segments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Kernel's name.
    pub kernel: String,
    /// Bytes of a word.
    pub word_bytes: u32,
    /// Its list: offset in [`Plan::segments`] in bytes, and how many.
    pub list_bytes: usize,
    /// Segments in the list.
    pub count: u32,
    /// Blocks.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Which kind.
    pub family: Family,
    /// Dynamic shared memory of modes D and W.
    pub shared_bytes: u32,
}

/// Which kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Compares checks.
    Check,
    /// Mode S.
    Sparse,
    /// Mode D.
    Dense,
    /// Mode W.
    Planes,
    /// Mode F.
    Flags,
    /// Mode G.
    Groups,
}

/// A segment without chunks: `out` becomes a copy of `base`, or zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Whole {
    /// Index of its job.
    pub job: usize,
}

/// A chunk that the kernels left to the host, untouched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeftChunk {
    /// Index of its job.
    pub job: usize,
    /// Chunk within the segment.
    pub chunk: u32,
}

/// Everything that is launched for some jobs.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// The lists of all launches.
    pub segments: Vec<u8>,
    /// Checks first, then what decodes.
    pub launches: Vec<Launch>,
    /// Segments without chunks that have something to copy.
    pub whole: Vec<Whole>,
    /// Jobs that no kernel decodes: words of 64 bits, quantized bases without chunks.
    pub host: Vec<usize>,
    /// First chunk of each job, numbered through; the last entry is how many there are.
    pub chunks: Vec<u32>,
    /// Whether the kernel of mode S copies for a job, and so notes what is left of it, in both rounds.
    tried_again: Vec<bool>,
}

impl Plan {
    /// Plan `jobs`. A device block has at most `shared_bytes` of dynamic shared memory; segments whose dense
    /// tables need more are left to the host.
    pub fn new(jobs: &[Job<'_>], shared_bytes: u32) -> Self {
        let mut plan = Plan { chunks: vec![0], ..Plan::default() };
        for (i, job) in jobs.iter().enumerate() {
            let segment = job.segment;
            plan.chunks.push(plan.chunks[i] + segment.chunks);
            plan.tried_again.push(copier(segment) == Family::Sparse);
            let quantized = matches!(segment.spec.base, BaseKind::Quantized(_));
            let in_place = segment.spec.base == BaseKind::Words && job.base == job.out;
            let word_bytes = segment.spec.dtype.word_bytes() as u32;
            let class_bytes = groups_bytes(word_bytes).max(SLOT_BYTES);
            let unheld = word_bytes == 8 || segment.dense_classes * class_bytes > shared_bytes;
            if unheld || (segment.chunks == 0 && quantized) {
                plan.host.push(i);
            } else if segment.chunks == 0 && !in_place && segment.spec.words > 0 {
                plan.whole.push(Whole { job: i });
            }
        }
        let on_device = |i: &usize| jobs[*i].segment.chunks > 0 && !plan.host.contains(i);
        let all: Vec<usize> = (0..jobs.len()).filter(on_device).collect();
        plan.push(jobs, &all, Family::Check, 0, false);
        for word_bytes in [1u32, 2, 4] {
            let own = all
                .iter()
                .copied()
                .filter(|&i| jobs[i].segment.spec.dtype.word_bytes() == word_bytes as usize);
            let own: Vec<usize> = own.collect();
            for family in [Family::Sparse, Family::Dense, Family::Planes, Family::Flags, Family::Groups] {
                for copies in [true, false] {
                    let list: Vec<usize> = own
                        .iter()
                        .copied()
                        .filter(|&i| takes(jobs[i].segment, family))
                        .filter(|&i| (copier(jobs[i].segment) == family) == copies)
                        .collect();
                    plan.push(jobs, &list, family, word_bytes, copies);
                }
            }
        }
        plan
    }

    fn push(&mut self, jobs: &[Job<'_>], list: &[usize], family: Family, word_bytes: u32, copies: bool) {
        if list.is_empty() {
            return;
        }
        let list_bytes = self.segments.len();
        let (mut units, mut shared_bytes) = (0, 0);
        let threads = match family {
            Family::Sparse => SPARSE_THREADS,
            Family::Dense => DENSE_THREADS,
            Family::Groups => GROUPS_THREADS,
            Family::Check | Family::Planes | Family::Flags => THREADS,
        };
        for &i in list {
            let segment = jobs[i].segment;
            put_segment(&mut self.segments, &jobs[i], units, self.chunks[i], copies, 0);
            units += match family {
                Family::Sparse => segment.chunks,
                // A warp a chunk.
                _ => segment.chunks.div_ceil(threads / 32),
            };
            shared_bytes = shared_bytes.max(match family {
                Family::Dense => segment.dense_classes * SLOT_BYTES,
                Family::Groups => segment.dense_classes * groups_bytes(word_bytes),
                Family::Planes => segment.coded_planes * FULL_SLOT_BYTES,
                Family::Flags => segment.flag_entries * 4,
                _ => 0,
            });
        }
        let name = match family {
            Family::Check => "tpde_check".to_owned(),
            Family::Sparse => format!("tpde_sparse_{}", word_bytes * 8),
            Family::Dense => format!("tpde_dense_{}", word_bytes * 8),
            Family::Planes => format!("tpde_planes_{}", word_bytes * 8),
            Family::Flags => format!("tpde_flags_{}", word_bytes * 8),
            Family::Groups => format!("tpde_groups_{}", word_bytes * 8),
        };
        let count = list.len() as u32;
        self.launches.push(Launch {
            kernel: name,
            word_bytes,
            list_bytes,
            count,
            blocks: units,
            threads,
            family,
            shared_bytes,
        });
    }

    /// Bytes of the bitmap with a bit for each chunk.
    pub fn bitmap_bytes(&self) -> usize {
        (self.chunks.last().copied().unwrap_or_default() as usize).div_ceil(32) * 4
    }

    /// The chunks whose bits are set in the bitmap of the first round, or, where mode S had a second, in that of
    /// the second.
    pub fn left(&self, first: &[u8], second: &[u8]) -> Vec<LeftChunk> {
        let total = self.chunks.last().copied().unwrap_or_default();
        let is_set = |bitmap: &[u8], n: u32| bitmap[(n / 8) as usize] >> (n % 8) & 1 == 1;
        let once = (0..total).filter(|&n| is_set(first, n)).map(|n| (n, self.chunk(n)));
        once.filter(|&(n, chunk)| !self.tried_again[chunk.job] || is_set(second, n))
            .map(|(_, chunk)| chunk)
            .collect()
    }

    /// The chunk of a number that a kernel reports.
    pub fn chunk(&self, number: u32) -> LeftChunk {
        let job = self.chunks.partition_point(|&first| first <= number).saturating_sub(1);
        LeftChunk { job, chunk: number - self.chunks[job] }
    }
}

/// Where a launch finds what it needs, as device addresses.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    /// [`Plan::segments`].
    pub segments: u64,
    /// [`overspill_codec::FlatTables::words`].
    pub tables: u64,
    /// 16 bytes, zeroed.
    pub status: u64,
    /// [`Plan::bitmap_bytes`], zeroed.
    pub bitmap: u64,
}

impl Launch {
    /// The kernel's arguments, in order. Mode S has `sparse_bytes` for a chunk's symbols and takes only chunks with a
    /// bit in the bitmap at `only`, if that is not 0.
    pub fn arguments(&self, places: &Places, sparse_bytes: u32, only: u64) -> Vec<Arg> {
        let list = [Arg::U64(places.segments + self.list_bytes as u64), Arg::U32(self.count)];
        let (status, bitmap) = (Arg::U64(places.status), Arg::U64(places.bitmap));
        let rest = match self.family {
            Family::Check => vec![Arg::U32(0), status],
            Family::Sparse => {
                vec![
                    Arg::U64(places.tables),
                    Arg::U32(0),
                    Arg::U32(sparse_bytes),
                    Arg::U64(only),
                    status,
                    bitmap,
                ]
            }
            Family::Dense | Family::Planes | Family::Flags | Family::Groups => {
                vec![Arg::U64(places.tables), Arg::U32(0), status, bitmap]
            }
        };
        list.into_iter().chain(rest).collect()
    }
}

/// Whether a family's kernel decodes some mode of a segment, or copies for it.
fn takes(segment: &FlatSegment, family: Family) -> bool {
    let has = match family {
        Family::Check => true,
        Family::Sparse => segment.sparse != 0 && !segment.flags && segment.quant_code() == 0,
        Family::Flags => segment.flags && segment.quant_code() == 0,
        Family::Dense => segment.dense != 0,
        // What a head has dense tables for is of mode D or G.
        Family::Groups => segment.dense != 0 && segment.quant_code() == 0,
        Family::Planes => segment.planes != 0,
    };
    has || copier(segment) == family
}

/// The family that copies for a segment.
fn copier(segment: &FlatSegment) -> Family {
    // Only the dense kernel knows what a quantized block predicts.
    match (segment.quant_code(), segment.sparse, segment.dense, segment.planes) {
        (1.., ..) => Family::Dense,
        _ if segment.flags => Family::Flags,
        (_, 0, 1.., _) => Family::Dense,
        (_, 0, 0, 1..) => Family::Planes,
        _ => Family::Sparse,
    }
}

/// The kernels' `struct Segment`. `one_in` is for the encoders' first look.
pub(crate) fn put_segment(
    out: &mut Vec<u8>,
    job: &Job<'_>,
    first_unit: u32,
    first_chunk: u32,
    copies: bool,
    one_in: u32,
) {
    let segment = job.segment;
    let spec = &segment.spec;
    for address in [job.base, job.out, job.blob, job.index, segment.check_term] {
        out.extend_from_slice(&address.to_le_bytes());
    }
    let flag = |is_set: bool, bit: u32| if is_set { bit } else { 0 };
    let flags = flag(spec.dtype.float_layout().is_some(), IS_FLOAT)
        | flag(segment.is_step(), IS_STEP)
        | flag(spec.base != BaseKind::None, HAS_BASE)
        | flag(copies, COPIES)
        | segment.quant_code() << 4;
    // Rows longer than a segment are never context.
    let (row_words, row_offset) = if segment.rows {
        (spec.row_words as u32, (spec.first_word % spec.row_words) as u32)
    } else {
        (0, 0)
    };
    let fields = [
        spec.words as u32,
        segment.chunk_log2,
        segment.chunks,
        first_unit,
        first_chunk,
        segment.sparse,
        segment.dense,
        segment.planes,
        row_words,
        row_offset,
        segment.key_shift,
        segment.key_mask,
        flags,
        one_in,
    ];
    for field in fields {
        out.extend_from_slice(&field.to_le_bytes());
    }
}
