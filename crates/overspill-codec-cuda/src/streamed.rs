//! A patch whose payloads are not on the device but pass through it: each time a tensor is needed its payloads are
//! brought to the same address, and its weights made at the same place.
//!
//! Since addresses never change, everything about a tensor is planned and uploaded once, and decoding it is a few
//! launches that nobody waits for. The caller orders them behind the copy of the payloads and before the weights'
//! use, and brings addresses; it asks [`Placed::left`] once whether kernels decode all of a tensor.
#![expect(unsafe_code, reason = "launches kernels on addresses that callers bring")]

use std::ops::Range;
use std::sync::Arc;

use overspill_device::{Device, DeviceRange, StreamRef};
use overspill_tpde::Patch;

use crate::decoder::{Decoder, Error, Layout, Result, WholeCopy, left_over};
use crate::plan::{Places, Plan};
use crate::resident::{Part, Parts, Place};

/// Payloads of a tensor start on a multiple of this in the blob section, as they do in memory.
const ALIGN_BYTES: u64 = 256;

/// The records and tables of a patch, on a device.
pub struct StreamedPatch {
    parts: Parts,
    /// Final bytes of each entry of the manifest.
    tensor_bytes: Vec<u64>,
}

/// One tensor, with everything that decodes it at fixed addresses.
pub struct Placed {
    plan: Plan,
    places: Places,
    wholes: Vec<WholeCopy>,
    scratch: DeviceRange,
    status: usize,
    /// Keeps the addresses in the plan valid.
    _patch: Arc<StreamedPatch>,
}

impl StreamedPatch {
    /// Brings the records and tables of an authenticated patch up.
    ///
    /// # Errors
    /// Heads that no encoder writes, or a device without room.
    pub fn load(decoder: &Decoder, patch: &Patch<'_>) -> Result<Self> {
        let tensor_bytes = patch.manifest().entries().iter().map(|entry| entry.tensor.bytes).collect();
        Ok(StreamedPatch { parts: Parts::load(decoder.device(), patch)?, tensor_bytes })
    }

    /// Bytes that it takes on the device, [`Placed::device_bytes`] not counted.
    pub fn device_bytes(&self) -> usize {
        self.parts.device_bytes()
    }

    fn of(&self, entry: usize) -> impl Iterator<Item = &Part> {
        self.parts.segments.iter().filter(move |part| part.entry == entry)
    }

    /// What of the blob section must be on the device to decode a tensor, from an aligned byte on.
    pub fn payload(&self, entry: usize) -> Range<u64> {
        let start = self.of(entry).map(|part| part.blob_start).min().unwrap_or(0);
        let end = self.of(entry).map(|part| part.blob_start + part.blob_bytes as u64).max().unwrap_or(0);
        start / ALIGN_BYTES * ALIGN_BYTES..end
    }

    /// Plans a tensor whose [`StreamedPatch::payload`] will be at the address `payload`; `None` where kernels do
    /// not decode all of its modes.
    ///
    /// # Errors
    /// A place of another size, a device without room.
    pub fn place(
        self: &Arc<Self>,
        decoder: &Decoder,
        entry: usize,
        place: Place,
        payload: u64,
    ) -> Result<Option<Placed>> {
        if self.tensor_bytes.get(entry) != Some(&place.bytes) {
            return Err(Error::Places { tensors: self.tensor_bytes.len(), places: 1 });
        }
        let start = self.payload(entry).start;
        let job = |part| self.parts.job(part, &place, payload + (part.blob_start - start));
        let jobs: Vec<_> = self.of(entry).map(job).collect();
        let plan = decoder.plan(&jobs);
        if !plan.host.is_empty() {
            return Ok(None);
        }
        let layout = Layout::of(&plan);
        let scratch = decoder.device().alloc_device(layout.total)?;
        let mut upload = vec![0; layout.total];
        upload[..plan.segments.len()].copy_from_slice(&plan.segments);
        decoder.device().write(&scratch, &upload)?;
        let at = |offset: usize| scratch.addr() + offset as u64;
        let places = Places {
            segments: at(0),
            tables: self.parts.tables.addr(),
            status: at(layout.status),
            bitmap: at(layout.first_bitmap),
        };
        let wholes = plan.whole.iter().map(|whole| WholeCopy::of(&jobs[whole.job])).collect();
        Ok(Some(Placed { plan, places, wholes, scratch, status: layout.status, _patch: Arc::clone(self) }))
    }
}

impl Placed {
    /// Enqueues the decoding.
    ///
    /// # Errors
    /// The driver.
    ///
    /// # Safety
    /// Behind what `stream` has been given so far the payload is at its address; it, the base and the weights'
    /// memory are of the sizes that were planned and used by nothing else until the stream has come past.
    pub unsafe fn enqueue(&self, decoder: &Decoder, stream: &StreamRef) -> Result<()> {
        // SAFETY: the caller's promise; plan, places and scratch are this tensor's own.
        unsafe { decoder.enqueue(stream, &self.plan, &self.places, &self.wholes) }
    }

    /// Waits for `stream`: how many chunks have been left undecoded since the tensor was placed.
    ///
    /// # Errors
    /// A payload that its base does not fit, or the driver.
    pub fn left(&self, decoder: &Decoder, stream: &StreamRef) -> Result<u32> {
        stream.synchronize()?;
        let status = decoder.device().read(&self.scratch.slice(self.status..self.status + 16)?)?;
        left_over(&status, &self.plan)
    }

    /// Bytes that it takes on the device.
    pub fn device_bytes(&self) -> usize {
        self.scratch.bytes()
    }
}
