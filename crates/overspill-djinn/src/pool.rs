//! The pool: sessions, their turns, and who has to leave when the arena is full.
//!
//! Order. Compute is the caller's stream and is named in every call that depends on it. A layer's
//! new tokens are copied out behind the point of compute at which [`Pool::wrote`] was called; a
//! layer is computed on behind its copy in ([`Pool::touch`]); a slab's next user waits, layer by
//! layer, for the copies and the compute of its last one. No call here waits for a copy, except
//! where host memory has run out and for the disk.
//!
//! A pool is used under a lock of its owner's.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use overspill_device::{DeviceRange, DeviceRef, EventRef, InFlight, StreamRef};
use overspill_engine::{HostPool, PoolCounters, SpillFile};

use crate::{
    Arena, Counters, Error, Geometry, Part, Refusal, Residency, Result, Seat, Session,
    arena::{Fences, no_fences},
    host_copy::HostCopy,
    log::{Swap, SwapLog},
    placement::{Coming, LINK_US_PER_BYTE, scheduler_for},
    scheduler::{Event, Scheduler},
};

/// What a forward starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begun {
    /// The session's slab.
    pub slab: usize,
    /// The layer after which it was paused, if it was.
    pub pause: Option<usize>,
    /// Whether a layer has something to wait for, so that [`Pool::touch`] is needed.
    pub pending: bool,
}

/// How a pool behaves.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Shape of every session.
    pub geometry: Geometry,
    /// Whether host copies follow as layers are written; else a session is copied when it leaves.
    pub write_through: bool,
    /// While a forward runs, a layer's tail is copied out at once when it has this many bytes; what
    /// is smaller goes at the end of the forward, all layers together.
    pub flush_bytes: usize,
    /// At the end of a forward that was not paused, tails of fewer tokens than this wait for the
    /// next one: a batch of many small copies costs the caller as much as one of a few more bytes.
    pub lag_tokens: usize,
    /// A host copy grows by whole tails of so many tokens, so that one fits the hole that a shorter one left.
    pub tail_tokens: usize,
}

/// See the module.
pub struct Pool {
    pub(crate) config: PoolConfig,
    pub(crate) device: DeviceRef,
    pub(crate) arena: Arena,
    pub(crate) host: HostPool,
    pub(crate) spill: Option<SpillFile>,
    pub(crate) out: StreamRef,
    pub(crate) back: StreamRef,
    pub(crate) sessions: BTreeMap<u64, Entry>,
    pub(crate) in_flight: VecDeque<InFlight>,
    pub(crate) counters: Counters,
    pub(crate) log: SwapLog,
    pub(crate) scheduler: Scheduler,
    pub(crate) coming: Vec<Coming>,
    /// Sessions whose turn it is, and whose asker has not been told yet.
    pub(crate) turns: Vec<u64>,
    /// Of the fastest copy so far.
    pub(crate) link_us_per_byte: f64,
}

pub(crate) struct Entry {
    pub session: Session<Seat>,
    pub copy: HostCopy,
    /// Per layer, what compute has yet to wait for before it touches it.
    pub arrivals: Fences,
    /// Per layer, copies out of the slab that may still run.
    pub departures: Fences,
    /// Tokens per layer and pause at the last [`Pool::begin`].
    pub begun: (Vec<usize>, Option<usize>),
    /// The point of compute up to which the slab is used.
    pub computed: Option<EventRef>,
    /// Whether it has asked for a turn that has not ended.
    pub has_turn: bool,
}

impl Pool {
    /// A pool over `arena`, which is device memory that only sessions use.
    pub fn new(
        device: DeviceRef,
        arena: DeviceRange,
        host: HostPool,
        spill: Option<SpillFile>,
        config: PoolConfig,
    ) -> Result<Self> {
        let arena = Arena::new(arena, config.geometry)?;
        Ok(Self {
            scheduler: scheduler_for(&config, arena.slabs(), spill.is_some()),
            coming: Vec::new(),
            turns: Vec::new(),
            link_us_per_byte: LINK_US_PER_BYTE,
            arena,
            out: device.new_stream("offload")?,
            back: device.new_stream("onboard")?,
            config,
            device,
            host,
            spill,
            sessions: BTreeMap::new(),
            in_flight: VecDeque::new(),
            counters: Counters::default(),
            log: SwapLog::default(),
        })
    }

    /// Adds an empty session.
    pub fn create(&mut self, id: u64) -> Result<()> {
        self.insert(id, vec![0; self.config.geometry.layers], None, HostCopy::new(&self.config.geometry))
    }

    pub(crate) fn insert(
        &mut self,
        id: u64,
        tokens: Vec<usize>,
        pause: Option<usize>,
        copy: HostCopy,
    ) -> Result<()> {
        if self.sessions.contains_key(&id) {
            return Err(Error::Exists { id });
        }
        let layers = self.config.geometry.layers;
        let entry = Entry {
            session: Session::away(tokens, pause),
            copy,
            arrivals: no_fences(layers),
            departures: no_fences(layers),
            begun: (Vec::new(), None),
            computed: None,
            has_turn: false,
        };
        self.note(Event::Created { id })?;
        self.sessions.insert(id, entry);
        self.count(id)
    }

    /// Starts or resumes a forward of `id`, bringing it to the device if need be and making room
    /// for it.
    pub fn begin(&mut self, id: u64) -> Result<Begun> {
        self.reap()?;
        if self.entry(id)?.session.is_running() {
            return Err(Error::Refused { id, refusal: Refusal::Running });
        }
        self.restore(id)?;
        self.note(Event::Started { id })?;
        let entry = self.entry(id)?;
        let tokens = entry.session.tokens();
        let pause = entry.session.begin().map_err(|refusal| Error::Refused { id, refusal })?;
        entry.begun = (tokens, pause);
        let slab = entry.session.seat().map_err(|refusal| Error::Refused { id, refusal })?.slab();
        let pending = entry.arrivals.iter().any(|events| !events.is_empty());
        Ok(Begun { slab, pause, pending })
    }

    /// Makes `compute` wait for what still happens to `layer` of the slab of `id`. To be called
    /// before each use of the layer in a forward; costs nothing when there is nothing to wait for.
    pub fn touch(&mut self, id: u64, layer: usize, compute: &StreamRef) -> Result<()> {
        let entry = self.entry(id)?;
        let Some(arrivals) = entry.arrivals.get_mut(layer) else { return Ok(()) };
        for event in arrivals.iter() {
            compute.wait(event)?;
        }
        arrivals.clear();
        Ok(())
    }

    /// `layer` of `id` has `tokens` from this point of `compute` on.
    pub fn wrote(&mut self, id: u64, layer: usize, tokens: usize, compute: &StreamRef) -> Result<()> {
        let Geometry { tokens: limit_tokens, token_bytes, .. } = self.config.geometry;
        let (write_through, flush_bytes) = (self.config.write_through, self.config.flush_bytes);
        let entry = self.entry(id)?;
        if tokens > limit_tokens {
            return Err(Error::TooLong { id, tokens, limit_tokens });
        }
        let mark = entry.session.wrote(layer, tokens).map_err(|refusal| Error::Refused { id, refusal })?;
        if write_through && 2 * (mark.written - mark.clean) * token_bytes >= flush_bytes {
            entry.computed = Some(compute.record()?);
            self.write_through(id, layer..layer + 1)?;
        }
        Ok(())
    }

    /// Ends the forward of `id`, or stands still after layer `pause` of it. What is dirty is copied
    /// out if host memory has room.
    pub fn park(&mut self, id: u64, pause: Option<usize>, compute: &StreamRef) -> Result<()> {
        let PoolConfig { write_through, lag_tokens, geometry: Geometry { layers, .. }, .. } = self.config;
        let entry = self.entry(id)?;
        let computed = compute.record()?;
        entry.session.park(pause).map_err(|refusal| Error::Refused { id, refusal })?;
        entry.computed = Some(computed);
        let tail = entry.session.most_dirty();
        let waits = pause.is_none() && tail < lag_tokens;
        if write_through && !waits {
            self.write_through(id, 0..layers)?;
        }
        self.rests(id)
    }

    /// A second session with the tokens and the pause of `parent`, whose bytes it shares.
    pub fn fork(&mut self, parent: u64, child: u64) -> Result<()> {
        if self.sessions.contains_key(&child) {
            return Err(Error::Exists { id: child });
        }
        if self.entry(parent)?.session.is_running() {
            return Err(Error::Refused { id: parent, refusal: Refusal::Running });
        }
        self.clean(parent)?;
        let entry = self.entry(parent)?;
        let (tokens, pause, copy) = (entry.session.tokens(), entry.session.pause(), entry.copy.share());
        self.insert(child, tokens, pause, copy)
    }

    /// Ends a session and gives back all it has. Refused while it runs.
    pub fn remove(&mut self, id: u64) -> Result<()> {
        let Some(mut entry) = self.sessions.remove(&id) else { return Err(Error::Unknown { id }) };
        let fences = entry.fences();
        match entry.session.end() {
            Ok(seat) => {
                self.coming.retain(|coming| coming.id != id);
                self.turns.retain(|&turn| turn != id);
                self.note(Event::Finished { id })?;
                seat.map_or(Ok(()), |seat| self.arena.give_back(&seat, fences))
            }
            Err((session, refusal)) => {
                entry.session = session;
                self.sessions.insert(id, entry);
                Err(Error::Refused { id, refusal })
            }
        }
    }

    /// Gives up a forward that failed: the session is what it was when it began.
    pub fn abandon(&mut self, id: u64, compute: &StreamRef) -> Result<()> {
        let entry = self.entry(id)?;
        let (tokens, pause) = entry.begun.clone();
        let computed = compute.record()?;
        entry.session.park(pause).map_err(|refusal| Error::Refused { id, refusal })?;
        entry.computed = Some(computed);
        self.rewind(id, &tokens)?;
        self.rests(id)
    }

    /// Forgets what each layer has beyond `tokens`. What is written there next waits for the copies
    /// out that may still read it.
    fn rewind(&mut self, id: u64, tokens: &[usize]) -> Result<()> {
        let token_bytes = self.config.geometry.token_bytes;
        let entry = self.entry(id)?;
        entry.session.rewind(tokens).map_err(|refusal| Error::Refused { id, refusal })?;
        for (layer, &tokens) in tokens.iter().enumerate() {
            for part in Part::BOTH {
                entry.copy.run_mut(layer, part).truncate(tokens * token_bytes);
            }
            let departures = entry.departures[layer].clone();
            entry.arrivals[layer].extend(departures);
        }
        Ok(())
    }

    /// Tokens of each layer of `id`.
    pub fn tokens(&self, id: u64) -> Result<Vec<usize>> {
        self.sessions.get(&id).map(|entry| entry.session.tokens()).ok_or(Error::Unknown { id })
    }

    /// Where `id` is.
    pub fn residency(&self, id: u64) -> Result<Residency> {
        self.sessions.get(&id).map(|entry| entry.session.residency()).ok_or(Error::Unknown { id })
    }

    /// Bytes of the host copy of `id`, in host memory and on disk.
    pub fn copy_bytes(&self, id: u64) -> Result<(usize, usize)> {
        let entry = self.sessions.get(&id).ok_or(Error::Unknown { id })?;
        Ok((entry.copy.host_bytes(), entry.copy.disk_bytes()))
    }

    /// Slabs in all and free.
    #[must_use]
    pub fn slabs(&self) -> (usize, usize) {
        (self.arena.slabs(), self.arena.free_slabs())
    }

    /// The slab of `id`, if it is on the device.
    #[must_use]
    pub fn slab_of(&self, id: u64) -> Option<usize> {
        self.sessions.get(&id)?.session.seat().ok().map(Seat::slab)
    }

    /// Begins or ends a log of every swap.
    pub fn log_swaps(&mut self, open: bool) {
        self.log.set_open(open);
    }

    /// What the log has since it was last asked for; waits for copies that still run.
    pub fn take_swaps(&mut self) -> Result<Vec<Swap>> {
        self.log.take()
    }

    /// What was done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Counters of the host memory below.
    #[must_use]
    pub fn host_counters(&self) -> PoolCounters {
        self.host.counters()
    }

    /// Bytes of the spill file in use.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.spill.as_ref().map_or(0, SpillFile::used_bytes)
    }

    /// Takes the whole host budget now rather than as it is needed.
    pub fn reserve_host(&self) -> Result<()> {
        Ok(self.host.reserve_all()?)
    }

    /// Blocks until no copy is under way.
    pub fn drain(&mut self) -> Result<()> {
        while let Some(oldest) = self.in_flight.pop_front() {
            oldest.event().synchronize()?;
        }
        Ok(())
    }

    pub(crate) fn entry(&mut self, id: u64) -> Result<&mut Entry> {
        self.sessions.get_mut(&id).ok_or(Error::Unknown { id })
    }

    /// Lets go of copies whose events have passed.
    pub(crate) fn reap(&mut self) -> Result<()> {
        let mut left = VecDeque::new();
        for copy in self.in_flight.drain(..) {
            if !copy.event().is_done()? {
                left.push_back(copy);
            }
        }
        self.in_flight = left;
        self.meet()
    }
}

impl Entry {
    /// What the next user of the slab waits for; the session has nothing to wait for any more.
    pub fn fences(&mut self) -> Fences {
        let computed = self.computed.take();
        let pairs = self.arrivals.iter_mut().zip(&mut self.departures);
        pairs
            .map(|(arrivals, departures)| {
                let mut fences = std::mem::take(departures);
                fences.append(arrivals);
                fences.extend(computed.iter().map(Arc::clone));
                fences
            })
            .collect()
    }
}
