//! Many copies in one call of the driver, where it has that (12.8 and later).

use std::{ffi::c_void, ptr};

use cudarc::driver::sys::{
    self, CUdeviceptr, CUmemLocation, CUmemLocationType, CUmemcpyAttributes, CUmemcpySrcAccessOrder,
    CUresult, CUstream,
};

use super::driver::{Context, check};
use crate::{RawCopy, Result};

type Function = unsafe extern "C" fn(
    *mut CUdeviceptr,
    *mut CUdeviceptr,
    *mut usize,
    usize,
    *mut CUmemcpyAttributes,
    *mut usize,
    usize,
    *mut usize,
    CUstream,
) -> CUresult;

/// The driver's batch copy, known to work.
#[derive(Clone, Copy)]
pub struct BatchCopy(Function);

impl BatchCopy {
    /// Looks the function up and tries it on two small copies; `None` where either fails, and
    /// copies then go one by one.
    pub fn probe(context: &Context, stream: CUstream) -> Option<Self> {
        // SAFETY: `Function` is the signature that the 12.8 header gives for this symbol. The
        // library is loaded: a context exists.
        let symbol = unsafe { sys::culib().get::<Function>(b"cuMemcpyBatchAsync\0") }.ok()?;
        let batch = Self(*symbol);
        batch.works(context, stream).unwrap_or(false).then_some(batch)
    }

    fn works(self, context: &Context, stream: CUstream) -> Result<bool> {
        const HALF: usize = 256;
        let _entered = context.enter()?;
        let mut device: CUdeviceptr = 0;
        let mut host: *mut c_void = ptr::null_mut();
        // SAFETY: the context is current; both are freed below.
        unsafe {
            check("cuMemAlloc", sys::cuMemAlloc_v2(&raw mut device, 2 * HALF))?;
            if let Err(error) = check("cuMemHostAlloc", sys::cuMemHostAlloc(&raw mut host, 2 * HALF, 0)) {
                let _ = sys::cuMemFree_v2(device);
                return Err(error);
            }
        }
        // SAFETY: `host` holds 512 bytes of ours.
        unsafe { host.cast::<u8>().write_bytes(0, 2 * HALF) };
        let halves = [0, HALF].map(|offset| RawCopy {
            direction: crate::Direction::Offload,
            src_addr: device + offset as u64,
            dst_addr: host.expose_provenance() as u64 + offset as u64,
            bytes: HALF,
        });
        // SAFETY: both allocations outlive the synchronisation.
        let sent = unsafe {
            check("cuMemsetD8Async", sys::cuMemsetD8Async(device, 0x5A, 2 * HALF, stream))
                .and_then(|()| self.send(&halves, stream))
                .and(check("cuStreamSynchronize", sys::cuStreamSynchronize(stream)))
        };
        // SAFETY: the stream is idle, so the bytes are no longer written; they were zeroed above.
        let arrived = unsafe { std::slice::from_raw_parts(host.cast::<u8>(), 2 * HALF) };
        let right = sent.is_ok() && arrived.iter().all(|&byte| byte == 0x5A);
        // SAFETY: allocated above, not used again.
        unsafe {
            let _ = sys::cuMemFreeHost(host);
            let _ = sys::cuMemFree_v2(device);
        }
        Ok(right)
    }

    /// Enqueues copies, in any order among themselves.
    ///
    /// # Safety
    /// As [`crate::Stream::copy`]; the context is current and `stream` is not a default stream.
    pub unsafe fn send(self, batch: &[RawCopy], stream: CUstream) -> Result<()> {
        let moved = || batch.iter().filter(|copy| copy.bytes > 0);
        let mut to: Vec<CUdeviceptr> = moved().map(|copy| copy.dst_addr).collect();
        let mut from: Vec<CUdeviceptr> = moved().map(|copy| copy.src_addr).collect();
        let mut bytes: Vec<usize> = moved().map(|copy| copy.bytes).collect();
        if bytes.is_empty() {
            return Ok(());
        }
        let nowhere = CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
        let mut attributes = CUmemcpyAttributes {
            srcAccessOrder: CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
            srcLocHint: nowhere,
            dstLocHint: nowhere,
            flags: 0,
        };
        let (mut first, mut failed) = (0, 0);
        // SAFETY: the arrays have `bytes.len()` entries each; one set of attributes from entry 0 on.
        let sent = unsafe {
            (self.0)(
                to.as_mut_ptr(),
                from.as_mut_ptr(),
                bytes.as_mut_ptr(),
                bytes.len(),
                &raw mut attributes,
                &raw mut first,
                1,
                &raw mut failed,
                stream,
            )
        };
        check("cuMemcpyBatchAsync", sent)
    }
}
