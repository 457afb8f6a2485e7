//! Saved tensors of a norm, or of a gate, made again by one kernel; `overspill-device/src/kernels/rebuild.cu` says which.
#![expect(unsafe_code, reason = "launches kernels")]

use std::sync::Arc;

use overspill_device::cuda::{Arg, CudaDevice, Kernel, Launch as Shape};
use overspill_device::nvrtc::{Nvrtc, cache::KernelCache};
use overspill_device::{StreamRef, kernels};

use crate::decoder::Result;
use crate::plan::THREADS;

/// Rebuilds on a device, enqueued and never waited for.
pub struct Again {
    norm: Kernel,
    gate: Kernel,
}

/// Device addresses, all multiples of 16.
#[derive(Debug, Clone, Copy)]
pub struct NormPlaces {
    /// The norm's input in bf16, a row after the other; 0 where `wide` holds it.
    pub narrow: u64,
    /// One 32-bit float a row: the reciprocal of the root of its mean square.
    pub scale: u64,
    /// One bf16 a column.
    pub weight: u64,
    /// Receives the input in 32 bit, or holds it.
    pub wide: u64,
    /// Receives the input times its row's scale, in bf16.
    pub normal: u64,
    /// Receives that times the weight, in bf16.
    pub weighted: u64,
}

impl Again {
    /// Columns of a norm, and values of a gate, come in multiples of this.
    pub const MULTIPLE: u32 = 8;

    /// Compiles the kernels for a device, or takes them from the user's cache.
    ///
    /// # Errors
    /// The compiler or the driver.
    pub fn new(device: &Arc<CudaDevice>, nvrtc: &Nvrtc) -> Result<Self> {
        let module = device.build(nvrtc, &KernelCache::of_user(), &kernels::REBUILD)?;
        Ok(Self { norm: module.kernel("norm_again_bf16")?, gate: module.kernel("gate_again_bf16")? })
    }

    /// Makes `rows` rows of `columns`, which is a multiple of [`Again::MULTIPLE`].
    ///
    /// # Errors
    /// The driver.
    ///
    /// # Safety
    /// The addresses name device memory of these sizes, not overlapping, that stays allocated and that nothing writes
    /// (nor reads, where this writes) until the stream has come past.
    pub unsafe fn norm(
        &self,
        stream: &StreamRef,
        rows: u32,
        columns: u32,
        places: &NormPlaces,
    ) -> Result<()> {
        if rows == 0 || columns == 0 {
            return Ok(());
        }
        let NormPlaces { narrow, scale, weight, wide, normal, weighted } = *places;
        let args = [
            Arg::U64(narrow),
            Arg::U64(scale),
            Arg::U64(weight),
            Arg::U32(columns),
            Arg::U64(wide),
            Arg::U64(normal),
            Arg::U64(weighted),
        ];
        // SAFETY: the kernel's parameters; the memory is the caller's promise.
        Ok(unsafe { self.norm.launch(&**stream, Shape::linear(rows, THREADS), &args) }?)
    }

    /// Makes `count` values, a multiple of [`Again::MULTIPLE`], in bf16: `silu` of `gate`, and `product` of that and `up`.
    ///
    /// # Errors
    /// The driver.
    ///
    /// # Safety
    /// As [`Again::norm`].
    pub unsafe fn gate(
        &self,
        stream: &StreamRef,
        count: u64,
        [gate, up, silu, product]: [u64; 4],
    ) -> Result<()> {
        let blocks = count.div_ceil(u64::from(Self::MULTIPLE * THREADS)) as u32;
        if blocks == 0 {
            return Ok(());
        }
        let args = [gate, up, count, silu, product].map(Arg::U64);
        // SAFETY: as above.
        Ok(unsafe { self.gate.launch(&**stream, Shape::linear(blocks, THREADS), &args) }?)
    }
}
