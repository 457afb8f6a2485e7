//! The transfer engine: leases in, slots out, and back.
//!
//! Ordering. An offload waits for the caller's compute stream; an onboard waits for the point of the
//! compute stream at which its destination was allocated, and compute waits for it in
//! [`Onboarding::wait_on`]. Copies stay in a queue per direction, with their leases, until their
//! events have passed or the compute stream has been made to wait for them.
//!
//! Locks: neither the state's nor a slot's mutex is held across a call into the device, a file
//! operation, or the drop of a lease: the seeded device may run any job inside any call, and a lease
//! may run somebody else's destructor.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic::Ordering},
};

use overspill_device::{
    self as device, DeviceRange, DeviceRef, Direction, EventRef, Gate, HostExtent, InFlight, QueueRef,
    StreamRef,
};

use crate::{
    Cause, EngineConfig, Error, HostPool, PoolCounters, Result, Slot, SpillFile, Stats, Trace, TraceEvent,
    disk::DiskExtent,
    slot::{self, Place, Segment},
    ticket::Ticket,
};

/// See the module. Clones share one engine.
#[derive(Clone)]
pub struct Engine(pub(crate) Arc<Shared>);

pub(crate) struct Shared {
    pub device: DeviceRef,
    config: EngineConfig,
    pool: HostPool,
    out_stream: StreamRef,
    pub in_stream: StreamRef,
    spill: Option<Spill>,
    state: Mutex<State>,
}

/// The disk tier and its two queues.
struct Spill {
    file: SpillFile,
    eager: bool,
    writer: QueueRef,
    reader: QueueRef,
    /// Host memory that reads pass through; apart from the pool, so that a read never waits for a
    /// write.
    bounce: HostPool,
}

#[derive(Default)]
struct State {
    offloads: VecDeque<Copy>,
    onboards: VecDeque<Copy>,
    /// Copies out of their queue whose host memory is not free yet: another thread is at it.
    finishing: usize,
    next_sequence: u64,
    /// Oldest first: whatever was offloaded first is needed last.
    slots: VecDeque<Weak<slot::Inner>>,
    spills: VecDeque<Arc<Gate>>,
    spill_error: Option<Error>,
    stats: Stats,
    trace: Trace,
}

/// A copy with what its record needs.
pub(crate) struct Copy {
    pub in_flight: InFlight,
    pub start: EventRef,
    pub cause: Cause,
    pub sequence: u64,
    /// The stream that has been made to wait for it last.
    awaited_by: Option<u64>,
}

impl Engine {
    /// An engine on `device`.
    pub fn new(device: DeviceRef, config: EngineConfig) -> Result<Self> {
        let file = config.spill.as_ref().map(SpillFile::create).transpose()?;
        Self::with_spill_file(device, config, file)
    }

    /// As [`Engine::new`], with a spill file of the caller's (tests inject faults with it).
    pub fn with_spill_file(device: DeviceRef, config: EngineConfig, file: Option<SpillFile>) -> Result<Self> {
        let eager = config.spill.as_ref().is_none_or(|spill| spill.eager);
        let spill = match file {
            None => None,
            Some(file) => Some(Spill {
                file,
                eager,
                writer: device.new_queue("spill")?,
                reader: device.new_queue("unspill")?,
                bounce: HostPool::new(
                    Arc::clone(&device),
                    2 * config.segment_bytes,
                    2 * config.segment_bytes,
                ),
            }),
        };
        let slab_bytes = config.slab_bytes.max(config.segment_bytes);
        // Page-locking takes long; plain memory is there at once.
        let pool = if device.info().pinned {
            HostPool::growing_ahead(Arc::clone(&device), config.host_budget_bytes, slab_bytes)?
        } else {
            HostPool::new(Arc::clone(&device), config.host_budget_bytes, slab_bytes)
        };
        let shared = Shared {
            pool,
            out_stream: device.new_stream("offload")?,
            in_stream: device.new_stream("onboard")?,
            spill,
            state: Mutex::default(),
            device,
            config,
        };
        Ok(Self(Arc::new(shared)))
    }

    /// Most bytes that can be away at once: the host's budget and the spill file's limit. Gaps between what is
    /// stored come off.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        let config = &self.0.config;
        config.host_budget_bytes as u64 + config.spill.as_ref().map_or(0, |spill| spill.limit_bytes)
    }

    /// The device below.
    #[must_use]
    pub fn device(&self) -> &DeviceRef {
        &self.0.device
    }

    /// Copies `source` away, once everything that `compute` has been given so far is done.
    ///
    /// The lease on `source` is held until the copy has passed, or until
    /// [`Engine::release_source`]. Blocks while the host tier is full and something is on its way
    /// out of it; an error leaves `source` and every other slot as they were.
    pub fn offload(&self, source: &DeviceRange, compute: &StreamRef, cause: Cause) -> Result<Slot> {
        self.offload_behind(source, &compute.record()?, cause)
    }

    /// As [`Engine::offload`], behind a point of compute's that the caller has marked: `source` is written by then.
    pub fn offload_behind(&self, source: &DeviceRange, mark: &EventRef, cause: Cause) -> Result<Slot> {
        self.0.out_stream.wait(mark)?;
        self.offload_written(source, cause)
    }

    /// As [`Engine::offload`], of a `source` that the caller knows to be written: the copy waits for nothing of what
    /// compute was given since.
    pub fn offload_written(&self, source: &DeviceRange, cause: Cause) -> Result<Slot> {
        let shared = &self.0;
        shared.reap()?;
        let slot = Slot::new(source.bytes());
        shared.state().slots.push_back(Arc::downgrade(&slot.0));
        for (offset_bytes, bytes) in pieces(source.bytes(), shared.config.segment_bytes) {
            let extent = shared.host_extent(bytes)?;
            let start = shared.out_stream.record()?;
            let range = source.slice(offset_bytes..offset_bytes + bytes)?;
            let (in_flight, extents) = device::offload(&shared.out_stream, vec![(range, extent)])?;
            let sequence = shared.push(Direction::Offload, in_flight, start, cause);
            slot.0.sequence.store(sequence, Ordering::Release);
            for extent in extents {
                slot.0.segments().push(Segment { offset_bytes, bytes, place: Place::Host(extent) });
            }
            if shared.spill.as_ref().is_some_and(|spill| spill.eager) {
                shared.spill_slot(&slot.0);
            }
        }
        Ok(slot)
    }

    /// Makes `compute` wait for the copies of `slot`, and of all slots before it, and gives up their
    /// leases on device memory without waiting on the host. For memory whose owner reuses it in the
    /// order of `compute` (rule 10: the host never polls for this).
    pub fn release_source(&self, slot: &Slot, compute: &StreamRef) -> Result<()> {
        self.0.release_through(Direction::Offload, slot.0.sequence.load(Ordering::Acquire), compute)
    }

    /// Starts bringing `slot` back into `destination`, which may be written from this point of
    /// `compute` on. Never blocks on a copy or the disk. The slot keeps its bytes.
    pub fn onboard(
        &self,
        slot: &Slot,
        destination: &DeviceRange,
        compute: &StreamRef,
        cause: Cause,
    ) -> Result<Onboarding> {
        let shared = &self.0;
        shared.reap()?;
        if slot.bytes() != destination.bytes() {
            return Err(Error::SizeMismatch {
                slot_bytes: slot.bytes(),
                destination_bytes: destination.bytes(),
            });
        }
        shared.in_stream.wait(&compute.record()?)?;
        let parts: Vec<_> = slot
            .0
            .segments()
            .iter()
            .map(|segment| (segment.offset_bytes, segment.bytes, segment.place.clone()))
            .collect();
        let ticket = Ticket::new(parts.len());
        for (offset_bytes, bytes, place) in parts {
            let range = destination.slice(offset_bytes..offset_bytes + bytes)?;
            match place {
                Place::Host(extent) | Place::Spilling(extent) => {
                    let sent = shared.send_in(range, extent, cause);
                    ticket.piece_sent(sent);
                }
                Place::Disk(extent) => shared.read_in(range, extent, cause, &ticket),
            }
        }
        Ok(Onboarding { engine: self.clone(), ticket })
    }

    /// Blocks until nothing is under way in any direction.
    pub fn drain(&self) -> Result<()> {
        let shared = &self.0;
        for queue in shared.spill.iter().flat_map(|spill| [&spill.writer, &spill.reader]) {
            let gate = Arc::new(Gate::new());
            let last = Arc::clone(&gate);
            queue.push(Box::new(move || last.open()));
            shared.device.block_on(&gate)?;
        }
        while shared.wait_oldest(Direction::Offload)? || shared.wait_oldest(Direction::Onboard)? {}
        shared.reap()
    }

    /// Counters of the host pool.
    #[must_use]
    pub fn pool_counters(&self) -> PoolCounters {
        self.0.pool.counters()
    }

    /// Takes the whole host budget now rather than as it is needed.
    pub fn reserve_host(&self) -> Result<()> {
        self.0.pool.reserve_all()
    }

    /// Bytes of the spill file in use.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.0.spill.as_ref().map_or(0, |spill| spill.file.used_bytes())
    }

    /// What has moved so far, of the copies known to be done.
    pub fn stats(&self) -> Result<Stats> {
        self.0.reap()?;
        Ok(self.0.state().stats.clone())
    }

    /// The timeline so far; empty unless the configuration asked for one.
    pub fn trace(&self) -> Result<Trace> {
        self.0.reap()?;
        Ok(self.0.state().trace.clone())
    }
}

/// A slot on its way back.
///
/// The destination is leased until the copies have passed, so an onboarding that nobody waited for
/// (an abandoned graph, an exception) can be dropped at any time.
pub struct Onboarding {
    engine: Engine,
    ticket: Arc<Ticket>,
}

impl Onboarding {
    /// Makes `compute` wait for the bytes. Blocks the host only while pieces of the slot are still
    /// being read from disk. Gives up the lease on the destination.
    pub fn wait_on(&self, compute: &StreamRef) -> Result<()> {
        let shared = &self.engine.0;
        shared.device.block_on(self.ticket.gate())?;
        // Backward waits for many and starts few: what is done by now must not be left for the next forward.
        shared.reap()?;
        match self.ticket.outcome()? {
            Some(sequence) => shared.release_through(Direction::Onboard, sequence, compute),
            None => Ok(()),
        }
    }

    /// Whether [`Onboarding::wait_on`] would not block the host.
    #[must_use]
    pub fn is_sent(&self) -> bool {
        self.ticket.gate().is_open()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a copy into its queue; returns its position.
    fn push(&self, direction: Direction, in_flight: InFlight, start: EventRef, cause: Cause) -> u64 {
        let mut state = self.state();
        state.next_sequence += 1;
        let sequence = state.next_sequence;
        state.queue(direction).push_back(Copy { in_flight, start, cause, sequence, awaited_by: None });
        sequence
    }

    /// Enqueues one piece toward the device.
    pub fn send_in(&self, range: DeviceRange, extent: Arc<HostExtent>, cause: Cause) -> Result<u64> {
        let start = self.in_stream.record()?;
        let in_flight = device::onboard(&self.in_stream, vec![(range, extent)])?;
        Ok(self.push(Direction::Onboard, in_flight, start, cause))
    }

    /// Reads one piece from disk and sends it on, on the reader's queue.
    fn read_in(
        self: &Arc<Self>,
        range: DeviceRange,
        extent: Arc<DiskExtent>,
        cause: Cause,
        ticket: &Arc<Ticket>,
    ) {
        let Some(spill) = &self.spill else { return };
        let (shared, ticket) = (Arc::clone(self), Arc::clone(ticket));
        spill.reader.push(Box::new(move || {
            let sent = shared.read_piece(&extent).and_then(|staged| shared.send_in(range, staged, cause));
            drop(extent);
            ticket.piece_sent(sent);
        }));
    }

    fn read_piece(&self, extent: &DiskExtent) -> Result<Arc<HostExtent>> {
        let Some(spill) = &self.spill else { return Err(self.pool.full(extent.bytes())) };
        let mut staged = loop {
            if let Some(staged) = spill.bounce.try_alloc(extent.bytes())? {
                break staged;
            }
            if !self.wait_oldest(Direction::Onboard)? {
                return Err(spill.bounce.full(extent.bytes()));
            }
        };
        let start = self.now_us();
        extent.read(staged.as_mut_slice()?)?;
        self.note(Cause::Unspill, extent.bytes(), start, self.now_us());
        Ok(Arc::new(staged))
    }

    /// Finishes the copies whose events have passed.
    fn reap(&self) -> Result<()> {
        for direction in [Direction::Offload, Direction::Onboard] {
            while let Some(copy) = self.pop_done(direction)? {
                self.finish(copy)?;
            }
        }
        let mut state = self.state();
        while state.spills.front().is_some_and(|gate| gate.is_open()) {
            state.spills.pop_front();
        }
        while state.slots.front().is_some_and(|slot| slot.strong_count() == 0) {
            state.slots.pop_front();
        }
        Ok(())
    }

    fn pop_done(&self, direction: Direction) -> Result<Option<Copy>> {
        let front =
            self.state().queue(direction).front().map(|c| (c.sequence, Arc::clone(c.in_flight.event())));
        let Some((sequence, event)) = front else { return Ok(None) };
        if !event.is_done()? {
            return Ok(None);
        }
        let mut state = self.state();
        let queue = state.queue(direction);
        let still_first = queue.front().is_some_and(|copy| copy.sequence == sequence);
        let done = if still_first { queue.pop_front() } else { None };
        state.finishing += usize::from(done.is_some());
        Ok(done)
    }

    /// Frees a copy's memory, the host's before anything else may run, then records it.
    fn finish(&self, copy: Copy) -> Result<()> {
        let (event, bytes) = (Arc::clone(copy.in_flight.event()), copy.in_flight.bytes());
        let (device, host) = copy.in_flight.settle();
        drop(host);
        self.state().finishing -= 1;
        drop(device);
        self.note(copy.cause, bytes, copy.start.time_us()?, event.time_us()?);
        Ok(())
    }

    fn note(&self, cause: Cause, bytes: usize, start_us: f64, end_us: f64) {
        let duration_us = (end_us - start_us).max(0.0);
        let mut state = self.state();
        state.stats.add(cause, bytes, duration_us);
        if self.config.trace {
            state.trace.push(TraceEvent { cause, bytes, start_us, duration_us });
        }
    }

    /// Host time on the device's clock, for work that no stream does.
    fn now_us(&self) -> f64 {
        self.device.now_us()
    }

    /// Blocks until the oldest copy of a direction is done; false if there is none, nor one whose memory is
    /// about to be free.
    fn wait_oldest(&self, direction: Direction) -> Result<bool> {
        let (event, finishing) = {
            let mut state = self.state();
            let oldest = state.queue(direction).front().map(|copy| Arc::clone(copy.in_flight.event()));
            (oldest, state.finishing > 0)
        };
        let Some(event) = event else {
            std::thread::yield_now();
            return Ok(finishing);
        };
        event.synchronize()?;
        self.reap()?;
        Ok(true)
    }

    /// Makes `compute` wait for the copies up to `sequence`, then lets their device leases go.
    ///
    /// The host runs far ahead of the device, so that most of a step's copies are still in the queue: what
    /// `compute` has waited for already is passed over, or a step would wait a number of times that grows with
    /// the square of its copies.
    fn release_through(&self, direction: Direction, sequence: u64, compute: &StreamRef) -> Result<()> {
        let id = Some(compute.id());
        let events: Vec<EventRef> = self
            .state()
            .up_to(direction, sequence)
            .filter(|copy| copy.awaited_by != id)
            .map(|copy| Arc::clone(copy.in_flight.event()))
            .collect();
        for event in &events {
            compute.wait(event)?;
        }
        let take = |copy: &mut Copy| {
            copy.awaited_by = id;
            copy.in_flight.take_device_leases()
        };
        let leases: Vec<_> = self.state().up_to(direction, sequence).map(take).collect();
        drop(leases);
        Ok(())
    }

    /// Room in the host tier, made if need be.
    fn host_extent(self: &Arc<Self>, bytes: usize) -> Result<HostExtent> {
        loop {
            if let Some(extent) = self.pool.try_alloc(bytes)? {
                return Ok(extent);
            }
            let oldest_spill = self.state().spills.pop_front();
            if let Some(gate) = oldest_spill {
                self.device.block_on(&gate)?;
                self.reap()?;
                continue;
            }
            if let Some(error) = self.state().spill_error.take() {
                return Err(error);
            }
            let waited = self.spill_oldest()
                || self.wait_oldest(Direction::Offload)?
                || self.wait_oldest(Direction::Onboard)?;
            if !waited {
                // What was under way at the first look may have ended since.
                return self.pool.try_alloc(bytes)?.ok_or_else(|| self.pool.full(bytes));
            }
        }
    }

    /// Sends the oldest slot that is still in host memory to disk; false if there is none.
    fn spill_oldest(self: &Arc<Self>) -> bool {
        loop {
            let Some(oldest) = self.state().slots.pop_front() else { return false };
            if oldest.upgrade().is_some_and(|slot| self.spill_slot(&slot)) {
                return true;
            }
        }
    }

    /// Queues the write of every segment of `slot` that is in host memory; false if there is none.
    fn spill_slot(self: &Arc<Self>, slot: &Arc<slot::Inner>) -> bool {
        let Some(spill) = &self.spill else { return false };
        let mut found = Vec::new();
        for (index, segment) in slot.segments().iter_mut().enumerate() {
            if let Place::Host(extent) = &segment.place {
                let extent = Arc::clone(extent);
                segment.place = Place::Spilling(Arc::clone(&extent));
                found.push((index, extent));
            }
        }
        let any = !found.is_empty();
        for (index, extent) in found {
            let gate = Arc::new(Gate::new());
            self.state().spills.push_back(Arc::clone(&gate));
            let (shared, slot) = (Arc::clone(self), Arc::downgrade(slot));
            spill.writer.push(Box::new(move || {
                shared.write_segment(&slot, index, extent);
                gate.open();
            }));
        }
        any
    }

    fn write_segment(&self, slot: &Weak<slot::Inner>, index: usize, extent: Arc<HostExtent>) {
        let (Some(slot), Some(spill)) = (slot.upgrade(), &self.spill) else { return };
        let start = self.now_us();
        let written = extent.as_slice().map_err(Error::from).and_then(|bytes| spill.file.write(bytes));
        let mut failed = None;
        let place = match written {
            Ok(on_disk) => {
                self.note(Cause::Spill, extent.bytes(), start, self.now_us());
                Place::Disk(Arc::new(on_disk))
            }
            Err(error) => {
                failed = Some(error);
                Place::Host(extent)
            }
        };
        slot.segments()[index].place = place;
        if let Some(error) = failed {
            let mut state = self.state();
            state.spill_error = Some(error);
            // Still the oldest: the next attempt to make room starts with it again.
            state.slots.push_front(Arc::downgrade(&slot));
        }
    }
}

impl State {
    fn up_to(&mut self, direction: Direction, sequence: u64) -> impl Iterator<Item = &mut Copy> {
        self.queue(direction).iter_mut().take_while(move |copy| copy.sequence <= sequence)
    }

    fn queue(&mut self, direction: Direction) -> &mut VecDeque<Copy> {
        match direction {
            Direction::Offload => &mut self.offloads,
            Direction::Onboard => &mut self.onboards,
        }
    }
}

/// `(offset, length)` of the pieces of `bytes`.
fn pieces(bytes: usize, piece_bytes: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..bytes).step_by(piece_bytes.max(1)).map(move |offset| (offset, piece_bytes.min(bytes - offset)))
}
