//! Patches on a CUDA device for Python.
//!
//! A tensor comes as (address of its base, address of its final words, bytes); the Python edge holds the tensors
//! for the length of the call, contiguous, on the device that the patch is on, and passes the handle of torch's
//! current stream, behind which the kernels run.

use std::sync::{Arc, Mutex, PoisonError};

use overspill_codec_cuda::{Decoder, DevicePatch, Error, Place};
use overspill_device::{
    Device,
    cuda::{CudaConfig, CudaDevice},
    nvrtc::Nvrtc,
};
use overspill_tpde::{Options, authenticate, expect_base};
use pyo3::prelude::*;

use crate::errors::{device_error, raise, tpde_error};
use crate::tpde::{TpdePatch, state_of};

/// A device and its kernels, opened once.
struct Opened {
    ordinal: usize,
    device: Arc<CudaDevice>,
    decoder: Decoder,
}

static OPENED: Mutex<Vec<Arc<Opened>>> = Mutex::new(Vec::new());

fn opened(ordinal: usize) -> Result<Arc<Opened>, Error> {
    let mut all = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = all.iter().find(|opened| opened.ordinal == ordinal) {
        return Ok(Arc::clone(found));
    }
    let device = CudaDevice::open(CudaConfig { ordinal, ..CudaConfig::default() })?;
    let decoder = Decoder::new(&device, &Nvrtc::find(None)?)?;
    let made = Arc::new(Opened { ordinal, device, decoder });
    all.push(Arc::clone(&made));
    Ok(made)
}

fn error_of(py: Python<'_>, error: &Error) -> PyErr {
    match error {
        Error::Device(error) => device_error(py, error),
        Error::Patch(error) => tpde_error(py, error),
        other => raise(py, "FormatError", other, |_| Ok(())),
    }
}

/// A patch in a CUDA device's memory.
#[pyclass(frozen, module = "overspill._native")]
pub struct TpdeDevicePatch {
    patch: Py<TpdePatch>,
    opened: Arc<Opened>,
    on_device: DevicePatch,
}

#[pymethods]
impl TpdeDevicePatch {
    /// Authenticates `patch` and brings it up to device `ordinal`.
    #[new]
    fn new(
        py: Python<'_>,
        patch: Py<TpdePatch>,
        ordinal: usize,
        memory_bytes: usize,
        threads: usize,
    ) -> PyResult<Self> {
        let inner = &patch.get().0;
        let loaded = py.detach(|| -> Result<_, Error> {
            authenticate(inner, &Options { memory_bytes, threads })?;
            let opened = opened(ordinal)?;
            let on_device = DevicePatch::load(&opened.device, inner)?;
            Ok((opened, on_device))
        });
        let (opened, on_device) = loaded.map_err(|error| error_of(py, &error))?;
        Ok(Self { patch, opened, on_device })
    }

    /// Bytes that it takes on the device.
    #[getter]
    fn device_bytes(&self) -> usize {
        self.on_device.device_bytes()
    }

    /// Applies it to tensors, (base, final, bytes) of each in the order of `tensors()`, behind `stream`; a final of
    /// 0 leaves one out. Waits until it is done; returns the final state's id and the bytes of device memory that
    /// it took beside patch and tensors.
    #[pyo3(signature = (places, stream, *, base_id))]
    fn apply(
        &self,
        py: Python<'_>,
        places: Vec<(u64, u64, u64)>,
        stream: u64,
        base_id: Option<&str>,
    ) -> PyResult<(String, usize)> {
        let known = state_of(base_id)?;
        let patch = &self.patch.get().0;
        let places: Vec<Place> =
            places.into_iter().map(|(base, out, bytes)| Place { base, out, bytes }).collect();
        let applied = py.detach(|| -> Result<_, Error> {
            expect_base(patch, known)?;
            let stream = self.opened.device.wrap_stream(stream)?;
            // SAFETY: the Python edge passes addresses and sizes of contiguous tensors on this device that it holds
            // until this returns, each of them once; their work is on `stream`.
            unsafe { self.on_device.apply(&self.opened.decoder, patch, &stream, &places) }
        });
        let applied = applied.map_err(|error| error_of(py, &error))?;
        Ok((patch.final_id().to_string(), applied.scratch_bytes))
    }
}
