//! Streams and host queues of the simulated device: one kind of ordered queue, and the caller.

use std::{
    any::Any,
    sync::Arc,
    thread::{self, JoinHandle},
};

use super::{
    core::{Core, Op, SimEvent},
    memory,
};
use crate::{Error, EventRef, HostQueue, Job, RawCopy, Result, Stream};

/// Label of the calling thread as a stream.
const CALLER: &str = "caller";

/// An ordered queue: a stream, a queue of host jobs, or both.
pub struct SimQueue {
    core: Arc<Core>,
    index: usize,
    label: &'static str,
    worker: Option<JoinHandle<()>>,
}

impl SimQueue {
    pub(super) fn start(core: &Arc<Core>, label: &'static str) -> Result<Arc<Self>> {
        let index = core.add_queue();
        let worker = if core.is_seeded() {
            None
        } else {
            let shared = Arc::clone(core);
            let spawned =
                thread::Builder::new().name(format!("overspill-{label}")).spawn(move || shared.work(index));
            Some(spawned.map_err(|error| Error::Unavailable { backend: "sim", reason: error.to_string() })?)
        };
        Ok(Arc::new(Self { core: Arc::clone(core), index, label, worker }))
    }

    /// Appends a closure, as a kernel would be: it runs in the order of the stream.
    pub fn launch(&self, kernel: impl FnOnce() + Send + 'static) {
        self.core.push(self.index, [Op::Job(Box::new(kernel))]);
    }
}

impl Stream for SimQueue {
    unsafe fn copy(&self, batch: &[RawCopy]) -> Result<()> {
        self.core.push(self.index, batch.iter().copied().map(Op::Copy));
        Ok(())
    }

    fn record(&self) -> Result<EventRef> {
        let event = SimEvent::new(&self.core, self.label);
        self.core.push(self.index, [Op::Record(Arc::clone(&event))]);
        Ok(event)
    }

    fn wait(&self, event: &EventRef) -> Result<()> {
        if !self.core.ignores(self.label, event)? {
            self.core.push(self.index, [Op::Wait(Arc::clone(event))]);
        }
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        self.record()?.synchronize()
    }

    fn id(&self) -> u64 {
        self.index as u64 + 1
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl HostQueue for SimQueue {
    fn push(&self, job: Job) {
        self.core.push(self.index, [Op::Job(job)]);
    }
}

impl Drop for SimQueue {
    /// Runs what is left, then ends the worker.
    fn drop(&mut self) {
        self.core.close(self.index);
        match self.worker.take() {
            // The last owner may be a job of this very queue.
            Some(worker) if worker.thread().id() != thread::current().id() => {
                let _ = worker.join();
            }
            _ => {}
        }
    }
}

/// The calling thread as a stream: its work is done when the call that does it returns.
pub struct HostStream {
    core: Arc<Core>,
}

impl HostStream {
    pub fn new(core: Arc<Core>) -> Self {
        Self { core }
    }
}

impl Stream for HostStream {
    unsafe fn copy(&self, batch: &[RawCopy]) -> Result<()> {
        for copy in batch {
            // SAFETY: the caller's promise is ours.
            unsafe { memory::copy(copy) };
        }
        Ok(())
    }

    fn record(&self) -> Result<EventRef> {
        self.core.advance();
        let event = SimEvent::new(&self.core, CALLER);
        event.pass();
        Ok(event)
    }

    fn wait(&self, event: &EventRef) -> Result<()> {
        if self.core.ignores(CALLER, event)? { Ok(()) } else { event.synchronize() }
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    /// The calling thread, which has come past whatever it has waited for.
    fn id(&self) -> u64 {
        0
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
