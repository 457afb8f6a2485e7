//! Runs a plan on a CUDA device.
#![expect(unsafe_code, reason = "launches kernels")]

use std::sync::{Arc, Mutex, PoisonError};

use overspill_codec::{BaseKind, FlatTables};
use overspill_device::cuda::{Arg, CudaDevice, Kernel, Launch as Shape};
use overspill_device::nvrtc::{Nvrtc, cache::KernelCache};
use overspill_device::{Device, DeviceRange, StreamRef, kernels};
use thiserror::Error;

use crate::plan::{Family, Job, LeftChunk, Places, Plan, THREADS, USUAL_SPARSE_BYTES};

/// What a decoder can meet.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The device.
    #[error(transparent)]
    Device(#[from] overspill_device::Error),
    /// The codec, of a head or of a chunk that the host decodes.
    #[error(transparent)]
    Codec(#[from] overspill_codec::CodecError),
    /// The patch.
    #[error(transparent)]
    Patch(#[from] overspill_tpde::Error),
    /// Addresses that do not fit the patch's tensors.
    #[error("{places} places for {tensors} tensors, or places of other sizes")]
    Places {
        /// Tensors of the patch.
        tensors: usize,
        /// Places given.
        places: usize,
    },
    /// A payload's bytes are not what its record promises, or say what no encoder writes.
    #[error("segment {job}, chunk {chunk}: {why}")]
    Malformed {
        /// Which job.
        job: usize,
        /// Chunk within its segment.
        chunk: u32,
        /// What is wrong.
        why: &'static str,
    },
}

/// What this crate's functions return.
pub type Result<T> = std::result::Result<T, Error>;

/// What [`Decoder::apply`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Chunks that it left to the host, untouched.
    pub left: Vec<LeftChunk>,
    /// Jobs that it left to the host, untouched.
    pub host: Vec<usize>,
    /// Device memory that it took beside the patch with its tables, base and final.
    pub scratch_bytes: usize,
}

/// Kernels of one device, ready to launch.
pub struct Decoder {
    device: Arc<CudaDevice>,
    kernels: Vec<(String, Kernel)>,
    /// Segments, status and bitmaps of one application; grows, and is used by one at a time.
    scratch: Mutex<Option<DeviceRange>>,
    shared: SharedMemory,
}

/// The tables of a patch's segments, in device memory: what its heads say, unpacked.
#[derive(Clone)]
pub struct DeviceTables {
    range: DeviceRange,
}

impl DeviceTables {
    /// Brings tables up.
    ///
    /// # Errors
    /// A device without room for them.
    pub fn load(device: &CudaDevice, tables: &FlatTables) -> Result<Self> {
        let bytes: Vec<u8> = tables.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        let range = device.alloc_device(bytes.len())?;
        device.write(&range, &bytes)?;
        Ok(DeviceTables { range })
    }

    /// Address of the first word.
    pub(crate) fn addr(&self) -> u64 {
        self.range.addr()
    }

    /// Bytes that they take.
    pub fn device_bytes(&self) -> usize {
        self.range.bytes()
    }
}

/// Dynamic shared memory of a block of mode S.
#[derive(Debug, Clone, Copy)]
struct SharedMemory {
    /// In the first round.
    usual_bytes: u32,
    /// In the second, of what did not fit: all that a block can have.
    most_bytes: u32,
}

/// Static shared memory of the largest kernel, rounded up; what a block can have beside it.
const STATIC_BYTES: u32 = 32 << 10;

impl Decoder {
    /// Compiles the kernels for a device, or takes them from the user's cache.
    ///
    /// # Errors
    /// The compiler or the driver.
    pub fn new(device: &Arc<CudaDevice>, nvrtc: &Nvrtc) -> Result<Self> {
        let module = device.build(nvrtc, &KernelCache::of_user(), &kernels::TPDE)?;
        let bits = [8, 16, 32];
        let mut names = vec!["tpde_check".to_owned(), "tpde_whole".to_owned()];
        for family in ["sparse", "dense", "planes", "flags", "groups"] {
            names.extend(bits.iter().map(|bits| format!("tpde_{family}_{bits}")));
        }
        let found = names.into_iter().map(|name| Ok((name.clone(), module.kernel(&name)?)));
        let block_bytes = match device.compute_capability()? {
            80 => 163 << 10,
            90 | 100 => 227 << 10,
            _ => 99 << 10,
        };
        let most_bytes = block_bytes - STATIC_BYTES;
        Ok(Decoder {
            device: Arc::clone(device),
            kernels: found.collect::<Result<_>>()?,
            scratch: Mutex::new(None),
            shared: SharedMemory { usual_bytes: most_bytes.min(USUAL_SPARSE_BYTES), most_bytes },
        })
    }

    /// Gives blocks of mode S this much dynamic shared memory at first, at most all there is: more holds denser
    /// chunks, less lets more blocks share a multiprocessor.
    #[must_use]
    pub fn with_sparse_bytes(mut self, bytes: u32) -> Self {
        self.shared.usual_bytes = bytes.min(self.shared.most_bytes);
        self
    }

    /// Decodes `jobs` on `stream` and waits for it. With `check`, every payload is compared with its record's
    /// check before the first word is written.
    ///
    /// # Errors
    /// The device, or payloads that no encoder writes; what has been written by then is unspecified, unless it is
    /// the checks that fail.
    ///
    /// # Safety
    /// `tables` are those that the jobs' segments were parsed into. The addresses of every job name device memory of
    /// the sizes that its segment says, which nothing else uses until this returns; outputs do not overlap each other, nor their base unless they are equal.
    pub unsafe fn apply(
        &self,
        stream: &StreamRef,
        jobs: &[Job<'_>],
        tables: &DeviceTables,
        check: bool,
    ) -> Result<Applied> {
        let plan = self.plan(jobs);
        let mut guard = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = Layout::of(&plan);
        let scratch = match guard.take() {
            Some(range) if range.bytes() >= bytes.total => range,
            _ => self.device.alloc_device(bytes.total)?,
        };
        let mut upload = vec![0; bytes.total];
        upload[..plan.segments.len()].copy_from_slice(&plan.segments);
        self.device.write(&scratch.slice(0..bytes.total)?, &upload)?;
        let at = |offset: usize| scratch.addr() + offset as u64;
        let places = Places {
            segments: at(0),
            tables: tables.range.addr(),
            status: at(bytes.status),
            bitmap: at(bytes.first_bitmap),
        };
        let run = Run { decoder: self, stream, plan: &plan, scratch: &scratch, bytes: &bytes };
        // SAFETY: the caller's promise; scratch is held and used by one application at a time.
        let left = unsafe { run.all(&places, check) }?;
        for whole in &plan.whole {
            // SAFETY: as above.
            unsafe { self.copy_whole(stream, &WholeCopy::of(&jobs[whole.job])) }?;
        }
        stream.synchronize()?;
        *guard = Some(scratch);
        Ok(Applied { left, host: plan.host, scratch_bytes: bytes.total })
    }

    /// Enqueues what decodes a plan, once: chunks beyond a block's usual shared memory are noted and left.
    ///
    /// # Safety
    /// As [`Decoder::apply`], until the stream has come past; the status and the bitmap are the plan's own.
    pub(crate) unsafe fn enqueue(
        &self,
        stream: &StreamRef,
        plan: &Plan,
        places: &Places,
        wholes: &[WholeCopy],
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch(stream, plan, places, |family| family != Family::Check, 0) }?;
        for whole in wholes {
            // SAFETY: as above.
            unsafe { self.copy_whole(stream, whole) }?;
        }
        Ok(())
    }

    /// The device that the kernels are on.
    pub(crate) fn device(&self) -> &Arc<CudaDevice> {
        &self.device
    }

    fn kernel(&self, name: &str) -> &Kernel {
        let found = self.kernels.iter().find(|(own, _)| own == name);
        &found.expect("every kernel of a plan is loaded").1
    }

    unsafe fn copy_whole(&self, stream: &StreamRef, whole: &WholeCopy) -> Result<()> {
        let blocks = whole.bytes.div_ceil(16 * u64::from(THREADS)).clamp(1, 1024) as u32;
        let args = [whole.out, whole.from, whole.bytes].map(Arg::U64);
        // SAFETY: the kernel's arguments; the memory is the caller's promise.
        Ok(unsafe { self.kernel("tpde_whole").launch(&**stream, Shape::linear(blocks, THREADS), &args) }?)
    }

    unsafe fn launch(
        &self,
        stream: &StreamRef,
        plan: &Plan,
        places: &Places,
        which: impl Fn(Family) -> bool,
        only: u64,
    ) -> Result<()> {
        // What a second round is given is what the usual amount did not hold.
        let sparse_bytes = if only == 0 { self.shared.usual_bytes } else { self.shared.most_bytes };
        for launch in plan.launches.iter().filter(|launch| which(launch.family)) {
            let shared_bytes = match launch.family {
                Family::Sparse => sparse_bytes,
                _ => launch.shared_bytes,
            };
            let shape = Shape { shared_bytes, ..Shape::linear(launch.blocks, launch.threads) };
            let args: Vec<Arg> = launch.arguments(places, sparse_bytes, only);
            // SAFETY: the arguments are the kernel's; the memory is the caller's promise.
            unsafe { self.kernel(&launch.kernel).launch(&**stream, shape, &args) }?;
        }
        Ok(())
    }

    /// A plan for this device.
    pub(crate) fn plan(&self, jobs: &[Job<'_>]) -> Plan {
        Plan::new(jobs, self.shared.most_bytes)
    }
}

/// A segment without chunks: addresses of its words and of what they are a copy of (0: zeros).
pub(crate) struct WholeCopy {
    out: u64,
    from: u64,
    bytes: u64,
}

impl WholeCopy {
    pub(crate) fn of(job: &Job<'_>) -> Self {
        let spec = &job.segment.spec;
        let from = if spec.base == BaseKind::None { 0 } else { job.base };
        WholeCopy { out: job.out, from, bytes: (spec.words * spec.dtype.word_bytes()) as u64 }
    }
}

/// What a kernel's status says: chunks that were left, or what is wrong and in which chunk.
pub(crate) fn left_over(status: &[u8], plan: &Plan) -> Result<u32> {
    let field = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|b| status[4 * i + b]));
    let why = match field(0) {
        0 => return Ok(field(2)),
        14 => "the payload's check is not its record's",
        1 => "reserved mode",
        13 => "a change beyond its class",
        _ => "a payload that no encoder writes",
    };
    let LeftChunk { job, chunk } = plan.chunk(field(1));
    Err(Error::Malformed { job, chunk, why })
}

/// Offsets in the scratch memory, which starts with the plan's segments.
pub(crate) struct Layout {
    pub(crate) status: usize,
    pub(crate) first_bitmap: usize,
    second_bitmap: usize,
    pub(crate) total: usize,
}

impl Layout {
    pub(crate) fn of(plan: &Plan) -> Self {
        let status = plan.segments.len().next_multiple_of(16);
        let first_bitmap = status + 16;
        let second_bitmap = first_bitmap + plan.bitmap_bytes();
        Layout { status, first_bitmap, second_bitmap, total: second_bitmap + plan.bitmap_bytes() }
    }
}

/// One application under way.
struct Run<'a> {
    decoder: &'a Decoder,
    stream: &'a StreamRef,
    plan: &'a Plan,
    scratch: &'a DeviceRange,
    bytes: &'a Layout,
}

impl Run<'_> {
    unsafe fn all(&self, places: &Places, check: bool) -> Result<Vec<LeftChunk>> {
        if check {
            // SAFETY: the caller's promise.
            unsafe { self.launch(places, |family| family == Family::Check, 0) }?;
            self.left_over()?;
        }
        // SAFETY: as above.
        unsafe { self.launch(places, |family| family != Family::Check, 0) }?;
        if self.left_over()? == 0 {
            return Ok(Vec::new());
        }
        let first = self.bitmap(self.bytes.first_bitmap)?;
        let second = Places { bitmap: self.scratch.addr() + self.bytes.second_bitmap as u64, ..*places };
        // SAFETY: as above.
        unsafe { self.launch(&second, |family| family == Family::Sparse, places.bitmap) }?;
        self.left_over()?;
        // What the sparse kernel left it has now tried with all of the shared memory.
        let again = self.bitmap(self.bytes.second_bitmap)?;
        Ok(self.plan.left(&first, &again))
    }

    unsafe fn launch(&self, places: &Places, which: impl Fn(Family) -> bool, only: u64) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.decoder.launch(self.stream, self.plan, places, which, only) }
    }

    /// Waits; how many chunks were left, or what is wrong.
    fn left_over(&self) -> Result<u32> {
        self.stream.synchronize()?;
        let status =
            self.decoder.device.read(&self.scratch.slice(self.bytes.status..self.bytes.status + 16)?)?;
        left_over(&status, self.plan)
    }

    fn bitmap(&self, at: usize) -> Result<Vec<u8>> {
        Ok(self.decoder.device.read(&self.scratch.slice(at..at + self.plan.bitmap_bytes())?)?)
    }
}
