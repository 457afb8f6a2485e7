//! Segments of steps on their way: counted part by part, headed on the host meanwhile, packed together.
#![expect(unsafe_code, reason = "launches kernels")]

use std::ops::Range;

use overspill_device::cuda::Arg;
use overspill_device::{DeviceRange, EventRef, StreamRef};

use crate::decoder::Result;
use crate::pack::{Layout, Made, PackedSegment, Packer, Scratch, keep, on_all_cores};
use crate::pack_plan::{
    CELLS, COUNT_THREADS, ChunkPlan, CountPlan, LIST_WORDS, LISTED, OUTCOME_WORDS, PACK_BYTES, PackJob,
    PackMode,
};

/// Segments whose heads are made while the next ones are counted, which takes about as long.
const SEGMENTS_A_PART: usize = 48;

/// Segments of one width, with bases, on their way.
pub(crate) struct Round<'a> {
    pub(crate) packer: &'a Packer,
    pub(crate) stream: &'a StreamRef,
    pub(crate) jobs: &'a [PackJob],
    pub(crate) mode: PackMode,
    pub(crate) bits: usize,
}

/// Segments that are counted together.
struct Part<'a> {
    jobs: &'a [PackJob],
    counts: CountPlan,
    grains: Range<usize>,
    lists: Range<usize>,
    counted: EventRef,
}

/// What is known once all are counted.
struct Known {
    heads: Vec<Option<Vec<u8>>>,
    /// Changed words of each segment.
    changed: Vec<u64>,
    plan: ChunkPlan,
}

impl Known {
    fn add(&mut self, counting: &DeviceRange, part: &Part<'_>, heads: Vec<Option<Vec<u8>>>) -> Result<()> {
        let grains_at = counting.addr() + part.grains.start as u64;
        self.plan.add(part.jobs, &heads, &part.counts, grains_at)?;
        self.heads.extend(heads);
        Ok(())
    }
}

/// Where the kernels that pack find what they share, as offsets in the scratch memory.
struct Shared {
    segments: Range<usize>,
    tables: Range<usize>,
    status: Range<usize>,
    cursor: Range<usize>,
    outcomes: Range<usize>,
    places: Range<usize>,
    payloads: Range<usize>,
    total: usize,
}

impl Shared {
    fn of(known: &Known) -> Self {
        let mut layout = Layout { at: 0 };
        let chunks = known.plan.chunk_count() as usize;
        let changed: u64 = known.changed.iter().sum();
        Shared {
            segments: layout.take(known.plan.segments.len()),
            tables: layout.take(4 * known.plan.tables.words().len()),
            status: layout.take(16 + chunks.div_ceil(32) * 4),
            cursor: layout.take(4),
            outcomes: layout.take(4 * OUTCOME_WORDS * chunks),
            places: layout.take(8 * chunks),
            payloads: layout.take(2 * changed as usize + 1028 * chunks),
            total: layout.at,
        }
    }
}

impl Round<'_> {
    /// Nothing of it is under way any more when this returns without an error.
    ///
    /// # Safety
    /// As [`Packer::pack`].
    pub(crate) unsafe fn run(&self, kept: &mut Scratch) -> Result<Made> {
        // SAFETY: the caller's promise.
        let (counting, parts) = unsafe { self.count(&mut kept.counting) }?;
        let known = self.know(&counting, &parts)?;
        let shared = Shared::of(&known);
        let scratch = keep(&self.packer.device, &mut kept.packing, shared.total)?;
        let at = |range: &Range<usize>| Arg::U64(scratch.addr() + range.start as u64);
        let plan = &known.plan;
        // One copy of all that comes from here.
        let upload = plan.upload(&shared.segments, &shared.tables, shared.cursor.end);
        self.packer.device.write(&scratch.slice(0..upload.len())?, &upload)?;
        if plan.count > 0 {
            let status_at = scratch.addr() + shared.status.start as u64;
            let front = [at(&shared.segments), Arg::U32(plan.count), at(&shared.tables)];
            let rest = [
                at(&shared.cursor),
                at(&shared.payloads),
                Arg::U32((shared.payloads.len() / 4) as u32),
                at(&shared.outcomes),
                Arg::U64(status_at),
                Arg::U64(status_at + 16),
            ];
            let (name, room) = match self.mode {
                PackMode::Sparse => ("encode", Some(PACK_BYTES)),
                PackMode::Flags => ("encode_flags", None),
            };
            let args: Vec<Arg> = front.into_iter().chain(room.map(Arg::U32)).chain(rest).collect();
            let name = format!("tpde_{name}_{}", self.bits);
            // SAFETY: the arguments are the kernel's; ranges lie in `scratch`, words are the caller's promise.
            unsafe {
                self.packer.launch(
                    self.stream,
                    &name,
                    plan.blocks,
                    self.mode.threads(),
                    room.unwrap_or(0),
                    &args,
                )
            }?;
        }
        self.stream.synchronize()?;
        // SAFETY: as above.
        unsafe { self.gather(known, &shared, &scratch) }
    }

    /// Launches the first look at all segments.
    unsafe fn count(&self, kept: &mut Option<DeviceRange>) -> Result<(DeviceRange, Vec<Part<'_>>)> {
        let mut layout = Layout { at: 0 };
        let mut upload: Vec<u8> = Vec::new();
        let mut planned = Vec::new();
        for jobs in self.jobs.chunks(SEGMENTS_A_PART) {
            let counts = CountPlan::new(jobs);
            let segments = layout.take(counts.segments.len());
            upload.resize(segments.start, 0);
            upload.extend_from_slice(&counts.segments);
            planned.push((jobs, counts, segments));
        }
        let cells = layout.take(4 * CELLS * self.jobs.len());
        let mut places = Vec::new();
        for (jobs, counts, _) in &planned {
            places.push((layout.take(4 * counts.grain_count()), layout.take(4 * LIST_WORDS * jobs.len())));
        }
        let scratch = keep(&self.packer.device, kept, layout.at)?;
        let at = |range: &Range<usize>| Arg::U64(scratch.addr() + range.start as u64);
        self.packer.device.write(&scratch.slice(0..upload.len())?, &upload)?;
        let cell_words = (CELLS * self.jobs.len()) as u64;
        // SAFETY: the arguments are the kernels'; ranges lie in `scratch`, words are the caller's promise.
        unsafe {
            self.packer.launch(
                self.stream,
                "tpde_clear",
                4096,
                COUNT_THREADS,
                0,
                &[at(&cells), Arg::U64(cell_words)],
            )
        }?;
        let (mut parts, mut cells_at) = (Vec::new(), scratch.addr() + cells.start as u64);
        for ((jobs, counts, segments), (grains, lists)) in planned.into_iter().zip(places) {
            let count = jobs.len() as u32;
            let count_args = [at(&segments), Arg::U32(count), at(&grains), Arg::U64(cells_at)];
            let list_args = [Arg::U64(cells_at), at(&lists), Arg::U32(LISTED as u32)];
            let blocks = counts.grain_count() as u32;
            // SAFETY: as above.
            unsafe {
                let name = format!("tpde_count_{}", self.bits);
                self.packer.launch(self.stream, &name, blocks, COUNT_THREADS, 0, &count_args)?;
                self.packer.launch(self.stream, "tpde_list", count, COUNT_THREADS, 0, &list_args)?;
            }
            cells_at += (4 * CELLS * jobs.len()) as u64;
            parts.push(Part { jobs, counts, grains, lists, counted: self.stream.record()? });
        }
        Ok((scratch, parts))
    }

    /// Reads what was counted and makes heads of it, part by part; a part is planned while the next one's heads are made.
    fn know(&self, counting: &DeviceRange, parts: &[Part<'_>]) -> Result<Known> {
        let mut known = Known {
            heads: Vec::new(),
            changed: Vec::new(),
            plan: ChunkPlan::new(self.mode.chunks_a_block()),
        };
        let mut headed: Option<(&Part<'_>, Vec<Option<Vec<u8>>>)> = None;
        for part in parts {
            part.counted.synchronize()?;
            let listed = self.packer.read_words(&counting.slice(part.lists.clone())?)?;
            let grains = self.packer.read_words(&counting.slice(part.grains.clone())?)?;
            let head = |number: usize| {
                let list = &listed[number * LIST_WORDS..(number + 1) * LIST_WORDS];
                part.counts.head(number, &part.jobs[number], self.mode, list, &grains)
            };
            let before = headed.take();
            let plan_before = || before.map_or(Ok(()), |(part, heads)| known.add(counting, part, heads));
            let (heads, planned) = on_all_cores(part.jobs.len(), head, plan_before);
            planned?;
            let of_segment = |ends: &[usize]| grains[ends[0]..ends[1]].iter().copied().map(u64::from).sum();
            known.changed.extend(part.counts.grains.windows(2).map(of_segment).collect::<Vec<u64>>());
            headed = Some((part, heads));
        }
        if let Some((part, heads)) = headed {
            known.add(counting, part, heads)?;
        }
        Ok(known)
    }

    /// Makes records of what the kernels say and puts payloads in order.
    unsafe fn gather(&self, known: Known, shared: &Shared, scratch: &DeviceRange) -> Result<Made> {
        let Known { heads, changed, plan } = known;
        let (mut made, mut blob_bytes, mut to) = (Vec::new(), 0, Vec::new());
        let told = self.packer.read_words(&scratch.slice(shared.outcomes.clone())?)?;
        let bitmap = self.packer.read_words(&scratch.slice(shared.status.start + 16..shared.status.end)?)?;
        for (number, (head, changed)) in heads.into_iter().zip(changed).enumerate() {
            let Some(head) = head.filter(|_| !plan.is_left(number, &bitmap)) else {
                plan.skip(number, &mut to);
                made.push(None);
                continue;
            };
            let records = plan.records(number, &told, blob_bytes, &mut to);
            let segment = PackedSegment { head, records, blob_start: blob_bytes, changed };
            blob_bytes += segment.blob_bytes();
            made.push(Some(segment));
        }
        let blob = self.packer.room(blob_bytes)?;
        if !to.is_empty() {
            let bytes: Vec<u8> = to.iter().flat_map(|place| place.to_le_bytes()).collect();
            self.packer.device.write(&scratch.slice(shared.places.clone())?, &bytes)?;
            let at = |range: &Range<usize>| Arg::U64(scratch.addr() + range.start as u64);
            let chunks = Arg::U32(to.len() as u32);
            let args = [
                at(&shared.outcomes),
                at(&shared.places),
                chunks,
                at(&shared.payloads),
                Arg::U64(blob.addr()),
            ];
            let blocks = to.len().div_ceil(COUNT_THREADS as usize / 32) as u32;
            // SAFETY: the caller's promise; every payload lies in the blob.
            unsafe { self.packer.launch(self.stream, "tpde_gather", blocks, COUNT_THREADS, 0, &args) }?;
            self.stream.synchronize()?;
        }
        Ok((made, blob, blob_bytes))
    }
}
