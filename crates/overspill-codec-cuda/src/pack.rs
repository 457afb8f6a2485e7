//! Packs segments whose base and final words lie on a device.
//!
//! The device counts; the host makes heads of the counts, on all cores, while the device counts the next segments; then the
//! device packs. Words without a base it packs as planes. What it does not do - rows as context, dense steps, words of 64
//! bits, other bases, planes that repeat themselves - is left to the caller, who encodes those segments with [`overspill_codec::encode_segment`]. Payloads stay on the device, back to
//! back.
#![expect(unsafe_code, reason = "launches kernels")]

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use overspill_codec::ChunkRecord;
use overspill_device::cuda::{Arg, CudaDevice, Kernel, Launch as Shape};
use overspill_device::nvrtc::{Nvrtc, cache::KernelCache};
use overspill_device::{Device, DeviceRange, StreamRef, kernels};

use crate::decoder::Result;
use crate::pack_plan::{COUNT_THREADS, PackJob, PackMode};
use crate::pack_planes::PlanesRound;
use crate::pack_round::Round;

/// Segments that are counted at once: a quarter of a megabyte of counts each.
const SEGMENTS_AT_ONCE: usize = 512;
/// Blocks that copy blobs.
const JOIN_BLOCKS: u32 = 1024;

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

/// Device memory that grows and is kept.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) counting: Option<DeviceRange>,
    pub(crate) packing: Option<DeviceRange>,
}

/// What a round made: of every job, the blobs, and how many bytes of them are taken.
pub(crate) type Made = (Vec<Option<PackedSegment>>, DeviceRange, u64);

/// Kernels of one device, ready to launch.
pub struct Packer {
    pub(crate) device: Arc<CudaDevice>,
    kernels: Vec<(String, Kernel)>,
    /// Used by one at a time.
    scratch: Mutex<Scratch>,
}

impl Packer {
    /// Compiles the kernels for a device, or takes them from the user's cache.
    ///
    /// # Errors
    /// The compiler or the driver.
    pub fn new(device: &Arc<CudaDevice>, nvrtc: &Nvrtc) -> Result<Self> {
        let module = device.build(nvrtc, &KernelCache::of_user(), &kernels::TPDE_ENCODE)?;
        let mut names: Vec<String> =
            ["clear", "list", "gather", "join"].map(|name| format!("tpde_{name}")).into();
        let own =
            ["count", "encode", "encode_flags", "count_planes", "probe", "size_planes", "encode_planes"];
        for bits in [8, 16, 32] {
            names.extend(own.map(|name| format!("tpde_{name}_{bits}")));
        }
        let kernels = names.into_iter().map(|name| Ok((name.clone(), module.kernel(&name)?)));
        Ok(Packer {
            device: Arc::clone(device),
            kernels: kernels.collect::<Result<_>>()?,
            scratch: Mutex::new(Scratch::default()),
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
        for (word_bytes, planes) in [1, 2, 4].into_iter().flat_map(|bytes| [(bytes, false), (bytes, true)]) {
            let is_own = |&i: &usize| {
                let job: &PackJob = &jobs[i];
                let takes = if planes { job.is_for_planes() } else { job.is_for_kernels() };
                takes && job.spec.dtype.word_bytes() == word_bytes
            };
            let own: Vec<usize> = (0..jobs.len()).filter(is_own).collect();
            for numbers in own.chunks(SEGMENTS_AT_ONCE) {
                let jobs: Vec<PackJob> = numbers.iter().map(|&i| jobs[i]).collect();
                // SAFETY: the caller's promise.
                let ran = unsafe {
                    if planes {
                        PlanesRound { packer: self, stream, jobs: &jobs, word_bytes }.run(&mut guard)
                    } else {
                        let bits = 8 * word_bytes;
                        Round { packer: self, stream, jobs: &jobs, mode, bits }.run(&mut guard)
                    }
                };
                if ran.is_err() {
                    // Nothing that was launched reads on; of two errors the first tells more.
                    let _ = stream.synchronize();
                }
                let (made, blob, bytes) = ran?;
                for (&i, made) in numbers.iter().zip(made) {
                    segments[i] = made;
                }
                rounds.push((numbers.to_vec(), blob, bytes));
            }
        }
        // SAFETY: as above.
        unsafe { self.join(stream, segments, rounds) }
    }

    /// One blob of all rounds, of which there is nearly always one.
    unsafe fn join(
        &self,
        stream: &StreamRef,
        mut segments: Vec<Option<PackedSegment>>,
        mut rounds: Vec<(Vec<usize>, DeviceRange, u64)>,
    ) -> Result<Packed> {
        if rounds.len() == 1 {
            let (_, blob, blob_bytes) = rounds.remove(0);
            return Ok(Packed { segments, blob, blob_bytes });
        }
        // Each at a multiple of 16.
        let blob_bytes = rounds.iter().map(|round| round.2.next_multiple_of(16)).sum();
        let blob = self.room(blob_bytes)?;
        let mut at = 0;
        for (numbers, from, bytes) in &rounds {
            let args = [blob.addr() + at, from.addr(), bytes.div_ceil(16)].map(Arg::U64);
            // SAFETY: ranges of whole multiples of 16 bytes that are held until the end.
            unsafe { self.launch(stream, "tpde_join", JOIN_BLOCKS, COUNT_THREADS, 0, &args) }?;
            for &number in numbers {
                if let Some(segment) = &mut segments[number] {
                    segment.blob_start += at;
                }
            }
            at += bytes.next_multiple_of(16);
        }
        stream.synchronize()?;
        Ok(Packed { segments, blob, blob_bytes })
    }

    pub(crate) fn room(&self, bytes: u64) -> Result<DeviceRange> {
        Ok(self.device.alloc_device((bytes as usize).next_multiple_of(256).max(256))?)
    }

    fn kernel(&self, name: &str) -> &Kernel {
        let found = self.kernels.iter().find(|(own, _)| own == name);
        &found.expect("every kernel is loaded").1
    }

    pub(crate) fn read_words(&self, range: &DeviceRange) -> Result<Vec<u32>> {
        let bytes = self.device.read(range)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|&word| u32::from_le_bytes(word)).collect())
    }

    /// # Safety
    /// The arguments are the kernel's; the memory they name is there until the stream has come past.
    pub(crate) unsafe fn launch(
        &self,
        stream: &StreamRef,
        name: &str,
        blocks: u32,
        threads: u32,
        shared_bytes: u32,
        args: &[Arg],
    ) -> Result<()> {
        let shape = Shape { shared_bytes, ..Shape::linear(blocks, threads) };
        // SAFETY: the caller's promise.
        Ok(unsafe { self.kernel(name).launch(&**stream, shape, args) }?)
    }
}

/// Offsets in the scratch memory of what follows one another in it.
pub(crate) struct Layout {
    pub(crate) at: usize,
}

impl Layout {
    pub(crate) fn take(&mut self, bytes: usize) -> Range<usize> {
        let start = self.at;
        self.at += bytes.next_multiple_of(256);
        start..start + bytes
    }
}

/// The scratch memory, at least `bytes` of it.
pub(crate) fn keep(device: &CudaDevice, kept: &mut Option<DeviceRange>, bytes: usize) -> Result<DeviceRange> {
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

/// What `make` makes of each number below `count`, in order, on all cores, and what `meanwhile` does on this thread.
pub(crate) fn on_all_cores<T: Send, R>(
    count: usize,
    make: impl Fn(usize) -> T + Sync,
    meanwhile: impl FnOnce() -> R,
) -> (Vec<T>, R) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let numbers: Vec<usize> = (0..count).collect();
    let part = |numbers: &[usize]| numbers.iter().map(|&number| make(number)).collect::<Vec<T>>();
    std::thread::scope(|scope| {
        let parts = numbers.chunks(count.div_ceil(cores).max(1));
        let threads: Vec<_> = parts.map(|numbers| scope.spawn(|| part(numbers))).collect();
        let done = meanwhile();
        (threads.into_iter().flat_map(|thread| thread.join().expect("does not panic")).collect(), done)
    })
}
