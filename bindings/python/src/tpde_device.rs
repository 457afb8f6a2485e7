//! Patches on a CUDA device for Python.
//!
//! A tensor comes as (address of its base, address of its final words, bytes); the Python edge holds the tensors
//! for the length of the call, contiguous, on the device that the patch is on, and passes the handle of torch's
//! current stream, behind which the kernels run.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use overspill_codec_cuda::{
    Decoder, DevicePatch, Error, HostBuffers, Place, Placed, StateHasher, StepEncoder, StreamedPatch,
};
use overspill_device::{
    Device, HostExtent, StreamRef,
    cuda::{CudaConfig, CudaDevice},
    nvrtc::Nvrtc,
};
use overspill_tpde::{Options, authenticate, expect_base, expect_in_place};
use pyo3::prelude::*;

use crate::errors::{device_error, raise, tpde_error};
use crate::tpde::{TpdePatch, state_of};

/// A device and its kernels, opened once.
pub struct Opened {
    ordinal: usize,
    pub device: Arc<CudaDevice>,
    pub decoder: Decoder,
    /// On which patches come up.
    up: StreamRef,
    /// Made when a state is first hashed or encoded.
    steps: OnceLock<(StateHasher, StepEncoder)>,
    /// Page-locked memory of patches.
    pub buffers: HostBuffers,
}

static OPENED: Mutex<Vec<Arc<Opened>>> = Mutex::new(Vec::new());

pub fn opened(ordinal: usize) -> Result<Arc<Opened>, Error> {
    let mut all = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = all.iter().find(|opened| opened.ordinal == ordinal) {
        return Ok(Arc::clone(found));
    }
    let device = CudaDevice::open(CudaConfig { ordinal, ..CudaConfig::default() })?;
    let decoder = Decoder::new(&device, &Nvrtc::find(None)?)?;
    let made = Arc::new(Opened {
        ordinal,
        up: device.new_stream("patches up")?,
        device,
        decoder,
        steps: OnceLock::new(),
        buffers: HostBuffers::default(),
    });
    all.push(Arc::clone(&made));
    Ok(made)
}

impl Opened {
    /// What hashes and encodes states on this device.
    pub fn steps(&self) -> Result<&(StateHasher, StepEncoder), Error> {
        if let Some(made) = self.steps.get() {
            return Ok(made);
        }
        let nvrtc = Nvrtc::find(None)?;
        let made = (StateHasher::new(&self.device, &nvrtc)?, StepEncoder::new(&self.device, &nvrtc)?);
        Ok(self.steps.get_or_init(|| made))
    }
}

pub fn error_of(py: Python<'_>, error: &Error) -> PyErr {
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
            let opened = opened(ordinal)?;
            let authentic = || Ok(authenticate(inner, &Options { memory_bytes, threads })?);
            let on_device = DevicePatch::load(&opened.decoder, &opened.up, inner, authentic)?;
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
            if places.iter().any(|place| place.base == place.out && place.out != 0) {
                expect_in_place(patch)?;
            }
            let stream = self.opened.device.wrap_stream(stream)?;
            // SAFETY: the Python edge passes addresses and sizes of contiguous tensors on this device that it holds
            // until this returns, each of them once; their work is on `stream`.
            unsafe { self.on_device.apply(&self.opened.decoder, patch, &stream, &places) }
        });
        let applied = applied.map_err(|error| error_of(py, &error))?;
        Ok((patch.final_id().to_string(), applied.scratch_bytes))
    }
}

/// A patch whose payloads pass through a CUDA device; its records and tables are there.
#[pyclass(frozen, module = "overspill._native")]
pub struct TpdeStreamedPatch {
    opened: Arc<Opened>,
    streamed: Arc<StreamedPatch>,
}

/// A tensor of a streamed patch that is decoded at fixed addresses.
#[pyclass(frozen, module = "overspill._native")]
pub struct TpdePlaced {
    opened: Arc<Opened>,
    placed: Placed,
}

#[pymethods]
impl TpdeStreamedPatch {
    /// Brings an authenticated patch's records and tables up to device `ordinal`. The patch is not kept.
    #[new]
    fn new(py: Python<'_>, patch: Py<TpdePatch>, ordinal: usize) -> PyResult<Self> {
        let inner = &patch.get().0;
        let loaded = py.detach(|| -> Result<_, Error> {
            let opened = opened(ordinal)?;
            let streamed = Arc::new(StreamedPatch::load(&opened.decoder, inner)?);
            Ok((opened, streamed))
        });
        let (opened, streamed) = loaded.map_err(|error| error_of(py, &error))?;
        Ok(Self { opened, streamed })
    }

    /// Bytes that it takes on the device.
    #[getter]
    fn device_bytes(&self) -> usize {
        self.streamed.device_bytes()
    }

    /// Which payloads number `entry` of `tensors()` needs: (first byte of the section, bytes).
    fn payload(&self, entry: usize) -> (u64, u64) {
        let range = self.streamed.payload(entry);
        (range.start, range.end - range.start)
    }

    /// Plans a tensor: its payloads will be at `payload`, what it starts from at `base`, and its (address, bytes) are
    /// `out`. None where kernels do not decode it.
    fn place(
        &self,
        py: Python<'_>,
        entry: usize,
        payload: u64,
        base: u64,
        out: (u64, u64),
    ) -> PyResult<Option<TpdePlaced>> {
        let place = Place { base, out: out.0, bytes: out.1 };
        let placed = py.detach(|| self.streamed.place(&self.opened.decoder, entry, place, payload));
        let placed = placed.map_err(|error| error_of(py, &error))?;
        Ok(placed.map(|placed| TpdePlaced { opened: Arc::clone(&self.opened), placed }))
    }
}

#[pymethods]
impl TpdePlaced {
    /// Enqueues its decoding on `stream`, behind which its payloads are in place.
    fn enqueue(&self, py: Python<'_>, stream: u64) -> PyResult<()> {
        let enqueued = py.detach(|| -> Result<_, Error> {
            let stream = self.opened.device.wrap_stream(stream)?;
            // SAFETY: the Python edge holds the memory at the addresses that it planned with for as long as this
            // object, and orders the copy of the payloads before and the weights' use behind this on `stream`.
            unsafe { self.placed.enqueue(&self.opened.decoder, &stream) }
        });
        enqueued.map_err(|error| error_of(py, &error))
    }

    /// Waits for `stream`: how many chunks kernels have left undecoded.
    fn left(&self, py: Python<'_>, stream: u64) -> PyResult<u32> {
        let left = py.detach(|| -> Result<_, Error> {
            let stream = self.opened.device.wrap_stream(stream)?;
            self.placed.left(&self.opened.decoder, &stream)
        });
        left.map_err(|error| error_of(py, &error))
    }

    /// Bytes that it takes on the device.
    #[getter]
    fn device_bytes(&self) -> usize {
        self.placed.device_bytes()
    }
}

/// Zeroed host memory that a CUDA device's copy engines reach directly, given back with this object.
#[pyclass(frozen, module = "overspill._native")]
pub struct HostMemory(pub HostExtent);

#[pymethods]
impl HostMemory {
    #[new]
    fn new(py: Python<'_>, ordinal: usize, bytes: usize) -> PyResult<Self> {
        let made = py.detach(|| -> Result<_, Error> {
            Ok(opened(ordinal)?.device.alloc_host(bytes)?.claim(0..bytes)?)
        });
        made.map(HostMemory).map_err(|error| error_of(py, &error))
    }

    /// The same, not zeroed, of memory that is kept for the next patch when this object goes.
    #[staticmethod]
    fn of_patches(py: Python<'_>, ordinal: usize, bytes: usize) -> PyResult<Self> {
        let made = py.detach(|| {
            let opened = opened(ordinal)?;
            opened.buffers.take(&*opened.device, bytes)
        });
        made.map(HostMemory).map_err(|error| error_of(py, &error))
    }

    /// Address of its first byte.
    #[getter]
    fn address(&self) -> u64 {
        self.0.addr()
    }

    /// Length in bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.0.bytes()
    }
}
