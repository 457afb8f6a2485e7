//! A step between two states that lie on a device, as a whole patch in page-locked host memory.
//!
//! Segments are packed in rounds. Two lanes take them in turn, each a thread with a stream and scratch memory of its
//! own, so that one's heads are made on the host while the other's kernels run; payloads come down and are hashed
//! meanwhile, and so are the states where they lie. What kernels leave (words of 64 bits, segments of too many
//! different steps) is brought down and encoded here.
//!
//! Order: a lane's stream waits for what the caller's stream has been given; a round's payloads are whole when its lane
//! hands it over; a piece of a patch is read behind the event of its copy. Applying is [`crate::DevicePatch`]'s.
#![expect(unsafe_code, reason = "reads addresses that callers bring")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};

use overspill_codec::{Base, BaseKind, CodecChoice, EncodeOptions, EncodedSegment, encode_segment};
use overspill_device::cuda::CudaDevice;
use overspill_device::nvrtc::Nvrtc;
use overspill_device::{Device, DeviceRange, HostExtent, StreamRef};
use overspill_tpde::{BlobHasher, Checkpoint, Coded, LARGE_BLOB_START, PackReport, Parts, StateId};

use crate::decoder::Result;
use crate::landing::{HostBuffers, Landing};
use crate::pack::{Packed, Packer, on_all_cores};
use crate::pack_plan::{PackJob, PackMode};
use crate::state::StateHasher;

/// Lanes that take rounds in turn.
const LANES: usize = 2;
/// Rounds that a large state is packed in: enough to keep two lanes apart, few enough to fill the device.
const ROUNDS: usize = 4;
/// Fewest words of a round: chunks of 2^17 words, a warp each, fill a large GPU twice.
const ROUND_WORDS: usize = 1 << 30;
/// What a first patch takes, as a part of its words' bytes: twice a step of lr 1e-6.
const FIRST_PART: usize = 50;

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
    lanes: [Lane; LANES],
    copier: StreamRef,
    /// Not the caller's: on the default stream a hash would hold up every copy of the lanes.
    hashing: StreamRef,
    /// Bytes of the last patch, from which the room for the next one is guessed.
    last_bytes: AtomicUsize,
}

struct Lane {
    packer: Packer,
    stream: StreamRef,
}

/// Segments that were packed together, and those of them that the host encoded.
struct Round {
    packed: Packed,
    on_host: Vec<EncodedSegment>,
}

impl StepEncoder {
    /// Compiles the kernels for a device, or takes them from the user's cache.
    ///
    /// # Errors
    /// The compiler or the driver.
    pub fn new(device: &Arc<CudaDevice>, nvrtc: &Nvrtc) -> Result<Self> {
        let lane = || -> Result<Lane> {
            Ok(Lane { packer: Packer::new(device, nvrtc)?, stream: device.new_stream("pack")? })
        };
        Ok(Self {
            device: Arc::clone(device),
            lanes: [lane()?, lane()?],
            copier: device.new_stream("patches down")?,
            hashing: device.new_stream("hash")?,
            last_bytes: AtomicUsize::new(0),
        })
    }

    /// Encodes `last` relative to `base` (alone without one), both as they are when `stream` has come past what it has
    /// been given, into memory of `buffers`: the patch is as many of its first bytes as the report says. Waits.
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
        let coded = Parts::plan(base.map(|base| base.tensors), last.tensors)?;
        let jobs: Vec<PackJob> = coded.iter().map(|coded| job(coded, base, last)).collect();
        let rounds = rounds(&jobs);
        let ready = stream.record()?;
        for own in self.lanes.iter().map(|lane| &lane.stream).chain([&self.hashing]) {
            own.wait(&ready)?;
        }
        let guess = match self.last_bytes.load(Ordering::Relaxed) {
            0 => last.tensors.total_bytes() as usize / FIRST_PART,
            bytes => bytes + bytes / 8,
        };
        let mut made = Made::new(last.tensors.tensors().len());
        let mut landing = Landing::new(&*self.device, &self.copier, buffers, guess)?;
        let ids = std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            for (number, lane) in self.lanes.iter().enumerate() {
                let (sender, jobs, rounds) = (sender.clone(), &jobs, &rounds);
                scope.spawn(move || {
                    for number in (number..rounds.len()).step_by(LANES) {
                        // SAFETY: the caller's promise.
                        let round = unsafe { self.pack(lane, &jobs[rounds[number].clone()]) };
                        // Nobody listens any more once an error has been met.
                        if sender.send((number, round)).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            let id_of = |state: Resident<'_>| match state.id {
                Some(id) => Ok(id),
                // SAFETY: the caller's promise.
                None => unsafe { hasher.state_id(&self.hashing, state.tensors, state.addrs) },
            };
            let ids = (base.map(id_of).transpose()?, id_of(last)?);
            let (mut early, mut next) = (BTreeMap::new(), 0);
            for (number, round) in receiver {
                early.insert(number, round);
                while let Some(round) = early.remove(&next) {
                    made.take(&coded[rounds[next].clone()], round?, &mut landing)?;
                    next += 1;
                }
            }
            Ok::<_, crate::Error>(ids)
        });
        // Whatever came of it: the lanes have ended, and when this is over nothing is on its way to the extent.
        let landed = self.copier.synchronize();
        let (base_id, final_id) = ids?;
        landed?;
        let (extent, used_bytes, blob_hash) = landing.finish();
        let base = base.and_then(|base| Some((base.tensors, base_id?)));
        let Made { changed, index, heads } = made;
        let parts = Parts::new(base, (last.tensors, final_id), &changed, index, heads, used_bytes as u64)?;
        let (report, extent) = self.frame(buffers, extent, used_bytes, parts, blob_hash)?;
        self.last_bytes.store(report.packed_bytes as usize, Ordering::Relaxed);
        Ok((report, extent))
    }

    /// Packs one round: kernels first, then the host what they leave.
    unsafe fn pack(&self, lane: &Lane, jobs: &[PackJob]) -> Result<Round> {
        // SAFETY: the caller's promise.
        let packed = unsafe { lane.packer.pack(&lane.stream, jobs, PackMode::Flags) }?;
        let left: Vec<&PackJob> = jobs
            .iter()
            .zip(&packed.segments)
            .filter(|(_, made)| made.is_none())
            .map(|(job, _)| job)
            .collect();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut on_host = Vec::with_capacity(left.len());
        for jobs in left.chunks(cores) {
            let words = jobs.iter().map(|job| {
                let old =
                    if job.spec.base == BaseKind::None { Vec::new() } else { self.read(job.base, job)? };
                Ok((*job, old, self.read(job.last, job)?))
            });
            let words: Vec<(&PackJob, Vec<u8>, Vec<u8>)> = words.collect::<Result<_>>()?;
            let encoded = |number: usize| {
                let (job, old, new) = &words[number];
                encode(job, old, new)
            };
            let (encoded, ()) = on_all_cores(words.len(), encoded, || ());
            for segment in encoded {
                on_host.push(segment?);
            }
        }
        Ok(Round { packed, on_host })
    }

    fn read(&self, addr: u64, job: &PackJob) -> Result<Vec<u8>> {
        let bytes = job.spec.words * job.spec.dtype.word_bytes();
        // SAFETY: the words of a job are the promise of `encode`'s caller; the packer has waited for its stream, which
        // had waited for the caller's.
        let range = unsafe { DeviceRange::from_raw(addr, bytes, Arc::new(())) };
        Ok(self.device.read(&range)?)
    }

    /// Puts the rest of a patch around its payloads, which lie [`LARGE_BLOB_START`] into the extent.
    fn frame(
        &self,
        buffers: &HostBuffers,
        mut extent: HostExtent,
        used_bytes: usize,
        parts: Parts,
        blob_hash: BlobHasher,
    ) -> Result<(PackReport, HostExtent)> {
        let start = parts.blob_start();
        let ([front, behind], report) = parts.finish(blob_hash);
        let payloads = LARGE_BLOB_START..LARGE_BLOB_START + used_bytes;
        if extent.bytes() < report.packed_bytes as usize {
            let mut larger = buffers.take(&*self.device, report.packed_bytes as usize)?;
            larger.as_mut_slice()?[start..start + used_bytes].copy_from_slice(&extent.as_slice()?[payloads]);
            extent = larger;
        } else if start != payloads.start {
            extent.as_mut_slice()?.copy_within(payloads, start);
        }
        let patch = &mut extent.as_mut_slice()?[..report.packed_bytes as usize];
        patch[..start].copy_from_slice(&front);
        patch[start + used_bytes..].copy_from_slice(&behind);
        Ok((report, extent))
    }
}

/// What is known of a patch besides its payloads.
struct Made {
    changed: Vec<u64>,
    index: Vec<u8>,
    heads: Vec<u8>,
}

impl Made {
    fn new(tensors: usize) -> Self {
        Made { changed: vec![0; tensors], index: Vec::new(), heads: Vec::new() }
    }

    /// Notes the segments of a round and has their payloads land.
    fn take(&mut self, coded: &[Coded], round: Round, landing: &mut Landing<'_>) -> Result<()> {
        let Round { packed, on_host } = round;
        let mut on_host = on_host.into_iter();
        for (coded, segment) in coded.iter().zip(&packed.segments) {
            if let Some(segment) = segment {
                self.changed[coded.tensor] += segment.changed;
                self.heads.extend_from_slice(&segment.head);
                segment.records.iter().for_each(|record| self.index.extend_from_slice(&record.to_bytes()));
                landing.add(segment.blob_start, segment.blob_bytes());
                continue;
            }
            let segment = on_host.next().expect("what kernels leave is encoded on the host");
            self.changed[coded.tensor] += segment.stats.changed;
            self.heads.extend_from_slice(&segment.head);
            self.index.extend_from_slice(&segment.index_bytes());
            landing.add_from_host(segment.blob);
        }
        landing.bring(&packed.blob)
    }
}

/// Cuts jobs into rounds of about equal words.
fn rounds(jobs: &[PackJob]) -> Vec<Range<usize>> {
    let total: usize = jobs.iter().map(|job| job.spec.words).sum();
    let most = total.div_ceil(ROUNDS).max(ROUND_WORDS);
    let (mut rounds, mut start, mut words) = (Vec::new(), 0, 0);
    for (number, job) in jobs.iter().enumerate() {
        words += job.spec.words;
        if words >= most || number + 1 == jobs.len() {
            rounds.push(start..number + 1);
            (start, words) = (number + 1, 0);
        }
    }
    rounds
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

#[cfg(test)]
mod tests {
    use overspill_codec::{Dtype, PatchKind, SegmentSpec};

    use super::*;

    fn of_words(words: &[usize]) -> Vec<PackJob> {
        let job = |&words: &usize| {
            let (base, kind) = (BaseKind::Words, PatchKind::Relative);
            let spec = SegmentSpec { dtype: Dtype::Bf16, words, row_words: 0, first_word: 0, base, kind };
            PackJob { spec, base: 0, last: 0 }
        };
        words.iter().map(job).collect()
    }

    #[test]
    fn every_job_is_in_one_round_and_rounds_are_alike() {
        assert!(rounds(&[]).is_empty());
        let few = rounds(&of_words(&[5, 7]));
        assert_eq!((few.len(), few[0].clone()), (1, 0..2));
        let many = of_words(&[1 << 24; 401]);
        let found = rounds(&many);
        assert_eq!(found.len(), ROUNDS);
        assert_eq!(found.first().map(|first| first.len()), Some(101));
        let all: Vec<usize> = found.into_iter().flatten().collect();
        assert_eq!(all, (0..401).collect::<Vec<_>>());
    }
}
