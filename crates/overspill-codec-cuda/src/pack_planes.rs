//! Segments of words without a base on their way: counted, headed on the host, sized, and packed where they belong.
#![expect(unsafe_code, reason = "launches kernels")]

use std::ops::Range;

use overspill_device::cuda::Arg;
use overspill_device::{DeviceRange, StreamRef};

use crate::decoder::Result;
use crate::pack::{Layout, Made, PackedSegment, Packer, Scratch, keep, on_all_cores};
use crate::pack_plan::{
    COUNT_THREADS, ChunkPlan, CountPlan, OUTCOME_WORDS, PackJob, head_of_planes, plane_cells, probe_bytes,
};
use crate::plan::THREADS;

/// Segments of one width, without bases, on their way.
pub(crate) struct PlanesRound<'a> {
    pub(crate) packer: &'a Packer,
    pub(crate) stream: &'a StreamRef,
    pub(crate) jobs: &'a [PackJob],
    pub(crate) word_bytes: usize,
}

/// What the two kernels that code planes share, as offsets in the scratch memory.
struct Shared {
    segments: Range<usize>,
    tables: Range<usize>,
    status: Range<usize>,
    outcomes: Range<usize>,
    places: Range<usize>,
    total: usize,
}

impl Shared {
    fn of(plan: &ChunkPlan) -> Self {
        let mut layout = Layout { at: 0 };
        let chunks = plan.chunk_count() as usize;
        Shared {
            segments: layout.take(plan.segments.len()),
            tables: layout.take(4 * plan.tables.words().len()),
            status: layout.take(16 + chunks.div_ceil(32) * 4),
            outcomes: layout.take(4 * OUTCOME_WORDS * chunks),
            places: layout.take(8 * chunks),
            total: layout.at,
        }
    }
}

impl PlanesRound<'_> {
    /// Nothing of it is under way any more when this returns without an error.
    ///
    /// # Safety
    /// As [`Packer::pack`].
    pub(crate) unsafe fn run(&self, kept: &mut Scratch) -> Result<Made> {
        let counts = CountPlan::new(self.jobs);
        let mut layout = Layout { at: 0 };
        let segments = layout.take(counts.segments.len());
        let grains = layout.take(4 * counts.grain_count());
        let cells = layout.take(4 * plane_cells(self.word_bytes) * self.jobs.len());
        let probes = layout.take(probe_bytes(self.word_bytes) * self.jobs.len());
        let device = &self.packer.device;
        let counting = keep(device, &mut kept.counting, layout.at)?;
        let at = |range: &Range<usize>| Arg::U64(counting.addr() + range.start as u64);
        device.write(&counting.slice(segments.clone())?, &counts.segments)?;
        let count = self.jobs.len() as u32;
        // SAFETY: the arguments are the kernels'; ranges lie in `counting`, words are the caller's promise.
        unsafe {
            let clear = [at(&cells), Arg::U64(cells.len() as u64 / 4)];
            self.packer.launch(self.stream, "tpde_clear", 1024, COUNT_THREADS, 0, &clear)?;
            let args = [at(&segments), Arg::U32(count), at(&grains), at(&cells)];
            self.launch("count", counts.grain_count() as u32, &args)?;
            let bits = 8 * self.word_bytes;
            let args = [at(&segments), at(&grains), at(&probes)];
            let probe = format!("tpde_probe_{bits}");
            self.packer.launch(self.stream, &probe, count, COUNT_THREADS, 0, &args)?;
        }
        self.stream.synchronize()?;
        let found = self.packer.read_words(&counting.slice(grains.clone())?)?;
        let heads = self.heads(&counting, &counts, &found, &cells, &probes)?;
        let mut plan = ChunkPlan::new(THREADS / 32);
        plan.add(self.jobs, &heads, &counts, counting.addr() + grains.start as u64)?;
        let changed = |number: usize| {
            let own = &found[counts.grains[number]..counts.grains[number + 1]];
            own.iter().copied().map(u64::from).sum()
        };
        // SAFETY: as above; the grains stay where they are.
        unsafe { self.code(kept, &plan, heads, changed) }
    }

    /// Heads of all segments, on all cores.
    fn heads(
        &self,
        counting: &DeviceRange,
        counts: &CountPlan,
        grains: &[u32],
        cells: &Range<usize>,
        probes: &Range<usize>,
    ) -> Result<Vec<Option<Vec<u8>>>> {
        let cells = self.packer.read_words(&counting.slice(cells.clone())?)?;
        let probes = self.packer.device.read(&counting.slice(probes.clone())?)?;
        let (cells_each, probe_each) = (plane_cells(self.word_bytes), probe_bytes(self.word_bytes));
        let head = |number: usize| {
            let own = &grains[counts.grains[number]..counts.grains[number + 1]];
            let cells = &cells[number * cells_each..(number + 1) * cells_each];
            let probe = &probes[number * probe_each..(number + 1) * probe_each];
            head_of_planes(&self.jobs[number], own, cells, probe)
        };
        Ok(on_all_cores(self.jobs.len(), head, || ()).0)
    }

    /// Sizes, then codes every chunk.
    unsafe fn code(
        &self,
        kept: &mut Scratch,
        plan: &ChunkPlan,
        heads: Vec<Option<Vec<u8>>>,
        changed: impl Fn(usize) -> u64,
    ) -> Result<Made> {
        let device = &self.packer.device;
        let shared = Shared::of(plan);
        let scratch = keep(device, &mut kept.packing, shared.total)?;
        // One copy of all that comes from here.
        let upload = plan.upload(&shared.segments, &shared.tables, shared.outcomes.end);
        device.write(&scratch.slice(0..upload.len())?, &upload)?;
        let at = |range: &Range<usize>| Arg::U64(scratch.addr() + range.start as u64);
        let status_at = scratch.addr() + shared.status.start as u64;
        let args = |blob: u64| {
            let front = [at(&shared.segments), Arg::U32(plan.count), at(&shared.tables)];
            let rest = [at(&shared.outcomes), at(&shared.places)];
            let last = [blob, status_at, status_at + 16].map(Arg::U64);
            front.into_iter().chain(rest).chain(last).collect::<Vec<Arg>>()
        };
        // SAFETY: the arguments are the kernel's; ranges lie in `scratch`, words are the caller's promise.
        unsafe { self.launch("size", plan.blocks, &args(0)) }?;
        self.stream.synchronize()?;
        let sizes = self.packer.read_words(&scratch.slice(shared.outcomes.clone())?)?;
        let bitmap = self.packer.read_words(&scratch.slice(shared.status.start + 16..shared.status.end)?)?;
        let (mut blob_bytes, mut places, mut starts) = (0, Vec::new(), Vec::new());
        for (number, head) in heads.iter().enumerate() {
            if head.is_none() || plan.is_left(number, &bitmap) {
                plan.skip(number, &mut places);
                starts.push(None);
                continue;
            }
            starts.push(Some(blob_bytes));
            let records = plan.records(number, &sizes, blob_bytes, &mut places);
            blob_bytes += records.last().map_or(0, |record| u64::from(record.end_bytes));
        }
        let blob = self.packer.room(blob_bytes)?;
        let bytes: Vec<u8> = places.iter().flat_map(|place| place.to_le_bytes()).collect();
        device.write(&scratch.slice(shared.places.clone())?, &bytes)?;
        // SAFETY: as above; every payload lies in the blob, by the sizes that it was made of.
        unsafe { self.launch("encode", plan.blocks, &args(blob.addr())) }?;
        self.stream.synchronize()?;
        let told = self.packer.read_words(&scratch.slice(shared.outcomes.clone())?)?;
        let made = heads.into_iter().zip(starts).enumerate().map(|(number, (head, start))| {
            let (head, blob_start) = (head?, start?);
            let records = plan.records(number, &told, blob_start, &mut Vec::new());
            Some(PackedSegment { head, records, blob_start, changed: changed(number) })
        });
        Ok((made.collect(), blob, blob_bytes))
    }

    unsafe fn launch(&self, name: &str, blocks: u32, args: &[Arg]) -> Result<()> {
        let name = format!("tpde_{name}_planes_{}", 8 * self.word_bytes);
        if blocks == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.packer.launch(self.stream, &name, blocks, COUNT_THREADS, 0, args) }
    }
}
