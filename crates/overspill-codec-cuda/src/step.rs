//! A step between two states that lie on a device, as a whole patch in page-locked host memory.
//!
//! Both states are hashed where they lie, kernels pack what they can, and nothing but the patch comes down, in pieces
//! that are hashed as they land. What kernels leave (words of 64 bits, tensors without a counterpart) is brought down
//! and encoded here. Applying is [`crate::DevicePatch`]'s.
#![expect(unsafe_code, reason = "reads addresses that callers bring, and memory that copies have filled")]

use std::sync::{Arc, Mutex, PoisonError};

use overspill_codec::{Base, BaseKind, CodecChoice, EncodeOptions, EncodedSegment, encode_segment};
use overspill_device::cuda::CudaDevice;
use overspill_device::nvrtc::Nvrtc;
use overspill_device::{Device, DeviceRange, Direction, EventRef, HostExtent, HostSlab, RawCopy, StreamRef};
use overspill_tpde::{Checkpoint, Coded, PackReport, Parts, StateId};

use crate::decoder::Result;
use crate::pack::{Packed, PackedSegment, Packer};
use crate::pack_plan::{PackJob, PackMode};
use crate::state::StateHasher;

/// Payloads come down, and are hashed, in pieces of this size.
const PIECE_BYTES: usize = 8 << 20;
/// Host memory is made in multiples of this.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A state on a device: what its tensors are, and where, in the order of [`Checkpoint::tensors`].
#[derive(Clone, Copy)]
pub struct Resident<'a> {
    /// The tensors, [`Checkpoint::elsewhere`].
    pub tensors: &'a Checkpoint<'a>,
    /// Their addresses.
    pub addrs: &'a [u64],
    /// The state's id, where the caller knows it; hashed otherwise.
    pub id: Option<StateId>,
}

/// Makes patches of states on one device.
pub struct StepEncoder {
    device: Arc<CudaDevice>,
    packer: Packer,
    copier: StreamRef,
}

/// Payloads of one or more segments that follow each other, and where they are.
enum Run {
    Device { start: u64, bytes: u64 },
    Host(Vec<u8>),
}

impl StepEncoder {
    /// Compiles the kernels for a device, or takes them from the user's cache.
    ///
    /// # Errors
    /// The compiler or the driver.
    pub fn new(device: &Arc<CudaDevice>, nvrtc: &Nvrtc) -> Result<Self> {
        let packer = Packer::new(device, nvrtc)?;
        Ok(Self { device: Arc::clone(device), packer, copier: device.new_stream("patches down")? })
    }

    /// Encodes `last` relative to `base` (alone without one), both as they are when `stream` has come past what it has
    /// been given, into memory of `buffers`. Waits.
    ///
    /// # Errors
    /// The device, host memory, tensors that are quantized.
    ///
    /// # Safety
    /// Every address names device memory of its tensor's size that nobody writes until this returns.
    pub unsafe fn encode(
        &self,
        stream: &StreamRef,
        hasher: &StateHasher,
        buffers: &HostBuffers,
        base: Option<Resident<'_>>,
        last: Resident<'_>,
    ) -> Result<(PackReport, HostExtent)> {
        let id_of = |state: Resident<'_>| match state.id {
            Some(id) => Ok(id),
            // SAFETY: the caller's promise.
            None => unsafe { hasher.state_id(stream, state.tensors, state.addrs) },
        };
        let (base_id, final_id) = (base.map(id_of).transpose()?, id_of(last)?);
        let coded = Parts::plan(base.map(|base| base.tensors), last.tensors)?;
        let jobs: Vec<PackJob> = coded.iter().map(|coded| job(coded, base, last)).collect();
        // SAFETY: the caller's promise.
        let packed = unsafe { self.packer.pack(stream, &jobs, PackMode::Flags) }?;
        let left: Vec<usize> = (0..jobs.len()).filter(|&i| packed.segments[i].is_none()).collect();
        // SAFETY: as above; the packer has waited for the stream.
        let on_host = unsafe { self.encode_on_host(&jobs, &left) }?;

        let mut changed = vec![0; last.tensors.tensors().len()];
        let (mut index, mut heads, mut runs) = (Vec::new(), Vec::new(), Vec::<Run>::new());
        let mut on_host = on_host.into_iter();
        for (coded, segment) in coded.iter().zip(&packed.segments) {
            match (segment, segment.is_none().then(|| on_host.next()).flatten()) {
                (Some(segment), _) => {
                    changed[coded.tensor] += segment.changed;
                    heads.extend_from_slice(&segment.head);
                    segment.records.iter().for_each(|record| index.extend_from_slice(&record.to_bytes()));
                    append(&mut runs, segment);
                }
                (None, Some(segment)) => {
                    changed[coded.tensor] += segment.stats.changed;
                    heads.extend_from_slice(&segment.head);
                    index.extend_from_slice(&segment.index_bytes());
                    runs.push(Run::Host(segment.blob));
                }
                (None, None) => unreachable!("what kernels leave is encoded on the host"),
            }
        }
        let used_bytes = runs.iter().map(Run::bytes).sum();
        let base = base.and_then(|base| Some((base.tensors, base_id?)));
        let parts = Parts::new(base, (last.tensors, final_id), &changed, index, heads, used_bytes)?;
        self.bring_down(buffers, &packed, runs, parts)
    }

    /// Brings segments down and encodes them, on all cores and as many at a time.
    unsafe fn encode_on_host(&self, jobs: &[PackJob], left: &[usize]) -> Result<Vec<EncodedSegment>> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut made = Vec::with_capacity(left.len());
        for numbers in left.chunks(cores) {
            let read = |addr: u64, job: &PackJob| {
                let bytes = job.spec.words * job.spec.dtype.word_bytes();
                // SAFETY: the caller's promise.
                let range = unsafe { DeviceRange::from_raw(addr, bytes, Arc::new(())) };
                self.device.read(&range)
            };
            let words = numbers.iter().map(|&number| {
                let job = &jobs[number];
                let old = if job.spec.base == BaseKind::None { Vec::new() } else { read(job.base, job)? };
                Ok((job, old, read(job.last, job)?))
            });
            let words: Vec<(&PackJob, Vec<u8>, Vec<u8>)> = words.collect::<Result<_>>()?;
            let encoded: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> =
                    words.iter().map(|(job, old, new)| scope.spawn(move || encode(job, old, new))).collect();
                threads.into_iter().map(|thread| thread.join().expect("encoders do not panic")).collect()
            });
            for segment in encoded {
                made.push(segment?);
            }
        }
        Ok(made)
    }

    /// Copies payloads to their place in the patch, hashes each piece as it lands, and puts the rest around them.
    fn bring_down(
        &self,
        buffers: &HostBuffers,
        packed: &Packed,
        runs: Vec<Run>,
        mut parts: Parts,
    ) -> Result<(PackReport, HostExtent)> {
        let mut extent = buffers.take(&self.device, parts.total_bytes())?;
        let start = parts.blob_start();
        let mut at = start;
        let mut pieces: Vec<(usize, usize, Option<EventRef>)> = Vec::new();
        for run in runs {
            match run {
                Run::Host(bytes) => {
                    // No copy of ours writes there.
                    extent.as_mut_slice()?[at..at + bytes.len()].copy_from_slice(&bytes);
                    pieces.push((at, bytes.len(), None));
                    at += bytes.len();
                }
                Run::Device { start, bytes } => {
                    for offset in (0..bytes).step_by(PIECE_BYTES) {
                        let length = (bytes - offset).min(PIECE_BYTES as u64) as usize;
                        let copy = RawCopy {
                            direction: Direction::Offload,
                            src_addr: packed.blob.addr() + start + offset,
                            dst_addr: extent.addr() + at as u64,
                            bytes: length,
                        };
                        // SAFETY: both ranges are held here until every event below has passed; each piece is read
                        // behind its own.
                        unsafe { self.copier.copy(&[copy]) }?;
                        pieces.push((at, length, Some(self.copier.record()?)));
                        at += length;
                    }
                }
            }
        }
        for (at, length, landed) in pieces {
            if let Some(landed) = landed {
                landed.synchronize()?;
            }
            let address = std::ptr::with_exposed_provenance::<u8>(extent.addr() as usize + at);
            // SAFETY: inside of the extent, and its copy has passed; other copies write elsewhere.
            parts.add_blob(unsafe { std::slice::from_raw_parts(address, length) });
        }
        let ([front, behind], report) = parts.finish();
        let patch = extent.as_mut_slice()?;
        patch[..start].copy_from_slice(&front);
        patch[at..].copy_from_slice(&behind);
        Ok((report, extent))
    }
}

fn job(coded: &Coded, base: Option<Resident<'_>>, last: Resident<'_>) -> PackJob {
    let offset_bytes = coded.spec.first_word * coded.spec.dtype.word_bytes() as u64;
    let against = base.zip(coded.base).map_or(0, |(base, number)| base.addrs[number] + offset_bytes);
    PackJob { spec: coded.spec, base: against, last: last.addrs[coded.tensor] + offset_bytes }
}

fn encode(job: &PackJob, old: &[u8], new: &[u8]) -> Result<EncodedSegment> {
    let base = if job.spec.base == BaseKind::None { Base::None } else { Base::Words(old) };
    let options = EncodeOptions {
        codec: CodecChoice::Gpu,
        row_words: job.spec.row_words,
        first_word: job.spec.first_word,
        ..EncodeOptions::default()
    };
    Ok(encode_segment(base, new, job.spec.dtype, &options)?)
}

fn append(runs: &mut Vec<Run>, segment: &PackedSegment) {
    match runs.last_mut() {
        Some(Run::Device { start, bytes }) if *start + *bytes == segment.blob_start => {
            *bytes += segment.blob_bytes();
        }
        _ => runs.push(Run::Device { start: segment.blob_start, bytes: segment.blob_bytes() }),
    }
}

impl Run {
    fn bytes(&self) -> u64 {
        match self {
            Run::Device { bytes, .. } => *bytes,
            Run::Host(bytes) => bytes.len() as u64,
        }
    }
}

/// Page-locked host memory that patches are made and received in, used again and again: locking takes longer than a
/// patch does.
#[derive(Default)]
pub struct HostBuffers {
    slabs: Mutex<Vec<HostSlab>>,
}

impl HostBuffers {
    /// `bytes` of it, back with this when the extent is dropped. What nobody holds and is too small is given back to the
    /// system first.
    ///
    /// # Errors
    /// No memory.
    pub fn take(&self, device: &CudaDevice, bytes: usize) -> Result<HostExtent> {
        let mut slabs = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = slabs.iter().filter(|slab| slab.bytes() >= bytes);
        if let Some(extent) = fits.filter_map(|slab| slab.claim(0..bytes).ok()).next() {
            return Ok(extent);
        }
        slabs.retain(|slab| slab.claim(0..slab.bytes()).is_err());
        // Steps differ in length: a quarter more spares the next one.
        let slab = device.alloc_host((bytes + bytes / 4).next_multiple_of(HUGE_PAGE_BYTES))?;
        let extent = slab.claim(0..bytes)?;
        slabs.push(slab);
        Ok(extent)
    }
}
