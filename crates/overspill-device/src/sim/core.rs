//! The queues and what runs them.

use std::{
    any::Any,
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use super::{Planted, SimConfig, memory};
use crate::{Event, EventRef, Job, RawCopy, Result};

/// Most operations that one call runs on a seeded device.
const MOST_STEPS_A_CALL: usize = 3;

/// One operation of a queue.
pub enum Op {
    Copy(RawCopy),
    Wait(EventRef),
    Record(Arc<SimEvent>),
    Job(Job),
}

/// All queues of a device.
pub struct Core {
    schedule: Mutex<Schedule>,
    changed: Condvar,
    seeded: Option<SimConfig>,
    opened: Instant,
}

struct Schedule {
    queues: Vec<Queue>,
    rng: fastrand::Rng,
    allocations: u64,
}

#[derive(Default)]
struct Queue {
    ops: VecDeque<Op>,
    busy: bool,
    closed: bool,
}

/// A point in a queue.
pub struct SimEvent {
    core: Arc<Core>,
    done: AtomicBool,
    time_us: AtomicU64,
}

impl Core {
    pub fn threads() -> Self {
        Self::new(None)
    }

    pub fn seeded(config: SimConfig) -> Self {
        Self::new(Some(config))
    }

    fn new(seeded: Option<SimConfig>) -> Self {
        let rng = fastrand::Rng::with_seed(seeded.map_or(0, |config| config.seed));
        let schedule = Schedule { queues: Vec::new(), rng, allocations: 0 };
        Self { schedule: Mutex::new(schedule), changed: Condvar::new(), seeded, opened: Instant::now() }
    }

    pub fn is_seeded(&self) -> bool {
        self.seeded.is_some()
    }

    pub fn planted(&self) -> Planted {
        self.seeded.map_or(Planted::Nothing, |config| config.planted)
    }

    pub fn now_us(&self) -> f64 {
        self.opened.elapsed().as_secs_f64() * 1e6
    }

    pub fn next_allocation_fails(&self) -> bool {
        let mut schedule = self.lock();
        schedule.allocations += 1;
        self.seeded.and_then(|config| config.fail_allocation) == Some(schedule.allocations - 1)
    }

    /// Adds a queue; returns its index.
    pub fn add_queue(&self) -> usize {
        let mut schedule = self.lock();
        schedule.queues.push(Queue::default());
        schedule.queues.len() - 1
    }

    /// Appends operations to a queue.
    pub fn push(&self, queue: usize, ops: impl IntoIterator<Item = Op>) {
        let mut schedule = self.lock();
        for op in ops {
            match op {
                // A long copy is not one instant: let others come between its halves.
                Op::Copy(whole) if self.is_seeded() && whole.bytes > 1 => {
                    let cut = schedule.rng.usize(1..whole.bytes);
                    let (first, second) = halves(whole, cut);
                    schedule.queues[queue].ops.extend([Op::Copy(first), Op::Copy(second)]);
                }
                op => schedule.queues[queue].ops.push_back(op),
            }
        }
        drop(schedule);
        self.changed.notify_all();
        self.advance();
    }

    /// No more operations will come; a worker of the queue ends when it is empty.
    pub fn close(&self, queue: usize) {
        self.lock().queues[queue].closed = true;
        self.changed.notify_all();
    }

    /// Body of a worker thread.
    pub fn work(&self, queue: usize) {
        let mut schedule = self.lock();
        loop {
            if let Some(op) = schedule.take(queue) {
                drop(schedule);
                self.run(queue, op);
                schedule = self.lock();
            } else if schedule.queues[queue].closed && schedule.queues[queue].ops.is_empty() {
                return;
            } else {
                schedule = self.changed.wait(schedule).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// On a seeded device, runs a few operations or none.
    pub fn advance(&self) {
        if self.is_seeded() {
            let steps = self.lock().rng.usize(0..=MOST_STEPS_A_CALL);
            for _ in 0..steps {
                self.step();
            }
        }
    }

    /// Runs until `done`.
    ///
    /// # Panics
    /// On a seeded device, if nothing can run any more: whoever waits would wait forever.
    pub fn run_until(&self, done: impl Fn() -> bool) {
        if let Some(config) = self.seeded {
            while !done() {
                assert!(self.step() || done(), "deadlock on the simulated device, seed {}", config.seed);
            }
            return;
        }
        let mut schedule = self.lock();
        while !done() {
            schedule = self.changed.wait(schedule).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Runs one ready operation of a queue chosen at random; false if there is none.
    fn step(&self) -> bool {
        let mut schedule = self.lock();
        let ready: Vec<usize> =
            (0..schedule.queues.len()).filter(|&queue| schedule.is_ready(queue)).collect();
        if ready.is_empty() {
            return false;
        }
        let queue = ready[schedule.rng.usize(..ready.len())];
        let op = schedule.take(queue);
        drop(schedule);
        if let Some(op) = op {
            self.run(queue, op);
        }
        true
    }

    fn run(&self, queue: usize, op: Op) {
        match op {
            // SAFETY: whoever enqueued the copy promised that both ranges stay leased until an
            // event recorded after it has passed, and that event is behind it in this queue.
            Op::Copy(copy) => unsafe { memory::copy(&copy) },
            Op::Wait(_) => {}
            Op::Record(event) => event.pass(),
            Op::Job(job) => job(),
        }
        self.lock().queues[queue].busy = false;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Schedule> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Schedule {
    fn is_ready(&self, queue: usize) -> bool {
        let queue = &self.queues[queue];
        !queue.busy
            && match queue.ops.front() {
                Some(Op::Wait(event)) => really_done(event),
                front => front.is_some(),
            }
    }

    fn take(&mut self, queue: usize) -> Option<Op> {
        if !self.is_ready(queue) {
            return None;
        }
        self.queues[queue].busy = true;
        self.queues[queue].ops.pop_front()
    }
}

/// Whether an event has passed, whatever a planted bug makes it claim.
fn really_done(event: &EventRef) -> bool {
    event.as_any().downcast_ref::<SimEvent>().is_none_or(|event| event.done.load(Ordering::Acquire))
}

fn halves(whole: RawCopy, cut: usize) -> (RawCopy, RawCopy) {
    let first = RawCopy { bytes: cut, ..whole };
    let second = RawCopy {
        src_addr: whole.src_addr + cut as u64,
        dst_addr: whole.dst_addr + cut as u64,
        bytes: whole.bytes - cut,
        ..whole
    };
    (first, second)
}

impl SimEvent {
    pub fn new(core: &Arc<Core>) -> Arc<Self> {
        Arc::new(Self { core: Arc::clone(core), done: AtomicBool::new(false), time_us: AtomicU64::new(0) })
    }

    pub fn pass(&self) {
        self.time_us.store(self.core.now_us().to_bits(), Ordering::Relaxed);
        self.done.store(true, Ordering::Release);
    }
}

impl Event for SimEvent {
    fn is_done(&self) -> Result<bool> {
        self.core.advance();
        Ok(self.done.load(Ordering::Acquire) || self.core.planted() == Planted::EventsPassEarly)
    }

    fn synchronize(&self) -> Result<()> {
        if self.core.planted() != Planted::EventsPassEarly {
            self.core.run_until(|| self.done.load(Ordering::Acquire));
        }
        Ok(())
    }

    fn time_us(&self) -> Result<f64> {
        Ok(f64::from_bits(self.time_us.load(Ordering::Relaxed)))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
