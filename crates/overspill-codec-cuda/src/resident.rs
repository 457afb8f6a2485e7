//! A patch in device memory, applied to weights that lie there too.
//!
//! Its bytes are authenticated on the host while they come up ([`overspill_tpde::authenticate`]); what then goes
//! wrong is a base that is not the one the patch was made for. Payloads and records stay on the device as they
//! are in the file, so a patch takes there what it takes on disk.
#![expect(unsafe_code, reason = "writes to addresses that callers bring")]

use std::sync::Arc;

use overspill_codec::{Base, BaseKind, FlatSegment, FlatTables};
use overspill_device::cuda::CudaDevice;
use overspill_device::{Device, DeviceRange, Direction, RawCopy, StreamRef};
use overspill_tpde::Patch;

use crate::decoder::{Applied, Decoder, DeviceTables, Error, Result};
use crate::plan::Job;

/// Payloads are read and sent in pieces of this size.
const PIECE_BYTES: u64 = 64 << 20;

/// Where a tensor lies on the device: its base and its final words; the same address in place. An `out` of 0 leaves
/// the tensor out: it is the same memory as another (tied weights).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// First byte of the base; not used by tensors without one.
    pub base: u64,
    /// First byte of the final words.
    pub out: u64,
    /// Bytes of the final words.
    pub bytes: u64,
}

/// A patch's payloads, records and tables on a device.
pub struct DevicePatch {
    device: Arc<CudaDevice>,
    parts: Parts,
    blob: DeviceRange,
}

/// A patch's records and tables on a device, and its segments.
pub(crate) struct Parts {
    pub(crate) segments: Vec<Part>,
    pub(crate) tables: DeviceTables,
    index: DeviceRange,
}

/// One segment.
pub(crate) struct Part {
    flat: FlatSegment,
    /// Its tensor, as an index of the manifest's entries.
    pub(crate) entry: usize,
    pub(crate) blob_start: u64,
    pub(crate) blob_bytes: usize,
    index_start: usize,
}

// Kernels read whole 32-bit words around a payload's ends.
pub(crate) fn room_for(device: &CudaDevice, bytes: u64) -> overspill_device::Result<DeviceRange> {
    device.alloc_device((bytes as usize).next_multiple_of(256).max(256))
}

impl Parts {
    pub(crate) fn load(device: &CudaDevice, patch: &Patch<'_>) -> Result<Self> {
        let mut tables = FlatTables::new();
        let mut segments = Vec::new();
        for part in patch.segment_parts() {
            let (mut heads, mut index) = (part.heads, part.index);
            let flat = tables.take(part.spec, &mut heads, &mut index)?;
            let index_start = patch.index().len() - part.index.len();
            let (blob_start, blob_bytes) = (part.blob_start, part.blob_bytes);
            segments.push(Part { flat, entry: part.entry, blob_start, blob_bytes, index_start });
        }
        let index = room_for(device, patch.index().len() as u64)?;
        if !patch.index().is_empty() {
            device.write(&index.slice(0..patch.index().len())?, patch.index())?;
        }
        Ok(Parts { segments, tables: DeviceTables::load(device, &tables)?, index })
    }

    pub(crate) fn device_bytes(&self) -> usize {
        self.index.bytes() + self.tables.device_bytes()
    }

    /// The job that decodes a segment whose payloads start at `blob`.
    pub(crate) fn job<'s>(&self, part: &'s Part, place: &Place, blob: u64) -> Job<'s> {
        let (spec, word_bytes) = (&part.flat.spec, part.flat.spec.dtype.word_bytes() as u64);
        let base_bytes = match spec.base {
            BaseKind::Quantized(layout) => spec.first_word / 32 * layout.block_bytes() as u64,
            _ => spec.first_word * word_bytes,
        };
        Job {
            segment: &part.flat,
            base: place.base + base_bytes,
            out: place.out + spec.first_word * word_bytes,
            blob,
            index: self.index.addr() + part.index_start as u64,
        }
    }
}

/// Enqueues copies of a patch's payloads; those of a file are over when this returns.
fn send(stream: &StreamRef, patch: &Patch<'_>, blob: &DeviceRange) -> Result<()> {
    let mut at = 0;
    while at < patch.blob_bytes() {
        let bytes = PIECE_BYTES.min(patch.blob_bytes() - at) as usize;
        let mut scratch = Vec::new();
        let piece = patch.blob(at, bytes, &mut scratch)?;
        let copy = RawCopy {
            direction: Direction::Onboard,
            src_addr: piece.as_ptr().expose_provenance() as u64,
            dst_addr: blob.addr() + at,
            bytes,
        };
        // SAFETY: the range is the caller's and new; the piece is the patch's, which outlives the wait in `load`, or
        // the scratch, for which this waits.
        unsafe { stream.copy(&[copy]) }?;
        if !scratch.is_empty() {
            stream.synchronize()?;
        }
        at += bytes as u64;
    }
    Ok(())
}

impl DevicePatch {
    /// Brings a patch up on `stream` while `authenticate` checks it; what that refuses is not a patch here either.
    ///
    /// # Errors
    /// A patch that cannot be read or is not authentic, or a device without room for it.
    pub fn load(
        decoder: &Decoder,
        stream: &StreamRef,
        patch: &Patch<'_>,
        authenticate: impl FnOnce() -> Result<()>,
    ) -> Result<Self> {
        let device = decoder.device();
        let blob = room_for(device, patch.blob_bytes())?;
        let sent = send(stream, patch, &blob);
        let (parts, checked) = std::thread::scope(|scope| {
            let parts = scope.spawn(|| Parts::load(device, patch));
            let checked = sent.and_then(|()| authenticate());
            (parts.join().expect("tables of a patch that was opened"), checked)
        });
        // Whatever came of it, nothing is on its way any more when this returns.
        stream.synchronize()?;
        checked?;
        Ok(DevicePatch { device: Arc::clone(device), parts: parts?, blob })
    }

    /// Bytes that it takes on the device.
    pub fn device_bytes(&self) -> usize {
        self.blob.bytes() + self.parts.device_bytes()
    }

    /// Applies it: `places` has one for each entry of the manifest. Waits until it is done. `patch` is the one that
    /// was loaded; the host decodes from it what the device does not.
    ///
    /// # Errors
    /// Places of other sizes, before the first write; a base that does not fit, after it.
    ///
    /// # Safety
    /// Every place names device memory of its size (the base's: of the base's size) that nothing else uses until
    /// this returns; no output overlaps another, or a base other than its own at the same address.
    pub unsafe fn apply(
        &self,
        decoder: &Decoder,
        patch: &Patch<'_>,
        stream: &StreamRef,
        places: &[Place],
    ) -> Result<Applied> {
        let entries = patch.manifest().entries();
        let fits = entries.len() == places.len()
            && entries.iter().zip(places).all(|(entry, place)| entry.tensor.bytes == place.bytes);
        if !fits || patch.segment_parts().len() != self.parts.segments.len() {
            return Err(Error::Places { tensors: entries.len(), places: places.len() });
        }
        let numbered = self.parts.segments.iter().enumerate().filter(|(_, part)| places[part.entry].out != 0);
        let (numbers, jobs): (Vec<usize>, Vec<Job<'_>>) = numbered
            .map(|(number, part)| {
                let blob = self.blob.addr() + part.blob_start;
                (number, self.parts.job(part, &places[part.entry], blob))
            })
            .unzip();
        // SAFETY: the caller's promise; blob, index and tables are ours.
        let applied = unsafe { decoder.apply(stream, &jobs, &self.parts.tables, false) }?;
        for left in &applied.left {
            // SAFETY: as above.
            unsafe { self.finish(patch, numbers[left.job], &jobs[left.job], left.chunk as usize) }?;
        }
        for &job in &applied.host {
            for chunk in 0..jobs[job].segment.chunks.max(1) as usize {
                // SAFETY: as above.
                unsafe { self.finish(patch, numbers[job], &jobs[job], chunk) }?;
            }
        }
        Ok(applied)
    }

    /// Decodes on the host what the kernels left: base down, words up.
    unsafe fn finish(&self, patch: &Patch<'_>, number: usize, job: &Job<'_>, chunk: usize) -> Result<()> {
        let spec = &job.segment.spec;
        let word_bytes = spec.dtype.word_bytes();
        let whole = job.segment.chunks == 0;
        let words = if whole {
            0..spec.words
        } else {
            let start = chunk << job.segment.chunk_log2;
            start..(start + (1 << job.segment.chunk_log2)).min(spec.words)
        };
        let lease = |addr: u64, bytes: usize| {
            // SAFETY: inside of the memory that the caller of `apply` promises.
            unsafe { DeviceRange::from_raw(addr, bytes, Arc::new(())) }
        };
        let (base_at, base_bytes) = match spec.base {
            BaseKind::None => (0, 0),
            BaseKind::Words => (words.start * word_bytes, words.len() * word_bytes),
            BaseKind::Quantized(layout) => {
                (words.start / 32 * layout.block_bytes(), words.len() / 32 * layout.block_bytes())
            }
        };
        let old = match base_bytes {
            0 => Vec::new(),
            _ => self.device.read(&lease(job.base + base_at as u64, base_bytes))?,
        };
        let base = match spec.base {
            BaseKind::None => Base::None,
            BaseKind::Words => Base::Words(&old),
            BaseKind::Quantized(layout) => Base::Quantized(layout, &old),
        };
        let mut made = vec![0; words.len() * word_bytes];
        patch.view_segment(number, |view| match whole {
            true => view.decode(base, &mut made),
            false => view.decode_chunk(chunk, base, &mut made),
        })?;
        Ok(self.device.write(&lease(job.out + (words.start * word_bytes) as u64, made.len()), &made)?)
    }
}
