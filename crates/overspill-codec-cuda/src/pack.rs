//! Packs segments whose base and final words lie on a device.
//!
//! The device counts, the host makes heads of the counts (on all cores: a quarter of a millisecond a segment), the
//! device packs. What it does not do - rows as context, dense steps, words of 64 bits, other bases - is left to the
//! caller, who encodes those segments with [`overspill_codec::encode_segment`]. Payloads stay on the device, back to
//! back.
#![expect(unsafe_code, reason = "launches kernels")]

use std::sync::{Arc, Mutex, PoisonError};

use overspill_codec::ChunkRecord;
use overspill_device::cuda::{Arg, CudaDevice, Kernel, Launch as Shape};
use overspill_device::nvrtc::{Nvrtc, cache::KernelCache};
use overspill_device::{Device, DeviceRange, StreamRef, kernels};

use crate::decoder::{DeviceTables, Result};
use crate::pack_plan::{
    CELLS, COUNT_THREADS, ChunkPlan, CountPlan, LIST_WORDS, LISTED, OUTCOME_WORDS, PACK_BYTES, PackJob,
    PackMode,
};

/// Segments that are counted at once: a quarter of a megabyte of counts each.
const SEGMENTS_AT_ONCE: usize = 512;

/// One packed segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedSegment {
    /// Its head.
    pub head: Vec<u8>,
    /// Its records.
    pub records: Vec<ChunkRecord>,
    /// Where its blob starts in that of the round.
    pub blob_start: u64,
    /// Words that differ from the base.
    pub changed: u64,
}

impl PackedSegment {
    /// Bytes of its blob.
    pub fn blob_bytes(&self) -> u64 {
        self.records.last().map_or(0, |record| record.end_bytes.into())
    }
}

/// What [`Packer::pack`] made.
pub struct Packed {
    /// Of every job; `None` for those that it left to the caller.
    pub segments: Vec<Option<PackedSegment>>,
    /// The blobs of all segments.
    pub blob: DeviceRange,
    /// Bytes of it that are taken.
    pub blob_bytes: u64,
}

/// Kernels of one device, ready to launch.
pub struct Packer {
    device: Arc<CudaDevice>,
    kernels: Vec<(String, Kernel)>,
    /// Grows, and is used by one at a time.
    scratch: Mutex<Option<DeviceRange>>,
}

impl Packer {
    /// Compiles the kernels for a device, or takes them from the user's cache.
    ///
    /// # Errors
    /// The compiler or the driver.
    pub fn new(device: &Arc<CudaDevice>, nvrtc: &Nvrtc) -> Result<Self> {
        let module = device.build(nvrtc, &KernelCache::of_user(), &kernels::TPDE_ENCODE)?;
        let mut names: Vec<String> = ["clear", "list", "gather"].map(|name| format!("tpde_{name}")).into();
        for bits in [8, 16, 32] {
            names.extend(["count", "encode", "encode_flags"].map(|name| format!("tpde_{name}_{bits}")));
        }
        let kernels = names.into_iter().map(|name| Ok((name.clone(), module.kernel(&name)?)));
        Ok(Packer {
            device: Arc::clone(device),
            kernels: kernels.collect::<Result<_>>()?,
            scratch: Mutex::new(None),
        })
    }

    /// Packs segments behind `stream` and waits.
    ///
    /// # Errors
    /// The device.
    ///
    /// # Safety
    /// Base and final words of every job are device memory of the size that its spec says, not written by others until
    /// this returns.
    pub unsafe fn pack(&self, stream: &StreamRef, jobs: &[PackJob], mode: PackMode) -> Result<Packed> {
        let mut guard = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut segments: Vec<Option<PackedSegment>> = vec![None; jobs.len()];
        let mut rounds = Vec::new();
        for word_bytes in [1, 2, 4] {
            let is_own =
                |&i: &usize| jobs[i].is_for_kernels() && jobs[i].spec.dtype.word_bytes() == word_bytes;
            let own: Vec<usize> = (0..jobs.len()).filter(is_own).collect();
            for numbers in own.chunks(SEGMENTS_AT_ONCE) {
                let jobs: Vec<PackJob> = numbers.iter().map(|&i| jobs[i]).collect();
                let round = Round { packer: self, stream, jobs: &jobs, mode, bits: 8 * word_bytes };
                // SAFETY: the caller's promise.
                let (made, blob, bytes) = unsafe { round.run(&mut guard) }?;
                for (&i, made) in numbers.iter().zip(made) {
                    segments[i] = made;
                }
                rounds.push((numbers.to_vec(), blob, bytes));
            }
        }
        self.join(segments, rounds)
    }

    /// One blob of all rounds, of which there is nearly always one.
    fn join(
        &self,
        mut segments: Vec<Option<PackedSegment>>,
        mut rounds: Vec<(Vec<usize>, DeviceRange, u64)>,
    ) -> Result<Packed> {
        if rounds.len() == 1 {
            let (_, blob, blob_bytes) = rounds.remove(0);
            return Ok(Packed { segments, blob, blob_bytes });
        }
        let blob_bytes = rounds.iter().map(|round| round.2).sum();
        let blob = self.room(blob_bytes)?;
        let mut at = 0;
        for (numbers, from, bytes) in rounds {
            let part = self.device.read(&from.slice(0..bytes as usize)?)?;
            self.device.write(&blob.slice(at as usize..(at + bytes) as usize)?, &part)?;
            for number in numbers {
                if let Some(segment) = &mut segments[number] {
                    segment.blob_start += at;
                }
            }
            at += bytes;
        }
        Ok(Packed { segments, blob, blob_bytes })
    }

    fn room(&self, bytes: u64) -> Result<DeviceRange> {
        Ok(self.device.alloc_device((bytes as usize).next_multiple_of(256).max(256))?)
    }

    fn kernel(&self, name: &str) -> &Kernel {
        let found = self.kernels.iter().find(|(own, _)| own == name);
        &found.expect("every kernel is loaded").1
    }

    fn read_words(&self, range: &DeviceRange) -> Result<Vec<u32>> {
        let bytes = self.device.read(range)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|&word| u32::from_le_bytes(word)).collect())
    }
}

/// Segments of one width on their way.
struct Round<'a> {
    packer: &'a Packer,
    stream: &'a StreamRef,
    jobs: &'a [PackJob],
    mode: PackMode,
    bits: usize,
}

/// Offsets in the scratch memory of what follows one another in it.
struct Layout {
    at: usize,
}

impl Layout {
    fn take(&mut self, bytes: usize) -> std::ops::Range<usize> {
        let start = self.at;
        self.at += bytes.next_multiple_of(256);
        start..start + bytes
    }
}

type Made = (Vec<Option<PackedSegment>>, DeviceRange, u64);

impl Round<'_> {
    unsafe fn run(&self, kept: &mut Option<DeviceRange>) -> Result<Made> {
        let device = &self.packer.device;
        let counts = CountPlan::new(self.jobs);
        let mut layout = Layout { at: 0 };
        let segments = layout.take(counts.segments.len());
        let grains = layout.take(4 * counts.grain_count());
        let cells = layout.take(4 * CELLS * self.jobs.len());
        let lists = layout.take(4 * LIST_WORDS * self.jobs.len());
        let scratch = keep(device, kept, layout.at)?;
        let at = |range: &std::ops::Range<usize>| Arg::U64(scratch.addr() + range.start as u64);
        device.write(&scratch.slice(segments.clone())?, &counts.segments)?;
        let count = self.jobs.len() as u32;
        let cell_words = (CELLS * self.jobs.len()) as u64;
        // SAFETY: the arguments are the kernels'; ranges lie in `scratch`, words are the caller's promise.
        unsafe {
            self.launch("tpde_clear", 4096, COUNT_THREADS, 0, &[at(&cells), Arg::U64(cell_words)])?;
            let args = [at(&segments), Arg::U32(count), at(&grains), at(&cells)];
            let blocks = counts.grain_count() as u32;
            self.launch(&format!("tpde_count_{}", self.bits), blocks, COUNT_THREADS, 0, &args)?;
            let args = [at(&cells), at(&lists), Arg::U32(LISTED as u32)];
            self.launch("tpde_list", count, COUNT_THREADS, 0, &args)?;
        }
        self.stream.synchronize()?;
        let listed = self.packer.read_words(&scratch.slice(lists)?)?;
        let changed = self.packer.read_words(&scratch.slice(grains.clone())?)?;
        let heads = self.heads(&counts, &listed, &changed);
        let grains_at = scratch.addr() + grains.start as u64;
        let plan = ChunkPlan::new(self.jobs, self.mode, &heads, &counts, grains_at)?;
        // Grains stay where they are; all else of the first look has been used.
        let most: u64 = changed.iter().map(|&changed| u64::from(changed)).sum();
        let mut layout = Layout { at: 0 };
        let segments = layout.take(plan.segments.len());
        let grains = layout.take(4 * changed.len());
        let chunks = plan.chunk_count() as usize;
        let outcomes = layout.take(4 * OUTCOME_WORDS * chunks);
        let status = layout.take(16 + chunks.div_ceil(32) * 4);
        let cursor = layout.take(4);
        let places = layout.take(8 * chunks);
        let payloads = layout.take(2 * most as usize + 1028 * chunks);
        let scratch = keep(device, kept, layout.at)?;
        let at = |range: &std::ops::Range<usize>| Arg::U64(scratch.addr() + range.start as u64);
        // Where the grains are now.
        let plan = match scratch.addr() + grains.start as u64 {
            same if same == grains_at => plan,
            moved => ChunkPlan::new(self.jobs, self.mode, &heads, &counts, moved)?,
        };
        let bytes: Vec<u8> = changed.iter().flat_map(|word| word.to_le_bytes()).collect();
        device.write(&scratch.slice(grains)?, &bytes)?;
        device.write(&scratch.slice(segments.clone())?, &plan.segments)?;
        device.write(&scratch.slice(status.clone())?, &vec![0; status.len()])?;
        device.write(&scratch.slice(cursor.clone())?, &[0; 4])?;
        let tables = DeviceTables::load(device, &plan.tables)?;
        if plan.count > 0 {
            let status_at = scratch.addr() + status.start as u64;
            let front = [at(&segments), Arg::U32(plan.count), Arg::U64(tables.addr())];
            let rest = [
                at(&cursor),
                at(&payloads),
                Arg::U32((payloads.len() / 4) as u32),
                at(&outcomes),
                Arg::U64(status_at),
                Arg::U64(status_at + 16),
            ];
            let (name, room) = match self.mode {
                PackMode::Sparse => ("encode", Some(PACK_BYTES)),
                PackMode::Flags => ("encode_flags", None),
            };
            let args: Vec<Arg> = front.into_iter().chain(room.map(Arg::U32)).chain(rest).collect();
            let name = format!("tpde_{name}_{}", self.bits);
            // SAFETY: as above.
            unsafe { self.launch(&name, plan.blocks, self.mode.threads(), room.unwrap_or(0), &args) }?;
        }
        self.stream.synchronize()?;
        let (mut made, mut blob_bytes, mut to) = (Vec::new(), 0, Vec::new());
        let told = self.packer.read_words(&scratch.slice(outcomes.clone())?)?;
        let bitmap = self.packer.read_words(&scratch.slice(status.start + 16..status.end)?)?;
        for (number, head) in heads.into_iter().enumerate() {
            let Some(head) = head.filter(|_| !plan.is_left(number, &bitmap)) else {
                plan.skip(number, &mut to);
                made.push(None);
                continue;
            };
            let records = plan.records(number, &told, blob_bytes, &mut to);
            let changed = changed[counts.grains[number]..counts.grains[number + 1]].iter();
            let changed = changed.map(|&grain| u64::from(grain)).sum();
            let segment = PackedSegment { head, records, blob_start: blob_bytes, changed };
            blob_bytes += segment.blob_bytes();
            made.push(Some(segment));
        }
        let blob = self.packer.room(blob_bytes)?;
        if chunks > 0 {
            let bytes: Vec<u8> = to.iter().flat_map(|place| place.to_le_bytes()).collect();
            device.write(&scratch.slice(places.clone())?, &bytes)?;
            let args =
                [at(&outcomes), at(&places), Arg::U32(chunks as u32), at(&payloads), Arg::U64(blob.addr())];
            let blocks = chunks.div_ceil(COUNT_THREADS as usize / 32) as u32;
            // SAFETY: as above; every payload lies in the blob.
            unsafe { self.launch("tpde_gather", blocks, COUNT_THREADS, 0, &args) }?;
            self.stream.synchronize()?;
        }
        Ok((made, blob, blob_bytes))
    }

    /// Heads of all segments, on all cores.
    fn heads(&self, counts: &CountPlan, listed: &[u32], changed: &[u32]) -> Vec<Option<Vec<u8>>> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let each = self.jobs.len().div_ceil(cores).max(1);
        let numbers: Vec<usize> = (0..self.jobs.len()).collect();
        let head = |&number: &usize| {
            let list = &listed[number * LIST_WORDS..(number + 1) * LIST_WORDS];
            counts.head(number, &self.jobs[number], self.mode, list, changed)
        };
        std::thread::scope(|scope| {
            let part = |numbers: &[usize]| numbers.iter().map(head).collect::<Vec<_>>();
            let threads: Vec<_> =
                numbers.chunks(each).map(|numbers| scope.spawn(move || part(numbers))).collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("heads do not panic")).collect()
        })
    }

    unsafe fn launch(
        &self,
        name: &str,
        blocks: u32,
        threads: u32,
        shared_bytes: u32,
        args: &[Arg],
    ) -> Result<()> {
        let shape = Shape { shared_bytes, ..Shape::linear(blocks, threads) };
        // SAFETY: the caller's promise.
        Ok(unsafe { self.packer.kernel(name).launch(&**self.stream, shape, args) }?)
    }
}

/// The scratch memory, at least `bytes` of it.
fn keep(device: &CudaDevice, kept: &mut Option<DeviceRange>, bytes: usize) -> Result<DeviceRange> {
    match kept {
        Some(range) if range.bytes() >= bytes => Ok(range.clone()),
        _ => {
            // What was there goes first.
            *kept = None;
            let range = device.alloc_device(bytes.max(256))?;
            *kept = Some(range.clone());
            Ok(range)
        }
    }
}
