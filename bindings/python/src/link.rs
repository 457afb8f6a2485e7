//! The link codec for Python: what crosses STORM's link compressed.
//!
//! A code is one run of bytes: the records of all chunks, padded to 16 bytes, then the payload. On a CUDA device
//! kernels are enqueued behind torch's current stream and nothing waits; without one the reference codec runs
//! here and now. Decides nothing.

use std::sync::Arc;

use overspill_codec::{LINK_CHUNK_WORDS, LinkFormat, LinkPacked, link_decode, link_encode};
use overspill_codec_cuda as on_device;
use overspill_device::{
    Device,
    cuda::{CudaConfig, CudaDevice},
    nvrtc::Nvrtc,
};
use pyo3::prelude::*;

use crate::errors::{device_error, raise};
use crate::tpde::{bytes_at, out_at};

/// Bytes that payloads start on.
const UNIT: usize = 16;

/// Packs 16-bit floats for a copy over a link and back, without loss.
#[pyclass(frozen, module = "overspill._native")]
pub struct LinkCodec(On);

enum On {
    Host,
    Device { device: Arc<CudaDevice>, codec: Box<on_device::LinkCodec> },
}

fn format_of(is_half: bool) -> LinkFormat {
    if is_half { LinkFormat::F16 } else { LinkFormat::Bf16 }
}

fn chunks_of(nbytes: usize) -> usize {
    (nbytes / 2).div_ceil(LINK_CHUNK_WORDS)
}

/// Bytes of the records, padding included: where the payload starts.
fn head_bytes(nbytes: usize) -> usize {
    (8 * chunks_of(nbytes)).next_multiple_of(UNIT)
}

pub fn error_of(py: Python<'_>, error: &on_device::Error) -> PyErr {
    match error {
        on_device::Error::Device(error) => device_error(py, error),
        other => raise(py, "DeviceError", other, |_| Ok(())),
    }
}

#[pymethods]
impl LinkCodec {
    /// The codec of CUDA device `ordinal`, its kernels compiled; without one, the reference codec of the host.
    #[new]
    #[pyo3(signature = (ordinal=None))]
    fn new(py: Python<'_>, ordinal: Option<usize>) -> PyResult<Self> {
        let Some(ordinal) = ordinal else { return Ok(Self(On::Host)) };
        let opened = py.detach(|| -> Result<_, on_device::Error> {
            let device = CudaDevice::open(CudaConfig { ordinal, ..CudaConfig::default() })?;
            let codec = Box::new(on_device::LinkCodec::new(&device, &Nvrtc::find(None)?)?);
            Ok(On::Device { device, codec })
        });
        opened.map(Self).map_err(|error| error_of(py, &error))
    }

    /// Most bytes of a code of `nbytes`.
    #[staticmethod]
    fn bound_bytes(nbytes: usize) -> usize {
        head_bytes(nbytes) + nbytes.next_multiple_of(UNIT)
    }

    /// Bytes of a code of `nbytes` whose counter says `units`.
    #[staticmethod]
    fn code_bytes(nbytes: usize, units: usize) -> usize {
        head_bytes(nbytes) + UNIT * units
    }

    /// Codes `nbytes` at `words` into `bound_bytes` at `code`, both on 16 bytes, and adds the payload's length
    /// in 16 bytes to the 32-bit `counter`, behind what `stream` has been given; what the counter says then goes to
    /// `length` in (page-locked) host memory. `is_half`: fp16, not bf16.
    #[expect(clippy::too_many_arguments, reason = "addresses at this border")]
    fn encode(
        &self,
        py: Python<'_>,
        words: u64,
        nbytes: usize,
        is_half: bool,
        code: u64,
        counter: u64,
        length: u64,
        stream: u64,
    ) -> PyResult<()> {
        let format = format_of(is_half);
        let On::Device { device, codec } = &self.0 else {
            return py
                .detach(|| encode_here(words, nbytes, format, code, length))
                .map_err(|error| raise(py, "FormatError", &error, |_| Ok(())));
        };
        let to = on_device::LinkPlaces { payload: code + head_bytes(nbytes) as u64, records: code, counter };
        let enqueued = py.detach(|| -> Result<(), on_device::Error> {
            let stream = device.wrap_stream(stream)?;
            // SAFETY: the Python edge passes tensors of this device of these sizes that torch's allocator keeps
            // for the work of `stream`, on which they were made and are let go; `length` is not given to another
            // code before an event behind this has passed.
            unsafe {
                codec.encode(&stream, format, words, nbytes as u64 / 2, &to)?;
                codec.publish(&stream, counter, length)
            }
        });
        enqueued.map_err(|error| error_of(py, &error))
    }

    /// Makes `nbytes` at `words` of the `code_bytes` at `code`, behind what `stream` has been given. The 32-bit
    /// `status` becomes other than 0 if this is no code.
    #[expect(clippy::too_many_arguments, reason = "addresses at this border")]
    fn decode(
        &self,
        py: Python<'_>,
        words: u64,
        nbytes: usize,
        is_half: bool,
        code: u64,
        code_bytes: usize,
        status: u64,
        stream: u64,
    ) -> PyResult<()> {
        let (format, head) = (format_of(is_half), head_bytes(nbytes));
        let payload_bytes = code_bytes.saturating_sub(head);
        let On::Device { device, codec } = &self.0 else {
            return py
                .detach(|| decode_here(words, nbytes, format, code, payload_bytes))
                .map_err(|error| raise(py, "FormatError", &error, |_| Ok(())));
        };
        let from = on_device::LinkPlaces { payload: code + head as u64, records: code, counter: status };
        let enqueued = py.detach(|| -> Result<(), on_device::Error> {
            let stream = device.wrap_stream(stream)?;
            // SAFETY: as in `encode`.
            unsafe { codec.decode(&stream, format, words, nbytes as u64 / 2, &from, payload_bytes as u64) }
        });
        enqueued.map_err(|error| error_of(py, &error))
    }
}

fn encode_here(
    words: u64,
    nbytes: usize,
    format: LinkFormat,
    code: u64,
    length: u64,
) -> Result<(), overspill_codec::CodecError> {
    let packed = link_encode(format, bytes_at(words as usize, nbytes))?;
    let (head, payload) =
        out_at(code as usize, LinkCodec::bound_bytes(nbytes)).split_at_mut(head_bytes(nbytes));
    for (place, value) in head.as_chunks_mut::<4>().0.iter_mut().zip(packed.records.as_flattened()) {
        *place = value.to_ne_bytes();
    }
    payload[..packed.payload.len()].copy_from_slice(&packed.payload);
    out_at(length as usize, 4).copy_from_slice(&((packed.payload.len() / UNIT) as u32).to_ne_bytes());
    Ok(())
}

fn decode_here(
    words: u64,
    nbytes: usize,
    format: LinkFormat,
    code: u64,
    payload_bytes: usize,
) -> Result<(), overspill_codec::CodecError> {
    let head = head_bytes(nbytes);
    let (head, payload) = bytes_at(code as usize, head + payload_bytes).split_at(head);
    let fields: Vec<u32> = head.as_chunks::<4>().0.iter().map(|field| u32::from_ne_bytes(*field)).collect();
    let records = fields.as_chunks::<2>().0[..chunks_of(nbytes)].to_vec();
    link_decode(format, &LinkPacked { payload: payload.to_vec(), records }, out_at(words as usize, nbytes))
}
