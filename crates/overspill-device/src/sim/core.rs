//! The queues and what runs them.

use std::{
    any::Any,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, ThreadId},
    time::Instant,
};

use super::{Planted, SimConfig, memory};
use crate::{Error, Event, EventRef, Job, RawCopy, Result};

/// Most operations that one call runs on a seeded device; each seed draws its own limit below.
const MOST_STEPS_A_CALL: usize = 3;
/// How often a queue is chosen, against the others; each queue draws one. Queues of one speed hardly
/// ever overtake each other by far.
const SPEEDS: [usize; 3] = [1, 6, 36];

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
    /// Operations run so far: the time on a seeded device, in microseconds.
    steps: AtomicU64,
}

struct Schedule {
    queues: Vec<Queue>,
    rng: fastrand::Rng,
    steps_a_call: usize,
    allocations: u64,
}

#[derive(Default)]
struct Queue {
    ops: VecDeque<Op>,
    /// The thread that runs an operation of this queue now.
    runner: Option<ThreadId>,
    speed: usize,
    closed: bool,
}

/// A point in a queue.
pub struct SimEvent {
    core: Arc<Core>,
    /// Of the stream that it was recorded on.
    label: &'static str,
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
        let mut rng = fastrand::Rng::with_seed(seeded.map_or(0, |config| config.seed));
        let steps_a_call = rng.usize(0..=MOST_STEPS_A_CALL);
        let schedule = Schedule { queues: Vec::new(), rng, steps_a_call, allocations: 0 };
        Self {
            schedule: Mutex::new(schedule),
            changed: Condvar::new(),
            seeded,
            opened: Instant::now(),
            steps: AtomicU64::new(0),
        }
    }

    pub fn is_seeded(&self) -> bool {
        self.seeded.is_some()
    }

    pub fn planted(&self) -> Planted {
        self.seeded.map_or(Planted::Nothing, |config| config.planted)
    }

    /// Whether a planted bug makes the stream called `waiter` pass over `event`.
    pub fn ignores(&self, waiter: &'static str, event: &EventRef) -> Result<bool> {
        let Some(event) = event.as_any().downcast_ref::<SimEvent>() else {
            return Err(Error::ForeignEvent { backend: "sim" });
        };
        Ok(match self.planted() {
            Planted::StreamWaitsIgnored => true,
            Planted::WaitIgnored { by, on } => (by, on) == (waiter, event.label),
            Planted::Nothing | Planted::EventsPassEarly => false,
        })
    }

    /// Virtual on a seeded device, so that its timeline follows from the seed alone.
    pub fn now_us(&self) -> f64 {
        if self.is_seeded() {
            self.steps.load(Ordering::Relaxed) as f64
        } else {
            self.opened.elapsed().as_secs_f64() * 1e6
        }
    }

    pub fn next_allocation_fails(&self) -> bool {
        let Some(config) = self.seeded else { return false };
        let mut schedule = self.lock();
        schedule.allocations += 1;
        let by_chance = config.fail_one_allocation_in.is_some_and(|n| schedule.rng.u64(..n.max(1)) == 0);
        by_chance || config.fail_allocation == Some(schedule.allocations - 1)
    }

    /// Adds a queue; returns its index.
    pub fn add_queue(&self) -> usize {
        let mut schedule = self.lock();
        let speed = SPEEDS[schedule.rng.usize(..SPEEDS.len())];
        schedule.queues.push(Queue { speed, ..Queue::default() });
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
                // A job that panics has said so; those behind it still run, or their waiters hang.
                let _ = catch_unwind(AssertUnwindSafe(|| self.run(queue, op)));
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
            let steps = self.lock().steps_of_a_call();
            for _ in 0..steps {
                self.step();
            }
        }
    }

    /// Runs until `done`; on a seeded device, an error if nothing can run any more.
    pub fn run_until(&self, done: impl Fn() -> bool) -> Result<()> {
        loop {
            if self.is_seeded() && self.step() {
                if done() {
                    return Ok(());
                }
                continue;
            }
            let schedule = self.lock();
            if done() {
                return Ok(());
            }
            match self.seeded {
                // Ready since `step` looked, or being run by another thread: not stuck yet.
                Some(_) if schedule.has_ready() => {}
                Some(config) if !schedule.is_run_elsewhere() => {
                    return Err(Error::Deadlock { seed: config.seed });
                }
                _ => drop(self.changed.wait(schedule).unwrap_or_else(PoisonError::into_inner)),
            }
        }
    }

    /// Runs one ready operation; false if there is none.
    fn step(&self) -> bool {
        let mut schedule = self.lock();
        let Some(queue) = schedule.choose() else { return false };
        let op = schedule.take(queue);
        drop(schedule);
        if let Some(op) = op {
            self.run(queue, op);
        }
        true
    }

    fn run(&self, queue: usize, op: Op) {
        let _running = Running { core: self, queue };
        self.steps.fetch_add(1, Ordering::Relaxed);
        match op {
            // SAFETY: whoever enqueued the copy promised that both ranges stay leased until an
            // event recorded after it has passed, and that event is behind it in this queue.
            Op::Copy(copy) => unsafe { memory::copy(&copy) },
            Op::Wait(_) => {}
            Op::Record(event) => event.pass(),
            Op::Job(job) => job(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Schedule> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Frees its queue for the next operation, also when this one panics.
struct Running<'a> {
    core: &'a Core,
    queue: usize,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.core.lock().queues[self.queue].runner = None;
        self.core.changed.notify_all();
    }
}

impl Schedule {
    fn is_ready(&self, queue: usize) -> bool {
        let queue = &self.queues[queue];
        queue.runner.is_none()
            && match queue.ops.front() {
                Some(Op::Wait(event)) => really_done(event),
                front => front.is_some(),
            }
    }

    fn steps_of_a_call(&mut self) -> usize {
        let most = self.steps_a_call;
        self.rng.usize(0..=most)
    }

    /// A ready queue at random, the fast ones more often.
    fn choose(&mut self) -> Option<usize> {
        let ready: Vec<usize> = (0..self.queues.len()).filter(|&queue| self.is_ready(queue)).collect();
        let total: usize = ready.iter().map(|&queue| self.queues[queue].speed).sum();
        let mut left = if total == 0 { return None } else { self.rng.usize(..total) };
        for &queue in &ready {
            if left < self.queues[queue].speed {
                return Some(queue);
            }
            left -= self.queues[queue].speed;
        }
        None
    }

    fn has_ready(&self) -> bool {
        (0..self.queues.len()).any(|queue| self.is_ready(queue))
    }

    fn is_run_elsewhere(&self) -> bool {
        let here = thread::current().id();
        self.queues.iter().any(|queue| queue.runner.is_some_and(|runner| runner != here))
    }

    fn take(&mut self, queue: usize) -> Option<Op> {
        if !self.is_ready(queue) {
            return None;
        }
        self.queues[queue].runner = Some(thread::current().id());
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
    pub fn new(core: &Arc<Core>, label: &'static str) -> Arc<Self> {
        Arc::new(Self {
            core: Arc::clone(core),
            label,
            done: AtomicBool::new(false),
            time_us: AtomicU64::new(0),
        })
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
        if self.core.planted() == Planted::EventsPassEarly {
            return Ok(());
        }
        self.core.run_until(|| self.done.load(Ordering::Acquire))
    }

    fn time_us(&self) -> Result<f64> {
        Ok(f64::from_bits(self.time_us.load(Ordering::Relaxed)))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
