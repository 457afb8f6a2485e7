//! Norms and gates rebuilt by one kernel, for Python. Decides nothing.

use std::sync::Arc;

use overspill_codec_cuda as on_device;
use overspill_device::{
    Device,
    cuda::{CudaConfig, CudaDevice},
    nvrtc::Nvrtc,
};
use pyo3::prelude::*;

use crate::link::error_of;

/// Makes again what a root-mean-square norm or a gate in bf16 saved, on a CUDA device.
#[pyclass(frozen, module = "overspill._native")]
pub struct Again {
    device: Arc<CudaDevice>,
    kernels: on_device::Again,
}

#[pymethods]
impl Again {
    /// For CUDA device `ordinal`, its kernels compiled.
    #[new]
    fn new(py: Python<'_>, ordinal: usize) -> PyResult<Self> {
        let opened = py.detach(|| -> Result<_, on_device::Error> {
            let device = CudaDevice::open(CudaConfig { ordinal, ..CudaConfig::default() })?;
            let kernels = on_device::Again::new(&device, &Nvrtc::find(None)?)?;
            Ok(Self { device, kernels })
        });
        opened.map_err(|error| error_of(py, &error))
    }

    /// Of `rows` rows of `columns`, a multiple of 8, in bf16 at `narrow`, the 32-bit `scale` of each and a bf16
    /// `weight` of each column: `wide` in 32 bit, and `normal` and `weighted` in bf16, behind what `stream` has been
    /// given. A `narrow` of 0 says that `wide` is there. Addresses are multiples of 16.
    #[expect(clippy::too_many_arguments, reason = "addresses at this border")]
    fn norm(
        &self,
        py: Python<'_>,
        rows: u32,
        columns: u32,
        narrow: u64,
        scale: u64,
        weight: u64,
        wide: u64,
        normal: u64,
        weighted: u64,
        stream: u64,
    ) -> PyResult<()> {
        let places = on_device::NormPlaces { narrow, scale, weight, wide, normal, weighted };
        let enqueued = py.detach(|| -> Result<(), on_device::Error> {
            let stream = self.device.wrap_stream(stream)?;
            // SAFETY: the Python edge passes tensors of this device of these sizes that torch's allocator keeps for
            // the work of `stream`, on which the results were made and all are let go.
            unsafe { self.kernels.norm(&stream, rows, columns, &places) }
        });
        enqueued.map_err(|error| error_of(py, &error))
    }

    /// Of `count` values, a multiple of 8, in bf16 at `gate` and `up`: `silu` and the `product` of that and `up`, behind
    /// what `stream` has been given. Addresses are multiples of 16.
    #[expect(clippy::too_many_arguments, reason = "addresses at this border")]
    fn gate(
        &self,
        py: Python<'_>,
        count: u64,
        gate: u64,
        up: u64,
        silu: u64,
        product: u64,
        stream: u64,
    ) -> PyResult<()> {
        let enqueued = py.detach(|| -> Result<(), on_device::Error> {
            let stream = self.device.wrap_stream(stream)?;
            // SAFETY: as in `norm`.
            unsafe { self.kernels.gate(&stream, count, [gate, up, silu, product]) }
        });
        enqueued.map_err(|error| error_of(py, &error))
    }
}
