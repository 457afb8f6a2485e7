//! Calls into the driver: its errors in its own words, and the context they run in.

use std::{ffi::CStr, sync::OnceLock};

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUresult};

use crate::{Error, Result};

/// Turns the driver's answer into ours.
pub fn check(call: &'static str, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(Error::Driver { call, code: result as i32, message: words(result) })
}

fn words(result: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: writes one pointer to a string that lives as long as the library.
    let known = unsafe { sys::cuGetErrorString(result, &raw mut text) } == CUresult::CUDA_SUCCESS;
    if !known || text.is_null() {
        return "unknown error".to_owned();
    }
    // SAFETY: the driver gave a null-terminated string of its own.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Loads and initialises the driver, once; the error says what is missing.
pub fn init() -> Result<()> {
    static ANSWER: OnceLock<Result<()>> = OnceLock::new();
    ANSWER.get_or_init(try_init).clone()
}

fn try_init() -> Result<()> {
    let unavailable = |reason: String| Error::Unavailable { backend: "cuda", reason };
    // SAFETY: looks for the library by name; its initialisers are the driver's own. Asked first
    // because every other call of the binding panics where the library is absent.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable(
            "libcuda.so.1 was not found: install NVIDIA's driver, or use the cpu device".to_owned(),
        ));
    }
    // SAFETY: no preconditions.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_SUCCESS => Ok(()),
        CUresult::CUDA_ERROR_NO_DEVICE => Err(unavailable(
            "the driver is installed but sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES".to_owned(),
        )),
        other => Err(unavailable(format!(
            "the driver does not start: {} (code {}); check nvidia-smi",
            words(other),
            other as i32
        ))),
    }
}

/// Version of the driver's API, as 1000 * major + 10 * minor.
pub fn version() -> Result<i32> {
    init()?;
    let mut version = 0;
    // SAFETY: writes one integer.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    Ok(version)
}

/// Number of devices the process may use.
pub fn device_count() -> Result<usize> {
    init()?;
    let mut count = 0;
    // SAFETY: writes one integer.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// The primary context of a device, retained: the one that PyTorch uses too.
pub struct Context {
    device: CUdevice,
    raw: CUcontext,
}

// SAFETY: a context may be pushed and popped on any thread; the driver locks it.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub fn retain(ordinal: usize) -> Result<Self> {
        let count = device_count()?;
        if ordinal >= count {
            let reason = format!("there is no device {ordinal}: the driver sees {count}");
            return Err(Error::Unavailable { backend: "cuda", reason });
        }
        let mut device = 0;
        let index = i32::try_from(ordinal).unwrap_or(i32::MAX);
        // SAFETY: writes one integer.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, index) })?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the device exists; released once, in `drop`.
        let retained = unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) };
        check("cuDevicePrimaryCtxRetain", retained)?;
        Ok(Self { device, raw })
    }

    /// Makes the context current on this thread until the result is dropped, then puts back
    /// whatever was current before: the thread may be PyTorch's.
    pub fn enter(&self) -> Result<Entered> {
        // SAFETY: the context is retained.
        check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.raw) })?;
        Ok(Entered(std::marker::PhantomData))
    }

    /// Product name.
    pub fn name(&self) -> Result<String> {
        let mut name = [0 as std::ffi::c_char; 256];
        // SAFETY: the length is the buffer's.
        check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), 256, self.device) })?;
        // SAFETY: the driver ends the name with a null within the length it was given.
        Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
    }

    /// Bytes of device memory: free now, and in all.
    pub fn memory_bytes(&self) -> Result<(usize, usize)> {
        let _entered = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two integers.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((free, total))
    }

    /// Compute capability, as 10 * major + minor.
    pub fn compute_capability(&self) -> Result<u32> {
        use sys::CUdevice_attribute as Attribute;
        let major = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        Ok(10 * major + minor)
    }

    /// Number of multiprocessors.
    pub fn multiprocessors(&self) -> Result<u32> {
        self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<u32> {
        let mut value = 0;
        // SAFETY: writes one integer.
        let asked = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, self.device) };
        check("cuDeviceGetAttribute", asked)?;
        Ok(u32::try_from(value).unwrap_or(0))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // At interpreter exit the driver may be gone already, and says so; nothing is left to do.
        // SAFETY: retained once in `retain`.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A context that is current on this thread.
pub struct Entered(std::marker::PhantomData<*const ()>);

impl Drop for Entered {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: pops what `enter` pushed on this same thread (`Entered` is not Send).
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
    }
}
