//! Where patches come down: page-locked memory that is used again and again, filled piece by piece and hashed as it fills.
#![expect(unsafe_code, reason = "reads memory that copies have filled")]

use std::sync::{Mutex, PoisonError};

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
    pub fn take(&self, device: &dyn Device, bytes: usize) -> Result<HostExtent> {
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
    device: &'a dyn Device,
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
        device: &'a dyn Device,
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

#[cfg(test)]
mod tests {
    use overspill_device::sim::{Planted, SimConfig, SimDevice};
    use overspill_tpde::{Checkpoint, Parts, StateId};

    use super::*;

    /// The header of a patch of these payloads, which holds their hash.
    fn header(hasher: BlobHasher, used_bytes: usize) -> Vec<u8> {
        let none = Checkpoint::elsewhere("none", Vec::new()).expect("a state");
        let last = (&none, StateId([0; 16]));
        let parts = Parts::new(None, last, &[], Vec::new(), Vec::new(), used_bytes as u64).expect("a patch");
        let ([front, _], _) = parts.finish(hasher);
        front
    }

    /// Lands rounds of runs, some of them from the host, on a schedule of the simulation's own: whether they are there, and
    /// were when they were hashed.
    fn land(seed: u64, guess: usize, planted: Planted) -> bool {
        let mut rng = fastrand::Rng::with_seed(seed);
        let device = SimDevice::seeded(SimConfig { seed, planted, ..SimConfig::default() });
        let (copier, buffers) = (device.new_stream("down").expect("stream"), HostBuffers::default());
        let mut landing = Landing::new(&*device, &copier, &buffers, guess).expect("room");
        let mut expected = Vec::new();
        for _ in 0..rng.usize(1..5) {
            let source = device.alloc_device(40_000).expect("memory");
            let bytes: Vec<u8> = (0..source.bytes()).map(|_| rng.u8(..)).collect();
            device.write(&source, &bytes);
            let mut at = 0;
            for _ in 0..rng.usize(0..6) {
                let length = rng.usize(0..9000);
                match rng.u8(..3) {
                    0 => {
                        let own: Vec<u8> = (0..length).map(|_| rng.u8(..)).collect();
                        expected.extend_from_slice(&own);
                        landing.add_from_host(own);
                    }
                    _ if at + length <= bytes.len() => {
                        expected.extend_from_slice(&bytes[at..at + length]);
                        landing.add(at as u64, length as u64);
                        // Sometimes with a hole, as where a segment was left to the host.
                        at += length + rng.usize(0..2) * 64;
                    }
                    _ => {}
                }
            }
            landing.bring(&source).expect("comes down");
        }
        copier.synchronize().expect("idle");
        let (extent, used_bytes, hasher) = landing.finish();
        let all = extent.as_slice().expect("settled");
        let is_there = all[LARGE_BLOB_START..][..used_bytes] == expected;
        let mut whole = BlobHasher::new();
        whole.add(&expected);
        is_there && header(hasher, used_bytes) == header(whole, used_bytes)
    }

    #[test]
    fn payloads_land_in_order_whatever_room_was_guessed() {
        for seed in 0..60 {
            for guess in [0, 1000, 1 << 20] {
                assert!(land(seed, guess, Planted::default()), "seed {seed}, guess {guess}");
            }
        }
        let is_noticed = (0..60).any(|seed| !land(seed, 1 << 20, Planted::EventsPassEarly));
        assert!(is_noticed, "a piece that was hashed before it landed went unnoticed");
    }

    #[test]
    fn memory_is_used_again_when_nobody_holds_it() {
        let device = SimDevice::threads();
        let buffers = HostBuffers::default();
        let first = buffers.take(&*device, 5000).expect("memory");
        let second = buffers.take(&*device, 5000).expect("memory");
        assert_ne!(first.addr(), second.addr());
        let addr = first.addr();
        drop(first);
        let third = buffers.take(&*device, 4000).expect("memory");
        assert_eq!(third.addr(), addr);
        drop((second, third));
        let large = buffers.take(&*device, 9 << 20).expect("memory");
        assert_eq!((large.bytes(), buffers.slabs.lock().expect("slabs").len()), (9 << 20, 1));
    }
}
