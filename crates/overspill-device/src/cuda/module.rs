//! Kernels: loading machine code and launching it.

use std::{ffi::CString, ptr, sync::Arc};

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUmodule};

use super::{
    CudaDevice, CudaStream,
    driver::{Context, check},
};
use crate::{
    Error, Result, Stream,
    kernels::Source,
    nvrtc::{Nvrtc, cache::KernelCache},
};

/// Machine code on a device, unloaded when it and all its kernels are dropped.
#[derive(Clone)]
pub struct Module(Arc<Loaded>);

struct Loaded {
    context: Arc<Context>,
    raw: CUmodule,
}

// SAFETY: the driver locks modules; a handle may be used on any thread.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

/// One kernel of a module.
#[derive(Clone)]
pub struct Kernel {
    raw: CUfunction,
    module: Module,
}

// SAFETY: as for `Loaded`.
unsafe impl Send for Kernel {}
// SAFETY: as for `Loaded`.
unsafe impl Sync for Kernel {}

/// Shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks, by x, y and z.
    pub grid: [u32; 3],
    /// Threads a block, by x, y and z.
    pub block: [u32; 3],
    /// Dynamic shared memory a block, in bytes.
    pub shared_bytes: u32,
}

impl Launch {
    /// One-dimensional, without dynamic shared memory.
    #[must_use]
    pub fn linear(blocks: u32, threads: u32) -> Self {
        Self { grid: [blocks, 1, 1], block: [threads, 1, 1], shared_bytes: 0 }
    }
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// An address in device memory or a 64-bit integer.
    U64(u64),
    /// A 32-bit integer.
    U32(u32),
    /// A 32-bit float.
    F32(f32),
}

impl Arg {
    /// The value in the first bytes of 8: devices and hosts with CUDA are little-endian.
    fn bits(self) -> u64 {
        match self {
            Self::U64(value) => value,
            Self::U32(value) => u64::from(value),
            Self::F32(value) => u64::from(value.to_bits()),
        }
    }
}

impl CudaDevice {
    /// Compiles `source` for this device, or takes it from `cache`, and loads it.
    pub fn build(&self, nvrtc: &Nvrtc, cache: &KernelCache, source: &Source) -> Result<Module> {
        let cubin = cache.cubin(nvrtc, source, self.compute_capability()?)?;
        Module::load(&self.context, &cubin)
    }
}

impl Module {
    fn load(context: &Arc<Context>, cubin: &[u8]) -> Result<Self> {
        let _entered = context.enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the compiler made the cubin, or its hash says that it did; the driver copies it.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&raw mut raw, cubin.as_ptr().cast()) })?;
        Ok(Self(Arc::new(Loaded { context: Arc::clone(context), raw })))
    }

    /// A kernel by its name.
    pub fn kernel(&self, name: &str) -> Result<Kernel> {
        let symbol = CString::new(name).unwrap_or_default();
        let _entered = self.0.context.enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the module lives; the name ends with a null.
        let found = unsafe { sys::cuModuleGetFunction(&raw mut raw, self.0.raw, symbol.as_ptr()) };
        check("cuModuleGetFunction", found)?;
        Ok(Kernel { raw, module: self.clone() })
    }
}

impl Kernel {
    /// Enqueues the kernel on a CUDA stream.
    ///
    /// # Safety
    /// `args` match the kernel's parameters in number, order and size, and the memory that they
    /// point to stays allocated, and is used by nothing that is not ordered with this launch, until
    /// an event recorded after it has passed. The module is kept until then too.
    pub unsafe fn launch(&self, stream: &dyn Stream, shape: Launch, args: &[Arg]) -> Result<()> {
        let Some(stream) = stream.as_any().downcast_ref::<CudaStream>() else {
            return Err(Error::Unavailable {
                backend: "cuda",
                reason: "the stream is not CUDA's".to_owned(),
            });
        };
        let _entered = self.module.0.context.enter()?;
        // A block gets more than 48 KiB of static and dynamic shared memory together only if it is asked for.
        if shape.shared_bytes > 0 {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(shape.shared_bytes).unwrap_or(i32::MAX);
            // SAFETY: the function lives with its module.
            check("cuFuncSetAttribute", unsafe { sys::cuFuncSetAttribute(self.raw, attribute, bytes) })?;
        }
        let mut values: Vec<u64> = args.iter().map(|arg| arg.bits()).collect();
        let mut pointers: Vec<*mut std::ffi::c_void> =
            values.iter_mut().map(|value| ptr::from_mut(value).cast()).collect();
        let ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]) = (shape.grid, shape.block);
        // SAFETY: the driver copies the arguments before it returns; the rest is the caller's promise.
        let launched = unsafe {
            sys::cuLaunchKernel(
                self.raw,
                grid_x,
                grid_y,
                grid_z,
                block_x,
                block_y,
                block_z,
                shape.shared_bytes,
                stream.raw(),
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        check("cuLaunchKernel", launched)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: loaded once; by the promise of `launch` no kernel of it runs.
            let _ = unsafe { sys::cuModuleUnload(self.raw) };
        }
    }
}
