//! The link codec on a device; [`overspill_codec::link_encode`] is the reference and describes the layout.
#![expect(unsafe_code, reason = "launches kernels")]

use std::sync::Arc;

use overspill_codec::{LINK_CHUNK_WORDS, LinkFormat};
use overspill_device::cuda::{Arg, CudaDevice, Kernel, Launch as Shape};
use overspill_device::nvrtc::{Nvrtc, cache::KernelCache};
use overspill_device::{StreamRef, kernels};

use crate::decoder::Result;
use crate::plan::THREADS;

/// Packs and unpacks 16-bit floats on a device, enqueued and never waited for.
pub struct LinkCodec {
    /// bf16 and f16: encode, decode.
    kernels: [[Kernel; 2]; 2],
    publish: Kernel,
}

/// Device addresses of packed words, all multiples of 16.
#[derive(Debug, Clone, Copy)]
pub struct LinkPlaces {
    /// Payload, of at least [`LinkFormat::payload_bound_bytes`].
    pub payload: u64,
    /// Two 32-bit words a chunk of [`LINK_CHUNK_WORDS`].
    pub records: u64,
    /// One 32-bit word, zero before: units of 16 bytes of payload after encoding; after decoding not 0 if a record is
    /// none that an encoder writes (its chunk's number + 1).
    pub counter: u64,
}

impl LinkCodec {
    /// Compiles the kernels for a device, or takes them from the user's cache.
    ///
    /// # Errors
    /// The compiler or the driver.
    pub fn new(device: &Arc<CudaDevice>, nvrtc: &Nvrtc) -> Result<Self> {
        let module = device.build(nvrtc, &KernelCache::of_user(), &kernels::LINK)?;
        let of = |name: &str| module.kernel(name);
        Ok(LinkCodec {
            kernels: [
                [of("link_encode_bf16")?, of("link_decode_bf16")?],
                [of("link_encode_f16")?, of("link_decode_f16")?],
            ],
            publish: of("link_publish")?,
        })
    }

    /// Packs `count` words at `words`, at most 2^34.
    ///
    /// # Errors
    /// The driver.
    ///
    /// # Safety
    /// The addresses name device memory of the sizes above, not overlapping, that stays allocated and that nothing
    /// writes (nor reads, where this writes) until the stream has come past.
    pub unsafe fn encode(
        &self,
        stream: &StreamRef,
        format: LinkFormat,
        words: u64,
        count: u64,
        to: &LinkPlaces,
    ) -> Result<()> {
        let args = [words, count, to.payload, to.records, to.counter].map(Arg::U64);
        // SAFETY: the kernel's parameters; the memory is the caller's promise.
        unsafe { self.launch(0, stream, format, count, &args) }
    }

    /// Unpacks `count` words to `words` from a payload of `payload_bytes`.
    ///
    /// # Errors
    /// The driver.
    ///
    /// # Safety
    /// As [`LinkCodec::encode`].
    pub unsafe fn decode(
        &self,
        stream: &StreamRef,
        format: LinkFormat,
        words: u64,
        count: u64,
        from: &LinkPlaces,
        payload_bytes: u64,
    ) -> Result<()> {
        let args = [words, count, from.payload, payload_bytes, from.records, from.counter].map(Arg::U64);
        // SAFETY: as above.
        unsafe { self.launch(1, stream, format, count, &args) }
    }

    /// Writes the 32-bit `number` to page-locked host memory, by a kernel: no copy engine, and no queue of one, is
    /// between a stream and the host.
    ///
    /// # Errors
    /// The driver.
    ///
    /// # Safety
    /// As [`LinkCodec::encode`]; the device may write at `host`.
    pub unsafe fn publish(&self, stream: &StreamRef, number: u64, host: u64) -> Result<()> {
        let args = [number, host].map(Arg::U64);
        // SAFETY: the kernel's parameters; the memory is the caller's promise.
        Ok(unsafe { self.publish.launch(&**stream, Shape::linear(1, 1), &args) }?)
    }

    unsafe fn launch(
        &self,
        which: usize,
        stream: &StreamRef,
        format: LinkFormat,
        count: u64,
        args: &[Arg],
    ) -> Result<()> {
        let blocks = count.div_ceil(LINK_CHUNK_WORDS as u64) as u32;
        if blocks == 0 {
            return Ok(());
        }
        let kernel = &self.kernels[usize::from(format == LinkFormat::F16)][which];
        // SAFETY: the caller's promise.
        Ok(unsafe { kernel.launch(&**stream, Shape::linear(blocks, THREADS), args) }?)
    }
}
