//! Steps of weight sync for Python: states that lie on a CUDA device, hashed and encoded there.
//!
//! A tensor comes as for `crate::tpde`, with an address on the device; the Python edge holds it for the length of the
//! call, contiguous, and passes the handle of torch's current stream, behind which its words are read.

use overspill_codec_cuda::{Error, Resident};
use overspill_device::Device;
use overspill_tpde::{Checkpoint, Kind, StateId};
use pyo3::prelude::*;

use crate::tpde::{RawTensor, state_of};
use crate::tpde_device::{HostMemory, error_of, opened};

/// (base id, final id, raw bytes, packed bytes)
type Report = (Option<String>, String, u64, u64);

/// A state on a device, opened.
struct State {
    tensors: Checkpoint<'static>,
    addrs: Vec<u64>,
}

impl State {
    fn open(label: &str, raw: Vec<RawTensor>) -> Result<Self, Error> {
        let mut tensors = Vec::with_capacity(raw.len());
        let (mut addrs, mut sizes) = (Vec::with_capacity(raw.len()), Vec::with_capacity(raw.len()));
        for (name, dtype, shape, address, bytes) in raw {
            let kind = Kind::from_name(&dtype)
                .ok_or_else(|| misuse(format!("{name:?}: no such dtype as {dtype:?}")))?;
            tensors.push((name, kind, shape));
            addrs.push(address as u64);
            sizes.push(bytes as u64);
        }
        let tensors = Checkpoint::elsewhere(label, tensors)?;
        let wrong = tensors.tensors().iter().zip(sizes).find(|(tensor, bytes)| tensor.bytes != *bytes);
        if let Some((tensor, bytes)) = wrong {
            return Err(misuse(format!("{:?}: {bytes} bytes are not {:?}", tensor.name, tensor.shape)));
        }
        Ok(State { tensors, addrs })
    }

    fn resident(&self, id: Option<StateId>) -> Resident<'_> {
        Resident { tensors: &self.tensors, addrs: &self.addrs, id }
    }
}

fn misuse(what: String) -> Error {
    overspill_tpde::Error::Misuse { what }.into()
}

/// The state id of tensors on device `ordinal`, behind `stream`.
#[pyfunction]
pub fn tpde_device_state_id(
    py: Python<'_>,
    tensors: Vec<RawTensor>,
    ordinal: usize,
    stream: u64,
) -> PyResult<String> {
    let id = py.detach(|| -> Result<_, Error> {
        let state = State::open("checkpoint", tensors)?;
        let opened = opened(ordinal)?;
        let (hasher, _) = opened.steps()?;
        let stream = opened.device.wrap_stream(stream)?;
        // SAFETY: the Python edge passes addresses and sizes of contiguous tensors on this device that it holds until
        // this returns; what writes them is on `stream` already.
        unsafe { hasher.state_id(&stream, &state.tensors, &state.addrs) }
    });
    id.map(|id| id.to_string()).map_err(|error| error_of(py, &error))
}

/// Encodes `final_state` relative to `base` (or alone), tensors on device `ordinal`, behind `stream`: what was packed, and
/// the patch in page-locked memory. Ids that are given are taken to be right, the others hashed.
#[pyfunction]
#[pyo3(signature = (base, final_state, ordinal, stream, *, base_id, final_id))]
pub fn tpde_encode(
    py: Python<'_>,
    base: Option<Vec<RawTensor>>,
    final_state: Vec<RawTensor>,
    ordinal: usize,
    stream: u64,
    base_id: Option<&str>,
    final_id: Option<&str>,
) -> PyResult<(Report, HostMemory)> {
    let (base_id, final_id) = (state_of(base_id)?, state_of(final_id)?);
    let made = py.detach(|| -> Result<_, Error> {
        let base = base.map(|tensors| State::open("base", tensors)).transpose()?;
        let last = State::open("final", final_state)?;
        let opened = opened(ordinal)?;
        let (hasher, encoder) = opened.steps()?;
        let stream = opened.device.wrap_stream(stream)?;
        let base = base.as_ref().map(|base| base.resident(base_id));
        // SAFETY: as in `tpde_device_state_id`.
        unsafe { encoder.encode(&stream, hasher, &opened.buffers, base, last.resident(final_id)) }
    });
    let (report, patch) = made.map_err(|error| error_of(py, &error))?;
    let base_id = report.kind.base().map(|id| id.to_string());
    Ok(((base_id, report.final_id.to_string(), report.raw_bytes, report.packed_bytes), HostMemory(patch)))
}
