//! State ids: what a checkpoint is, whatever file it lies in.
//!
//! A segment hashes to the 128-bit XXH3 of its bytes; a tensor to BLAKE3 of its name, type, shape and segment
//! hashes; a state to BLAKE3 of its tensors' hashes in order of name, cut to 128 bits. Segments may be hashed in
//! any order and on any thread. Order of tensors in a file, sharding and free-form metadata are not part of it.
//!
//! An id tells states apart that nobody forged; `docs/tpde-format.md` says what it does not promise.

use std::fmt;
use std::str::FromStr;

use overspill_codec::segments;
use twox_hash::XxHash3_128;

use crate::checkpoint::{Checkpoint, Tensor};
use crate::work::{Meter, Options, Progress, Workers};
use crate::{Result, store::Store};

/// Content id of a set of named tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StateId(pub [u8; 16]);

impl fmt::Display for StateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for StateId {
    type Err = &'static str;

    /// Exactly the 32 lower-case digits that `Display` prints.
    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        const WHY: &str = "not 32 lower-case hexadecimal digits";
        let digits: Vec<u8> = text
            .bytes()
            .map(|c| match c {
                b'0'..=b'9' => Ok(c - b'0'),
                b'a'..=b'f' => Ok(c - b'a' + 10),
                _ => Err(WHY),
            })
            .collect::<std::result::Result<_, _>>()?;
        let (pairs, rest) = digits.as_chunks::<2>();
        let bytes: Vec<u8> = pairs.iter().map(|[high, low]| high << 4 | low).collect();
        if !rest.is_empty() {
            return Err(WHY);
        }
        bytes.try_into().map(StateId).map_err(|_| WHY)
    }
}

/// XXH3 of one segment's bytes.
pub type SegmentHash = [u8; 16];

/// The hash of a segment's bytes: what a device that hashes must come to.
pub fn hash_segment(bytes: &[u8]) -> SegmentHash {
    XxHash3_128::oneshot(bytes).to_le_bytes()
}

/// Gathers tensors in order of name, each with its segments' hashes in order.
#[derive(Debug)]
pub(crate) struct StateHasher(blake3::Hasher);

impl StateHasher {
    pub fn new() -> Self {
        StateHasher(blake3::Hasher::new_derive_key("overspill tpde state 1"))
    }

    pub fn add(&mut self, tensor: &Tensor, hashes: &[SegmentHash]) {
        let mut hasher = blake3::Hasher::new_derive_key("overspill tpde tensor 1");
        hasher.update(&(tensor.name.len() as u64).to_le_bytes());
        hasher.update(tensor.name.as_bytes());
        hasher.update(&[tensor.kind.code()]);
        hasher.update(&(tensor.shape.len() as u64).to_le_bytes());
        for dim in &tensor.shape {
            hasher.update(&dim.to_le_bytes());
        }
        for hash in hashes {
            hasher.update(hash);
        }
        self.0.update(hasher.finalize().as_bytes());
    }

    pub fn finish(&self) -> StateId {
        let hash = self.0.finalize();
        let (id, _) = hash.as_bytes().split_first_chunk::<16>().unwrap_or((&[0; 16], &[]));
        StateId(*id)
    }
}

/// The state id of a checkpoint. Reads all of it, on all cores.
///
/// # Errors
/// Files that cannot be read or end early.
pub fn state_id(checkpoint: &Checkpoint<'_>, options: &Options, progress: Progress<'_>) -> Result<StateId> {
    let workers = Workers::new(options, checkpoint.largest_segment_bytes())?;
    let meter = Meter::new(progress, checkpoint.total_bytes());
    hash_checkpoint(checkpoint, &workers, &meter)
}

pub(crate) fn hash_checkpoint(
    checkpoint: &Checkpoint<'_>,
    workers: &Workers,
    meter: &Meter<'_>,
) -> Result<StateId> {
    struct Job<'c> {
        tensor: &'c Tensor,
        store: &'c Store<'c>,
        first_word: u64,
        words: usize,
    }
    let tensors: Vec<&Tensor> = checkpoint.sorted().collect();
    let jobs: Vec<Job<'_>> = tensors
        .iter()
        .flat_map(|&tensor| {
            let store = checkpoint.store(tensor);
            segments(tensor.words()).map(move |(first_word, words)| Job { tensor, store, first_word, words })
        })
        .collect();
    let mut hashes = Vec::with_capacity(jobs.len());
    workers.run(
        &jobs,
        |job| job.tensor.kind.bytes_of(job.words as u64) as usize,
        |job| {
            let mut scratch = workers.buffer();
            let bytes = job.tensor.read(job.store, job.first_word, job.words, &mut scratch)?;
            let hash = hash_segment(bytes);
            meter.add(bytes.len());
            workers.give_back(scratch);
            Ok(hash)
        },
        |_, hash| {
            hashes.push(hash);
            Ok(())
        },
    )?;
    Ok(state_id_of(checkpoint, &hashes))
}

/// The id of a state whose segments were hashed already, all of them: tensors in order of name, segments in theirs.
///
/// # Panics
/// Another number of hashes than segments.
pub fn state_id_of(checkpoint: &Checkpoint<'_>, hashes: &[SegmentHash]) -> StateId {
    let mut hasher = StateHasher::new();
    let mut rest = hashes;
    for tensor in checkpoint.sorted() {
        let (own, others) = rest.split_at(segments(tensor.words()).count());
        hasher.add(tensor, own);
        rest = others;
    }
    assert!(rest.is_empty(), "more hashes than segments");
    hasher.finish()
}
