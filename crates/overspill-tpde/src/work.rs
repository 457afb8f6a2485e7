//! Segments over cores, within a memory budget, results in order.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

use crate::buffer::Buffer;
use crate::{Error, Result};

/// Called with (bytes done, bytes in all), from any thread.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// How much of the machine an operation may take.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Most bytes of buffers at any time. Small budgets mean fewer threads; one segment is the least.
    pub memory_bytes: usize,
    /// Most threads, 0 for one a core.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options { memory_bytes: 1536 << 20, threads: 0 }
    }
}

/// Whether [`stop`] was called.
static STOP: AtomicBool = AtomicBool::new(false);

/// Ends every operation of this process before its next segment, with [`Error::Stopped`] and without an output: for
/// programs that are told to end. There is no way back. Returns whether it was called before.
pub fn stop() -> bool {
    STOP.swap(true, Ordering::Relaxed)
}

/// Buffers that one segment in work needs, in multiples of its raw bytes: base, final, encoder's scratch.
const BUFFERS_A_SEGMENT: usize = 6;

/// A pool of as many threads as the memory budget feeds.
#[derive(Debug)]
pub(crate) struct Workers {
    pool: rayon::ThreadPool,
    group_bytes: usize,
    buffers: Mutex<Vec<Buffer>>,
}

impl Workers {
    pub fn new(options: &Options, largest_segment_bytes: usize) -> Result<Self> {
        let cores = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let fed = options.memory_bytes / (BUFFERS_A_SEGMENT * largest_segment_bytes.max(1));
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(cores.min(fed).max(1))
            .build()
            .map_err(|error| Error::misuse(format!("cannot start threads: {error}")))?;
        Ok(Workers { pool, group_bytes: options.memory_bytes / 4, buffers: Mutex::default() })
    }

    /// Runs `work` on every job, in groups of bounded size, and hands results to `sink` in order.
    pub fn run<J: Sync, R: Send>(
        &self,
        jobs: &[J],
        bytes_of: impl Fn(&J) -> usize,
        work: impl Fn(&J) -> Result<R> + Sync,
        mut sink: impl FnMut(&J, R) -> Result<()>,
    ) -> Result<()> {
        let mut start = 0;
        while start < jobs.len() {
            let mut end = start + 1;
            let mut bytes = bytes_of(&jobs[start]);
            while end < jobs.len() && bytes + bytes_of(&jobs[end]) <= self.group_bytes {
                bytes += bytes_of(&jobs[end]);
                end += 1;
            }
            let group = &jobs[start..end];
            let work_or_stop =
                |job| if STOP.load(Ordering::Relaxed) { Err(Error::Stopped) } else { work(job) };
            let all = || group.par_iter().with_max_len(1).map(work_or_stop).collect::<Result<_>>();
            let results: Vec<R> = self.pool.install(all)?;
            for (job, result) in group.iter().zip(results) {
                sink(job, result)?;
            }
            start = end;
        }
        Ok(())
    }

    /// A buffer: one given back, or a new one.
    pub fn buffer(&self) -> Buffer {
        self.lock_buffers().pop().unwrap_or_default()
    }

    /// Keeps a buffer for [`Workers::buffer`]; there are never more than were taken at once.
    pub fn give_back(&self, buffer: Buffer) {
        self.lock_buffers().push(buffer);
    }

    fn lock_buffers(&self) -> MutexGuard<'_, Vec<Buffer>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` where rayon's own parallel calls use this pool.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }
}

/// Counts bytes done and reports them.
pub(crate) struct Meter<'a> {
    progress: Progress<'a>,
    done_bytes: AtomicU64,
    total_bytes: u64,
}

impl<'a> Meter<'a> {
    pub fn new(progress: Progress<'a>, total_bytes: u64) -> Self {
        Meter { progress, done_bytes: AtomicU64::new(0), total_bytes }
    }

    pub fn add(&self, bytes: usize) {
        let done = self.done_bytes.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        (self.progress)(done, self.total_bytes);
    }
}
