//! The CUDA device as a rig: the streams' work is done by kernels.

use std::sync::Arc;

use overspill_device::{
    DeviceRange, DeviceRef, Result, StreamRef,
    cuda::{Arg, CudaConfig, CudaDevice, Kernel, Launch},
    kernels,
    nvrtc::{Nvrtc, cache::KernelCache},
};

use super::Rig;

/// Longer than the largest copy of the suite takes by far.
const LINGER_NS: u64 = 3_000_000;

pub struct CudaRig {
    pub cuda: Arc<CudaDevice>,
    device: DeviceRef,
    fill: Kernel,
    fold: Kernel,
    copy: Kernel,
    spin: Kernel,
    seed: u64,
}

impl CudaRig {
    pub fn open(config: CudaConfig, nvrtc: &Nvrtc, seed: u64) -> Result<Self> {
        let cuda = CudaDevice::open(config)?;
        let module = cuda.build(nvrtc, &KernelCache::of_user(), &kernels::MEMORY)?;
        Ok(Self {
            device: Arc::clone(&cuda) as DeviceRef,
            cuda,
            fill: module.kernel("fill")?,
            fold: module.kernel("fold")?,
            copy: module.kernel("copy")?,
            spin: module.kernel("spin")?,
            seed,
        })
    }
}

fn launch(kernel: &Kernel, stream: &StreamRef, shape: Launch, args: &[Arg]) {
    // SAFETY: the arguments are those of the kernels in memory.cu, and the cases keep the ranges
    // that they pass until they have synchronised.
    unsafe { kernel.launch(&**stream, shape, args) }.expect("launch");
}

fn over(range: &DeviceRange) -> Launch {
    Launch::linear(u32::try_from(range.bytes().div_ceil(256)).expect("small").max(1), 256)
}

fn length(range: &DeviceRange) -> Arg {
    Arg::U64(range.bytes() as u64)
}

impl Rig for CudaRig {
    fn device(&self) -> &DeviceRef {
        &self.device
    }

    fn stream(&self) -> StreamRef {
        self.device.new_stream("compute").expect("stream")
    }

    fn fill(&self, stream: &StreamRef, range: &DeviceRange, value: u8) {
        let args = [Arg::U64(range.addr()), length(range), Arg::U32(value.into())];
        launch(&self.fill, stream, over(range), &args);
    }

    fn fold(&self, stream: &StreamRef, range: &DeviceRange, value: u8) {
        let args = [Arg::U64(range.addr()), length(range), Arg::U32(value.into())];
        launch(&self.fold, stream, over(range), &args);
    }

    fn copy(&self, stream: &StreamRef, to: &DeviceRange, from: &DeviceRange) {
        let args = [Arg::U64(to.addr()), Arg::U64(from.addr()), length(to)];
        launch(&self.copy, stream, over(to), &args);
    }

    fn linger(&self, stream: &StreamRef) {
        launch(&self.spin, stream, Launch::linear(1, 1), &[Arg::U64(LINGER_NS)]);
    }

    fn write(&self, range: &DeviceRange, bytes: &[u8]) {
        self.cuda.write(range, bytes).expect("write");
    }

    fn read(&self, range: &DeviceRange) -> Vec<u8> {
        self.cuda.read(range).expect("read")
    }

    fn seed(&self) -> u64 {
        self.seed
    }
}
