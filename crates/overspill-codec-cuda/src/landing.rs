//! Where patches come down: page-locked memory that is used again and again, filled piece by piece and hashed as it fills.
#![expect(unsafe_code, reason = "reads memory that copies have filled")]

use std::sync::{Arc, Mutex, PoisonError};

use overspill_device::cuda::CudaDevice;
use overspill_device::{Device, DeviceRange, Direction, EventRef, HostExtent, HostSlab, RawCopy, StreamRef};
use overspill_tpde::{BlobHasher, LARGE_BLOB_START};

use crate::decoder::Result;

/// Payloads come down, and are hashed, in pieces of at most this size.
const PIECE_BYTES: u64 = 8 << 20;
/// Host memory is made in multiples of this.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Page-locked host memory that patches are made and received in: locking takes longer than a patch does.
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

/// Payloads of segments that follow each other, and where they are.
enum Run {
    Device { start: u64, bytes: u64 },
    Host(Vec<u8>),
}

/// A patch's payloads on their way down, from [`LARGE_BLOB_START`] of an extent on.
pub(crate) struct Landing<'a> {
    device: &'a Arc<CudaDevice>,
    copier: &'a StreamRef,
    buffers: &'a HostBuffers,
    extent: HostExtent,
    at: usize,
    hasher: BlobHasher,
    runs: Vec<Run>,
    /// Freed together at the end: freeing waits for the whole device.
    sources: Vec<DeviceRange>,
}

impl<'a> Landing<'a> {
    /// With room for `guess` bytes of payloads; if they are more, they move.
    pub fn new(
        device: &'a Arc<CudaDevice>,
        copier: &'a StreamRef,
        buffers: &'a HostBuffers,
        guess: usize,
    ) -> Result<Self> {
        let extent = buffers.take(device, LARGE_BLOB_START + guess)?;
        let (at, hasher) = (LARGE_BLOB_START, BlobHasher::new());
        Ok(Landing { device, copier, buffers, extent, at, hasher, runs: Vec::new(), sources: Vec::new() })
    }

    /// The next payloads are `bytes` from `start` of the range that [`Landing::bring`] will be given.
    pub fn add(&mut self, start: u64, bytes: u64) {
        match self.runs.last_mut() {
            Some(Run::Device { start: first, bytes: taken }) if *first + *taken == start => *taken += bytes,
            _ => self.runs.push(Run::Device { start, bytes }),
        }
    }

    /// The next payloads are these.
    pub fn add_from_host(&mut self, payloads: Vec<u8>) {
        self.runs.push(Run::Host(payloads));
    }

    /// Brings what was added down from `source`, whose bytes are written already, and hashes it.
    pub fn bring(&mut self, source: &DeviceRange) -> Result<()> {
        // Held from here on, whatever goes wrong below: copies may be on their way.
        self.sources.push(source.clone());
        let runs = std::mem::take(&mut self.runs);
        self.make_room(runs.iter().map(Run::bytes).sum::<u64>() as usize)?;
        let mut pieces: Vec<(usize, usize, Option<EventRef>)> = Vec::new();
        for run in runs {
            match run {
                Run::Host(payloads) => {
                    let own = self.at..self.at + payloads.len();
                    pieces.push((own.start, own.len(), None));
                    self.at = own.end;
                    self.write(own.start, &payloads);
                }
                Run::Device { start, bytes } => {
                    for offset in (0..bytes).step_by(PIECE_BYTES as usize) {
                        let length = (bytes - offset).min(PIECE_BYTES) as usize;
                        pieces.push((self.at, length, Some(self.send(source, start + offset, length)?)));
                        self.at += length;
                    }
                }
            }
        }
        for (at, length, landed) in pieces {
            if let Some(landed) = landed {
                landed.synchronize()?;
            }
            let address = std::ptr::with_exposed_provenance::<u8>(self.extent.addr() as usize + at);
            // SAFETY: inside of the extent, which is ours, and its copy has passed; other copies write elsewhere.
            self.hasher.add(unsafe { std::slice::from_raw_parts(address, length) });
        }
        Ok(())
    }

    fn send(&self, source: &DeviceRange, start: u64, length: usize) -> Result<EventRef> {
        let copy = RawCopy {
            direction: Direction::Offload,
            src_addr: source.slice(start as usize..start as usize + length)?.addr(),
            dst_addr: self.extent.addr() + self.at as u64,
            bytes: length,
        };
        // SAFETY: `bring` keeps the source, and both ranges live until the encoder has waited for the copier; a piece is
        // read behind its own event, and the extent has room for it.
        unsafe { self.copier.copy(&[copy]) }?;
        Ok(self.copier.record()?)
    }

    fn write(&mut self, at: usize, payloads: &[u8]) {
        let address = std::ptr::with_exposed_provenance_mut::<u8>(self.extent.addr() as usize + at);
        // SAFETY: inside of the extent, which is ours and has room; copies on their way write elsewhere.
        unsafe { std::slice::from_raw_parts_mut(address, payloads.len()) }.copy_from_slice(payloads);
    }

    /// Makes sure that `bytes` more fit; nothing is on its way here between two rounds.
    fn make_room(&mut self, bytes: usize) -> Result<()> {
        if self.at + bytes <= self.extent.bytes() {
            return Ok(());
        }
        // Twice the room: a patch grows a few times at most.
        let mut larger = self.buffers.take(self.device, 2 * (self.at + bytes))?;
        let landed = LARGE_BLOB_START..self.at;
        larger.as_mut_slice()?[landed.clone()].copy_from_slice(&self.extent.as_slice()?[landed]);
        self.extent = larger;
        Ok(())
    }

    /// The extent, the bytes of payloads in it, and their hash.
    pub fn finish(self) -> (HostExtent, usize, BlobHasher) {
        (self.extent, self.at - LARGE_BLOB_START, self.hasher)
    }
}

impl Run {
    fn bytes(&self) -> u64 {
        match self {
            Run::Device { bytes, .. } => *bytes,
            Run::Host(payloads) => payloads.len() as u64,
        }
    }
}
