//! Moving sessions: device to host copy and back.
//!
//! A step that fails leaves every session where it was: tokens count as clean only when their copy
//! is enqueued, and a seat is given up only by a session without dirty tokens.

use std::{ops::Range, sync::Arc};

use overspill_device::{self as device, DeviceRange, HostExtent, HostTape};

use crate::{
    Error, Part, Pool, Residency, Result,
    arena::no_fences,
    host_copy::Stretch,
    log::{Cause, Pending},
    scheduler::Event,
};

/// Layers are copied together until a batch has this many bytes: large ones alone, so that whoever
/// waits for one layer does not wait for the next; the tails of a decode step all at once.
const BATCH_BYTES: usize = 4 << 20;

/// What one batch of copies out does: where from, where to, and how far each layer is then clean.
#[derive(Default)]
struct Departure {
    parts: Vec<(DeviceRange, Arc<HostTape>)>,
    /// (layer, part, tape, bytes), in the order of `parts`.
    grown: Vec<(usize, Part, Arc<HostTape>, usize)>,
    layers: Vec<(usize, usize)>,
    bytes: usize,
}

impl Pool {
    /// Copies out what is dirty in `layers` of `id`, as far as host memory has room without anyone
    /// giving way.
    pub(crate) fn write_through(&mut self, id: u64, layers: Range<usize>) -> Result<()> {
        match self.copy_out(id, layers, Cause::WriteThrough) {
            Err(error) if error.is_full() => {}
            other => other?,
        }
        self.count(id)
    }

    /// Copies out all that is dirty, making room in host memory.
    pub fn clean(&mut self, id: u64) -> Result<()> {
        if self.entry(id)?.session.residency() == Residency::Away {
            return Ok(());
        }
        let before = self.counters.offloaded_bytes;
        let outcome = self.copy_out(id, 0..self.config.geometry.layers, Cause::Evict);
        self.counters.offloaded_at_eviction_bytes += self.counters.offloaded_bytes - before;
        self.count(id)?;
        outcome
    }

    /// Sends a parked session off the device; does nothing if it is away. Its slab may be taken at
    /// once: whoever takes it waits for the copies.
    pub fn evict(&mut self, id: u64) -> Result<()> {
        self.reap()?;
        let entry = self.entry(id)?;
        if entry.session.residency() == Residency::Away {
            return Ok(());
        }
        self.at_rest(id)?;
        self.leave(id)?;
        self.note(Event::Left { id })
    }

    /// As [`Pool::evict`], decided.
    pub(crate) fn leave(&mut self, id: u64) -> Result<()> {
        self.clean(id)?;
        let entry = self.entry(id)?;
        let seat = entry.session.leave().map_err(|refusal| Error::Refused { id, refusal })?;
        let fences = entry.fences();
        self.arena.give_back(&seat, fences)?;
        self.counters.evictions += 1;
        self.coming.retain(|coming| coming.id != id);
        self.count(id)
    }

    /// Starts bringing a session back to the device, evicting another one if need be; does nothing
    /// if it is there.
    pub fn restore(&mut self, id: u64) -> Result<()> {
        self.reap()?;
        if self.entry(id)?.session.residency() == Residency::Resident {
            return Ok(());
        }
        self.unspill(id)?;
        while let Some(decision) = self.scheduler.demand(self.now_us(), id)? {
            self.carry_out(decision)?;
        }
        Ok(())
    }

    /// As [`Pool::restore`], decided: a slab is free.
    pub(crate) fn arrive(&mut self, id: u64) -> Result<()> {
        let slabs = self.arena.slabs();
        let (seat, fences) = self.arena.take().ok_or(Error::NoSlab { slabs })?;
        let entry = self.entry(id)?;
        entry.arrivals = fences;
        entry.departures = no_fences(entry.arrivals.len());
        entry.session.arrive(seat).map_err(|refusal| Error::Refused { id, refusal })?;
        let begin = self.back.record()?;
        match self.copy_in(id).and_then(|()| self.comes(id, begin)) {
            Ok(()) => {
                self.counters.restores += 1;
                self.count(id)
            }
            Err(error) => {
                // Its host copy is whole: what did arrive is given up again.
                let entry = self.entry(id)?;
                let fences = entry.fences();
                let seat = entry.session.leave().map_err(|refusal| Error::Refused { id, refusal })?;
                self.arena.give_back(&seat, fences)?;
                Err(error)
            }
        }
    }

    /// Gives up the host copy of a session that is on the device; it is dirty then.
    pub fn drop_host_copy(&mut self, id: u64) -> Result<()> {
        let entry = self.entry(id)?;
        entry.session.host_copy_dropped().map_err(|refusal| Error::Refused { id, refusal })?;
        entry.copy.clear();
        self.counters.host_copies_dropped += 1;
        self.count(id)
    }

    /// Enqueues the copies of what is dirty in `layers`, batch by batch.
    fn copy_out(&mut self, id: u64, layers: Range<usize>, cause: Cause) -> Result<()> {
        let make_room = cause == Cause::Evict;
        let mut pending = Pending { id, cause, bytes: 0, batches: Vec::new() };
        let entry = self.entry(id)?;
        let dirty = entry.session.dirty().map_err(|refusal| Error::Refused { id, refusal })?;
        let computed = entry.computed.clone();
        let mut waited = false;
        let mut departure = Departure::default();
        for layer in layers {
            let Some(tokens) = dirty.get(layer).filter(|tokens| !tokens.is_empty()) else { continue };
            if let (false, Some(event)) = (waited, &computed) {
                self.out.wait(event)?;
                waited = true;
            }
            // Its host copy was dropped while it was still on its way back: nothing computed on it yet.
            for event in self.sessions.get(&id).into_iter().flat_map(|entry| &entry.arrivals[layer]) {
                self.out.wait(event)?;
            }
            let planned = self.plan_layer(id, layer, tokens.clone(), make_room, &mut departure);
            if planned.is_err() || departure.bytes >= BATCH_BYTES {
                self.depart(id, std::mem::take(&mut departure), &mut pending)?;
            }
            planned?;
        }
        self.depart(id, departure, &mut pending)?;
        if pending.bytes > 0 || make_room {
            self.log.enter(pending);
        }
        Ok(())
    }

    /// Adds the dirty `tokens` of a layer to `departure`, with host memory for them; both parts or
    /// none.
    fn plan_layer(
        &mut self,
        id: u64,
        layer: usize,
        tokens: Range<usize>,
        make_room: bool,
        departure: &mut Departure,
    ) -> Result<()> {
        let geometry = self.config.geometry;
        let mut planned = Vec::new();
        for part in Part::BOTH {
            let mut bytes = geometry.bytes_of(layer, part, tokens.clone());
            while !bytes.is_empty() {
                let tail = self.entry(id)?.copy.run(layer, part).tail();
                let used = |tape: &Arc<HostTape>| {
                    let same = planned.iter().filter(|(_, _, _, other)| Arc::ptr_eq(tape, other));
                    same.map(|(_, _, range, _): &(_, _, Range<usize>, _)| range.len()).sum::<usize>()
                };
                let tail = tail.map(|(tape, room)| (room - used(&tape), tape)).filter(|(room, _)| *room > 0);
                let Some((room, tape)) = tail else {
                    // Whole tails: the next copy fits the hole that a somewhat shorter one left.
                    let tail_bytes = (self.config.tail_tokens * geometry.token_bytes).max(1);
                    let left =
                        geometry.bytes_of(layer, part, tokens.start..geometry.tokens).end - bytes.start;
                    let extent =
                        self.host_extent(bytes.len().next_multiple_of(tail_bytes).min(left), id, make_room)?;
                    self.entry(id)?.copy.run_mut(layer, part).push(HostTape::new(extent), 0);
                    continue;
                };
                let end = bytes.end.min(bytes.start + room);
                planned.push((layer, part, bytes.start..end, tape));
                bytes.start = end;
            }
        }
        let seat = self.entry(id)?.session.seat().map_err(|refusal| Error::Refused { id, refusal })?.clone();
        for (layer, part, bytes, tape) in planned {
            departure.bytes += bytes.len();
            departure.grown.push((layer, part, Arc::clone(&tape), bytes.len()));
            departure.parts.push((self.arena.range(&seat, bytes)?, tape));
        }
        departure.layers.push((layer, tokens.end));
        Ok(())
    }

    fn depart(&mut self, id: u64, departure: Departure, pending: &mut Pending) -> Result<()> {
        if departure.parts.is_empty() {
            return Ok(());
        }
        let begin = self.log.mark(&self.out)?;
        let sent = device::append(&self.out, departure.parts)?;
        pending.add(begin, sent.event(), sent.bytes());
        self.counters.offloaded_bytes += sent.bytes() as u64;
        let entry = self.entry(id)?;
        for (layer, part, tape, bytes) in departure.grown {
            entry.copy.run_mut(layer, part).grew(&tape, bytes);
        }
        for (layer, tokens) in departure.layers {
            entry.session.cleaned(layer, tokens).map_err(|refusal| Error::Refused { id, refusal })?;
            // The stream is ordered: the last copy covers those before it.
            entry.departures[layer] = vec![Arc::clone(sent.event())];
        }
        self.in_flight.push_back(sent);
        Ok(())
    }

    /// Enqueues the copies of a session into its new slab, a layer at a time, in the order in which
    /// they are needed: those after the pause first, then those that only the next forward touches.
    fn copy_in(&mut self, id: u64) -> Result<()> {
        let geometry = self.config.geometry;
        let mut pending = Pending { id, cause: Cause::Restore, bytes: 0, batches: Vec::new() };
        let first = self.entry(id)?.session.pause().map_or(0, |layer| layer + 1).min(geometry.layers);
        for layer in (first..geometry.layers).chain(0..first) {
            let entry = self.sessions.get(&id).ok_or(Error::Unknown { id })?;
            let seat = entry.session.seat().map_err(|refusal| Error::Refused { id, refusal })?;
            let mut parts = Vec::new();
            for part in Part::BOTH {
                let mut at = geometry.bytes_of(layer, part, 0..0).start;
                let stretches = entry.copy.run(layer, part).stretches();
                let stretches: Vec<Stretch> =
                    stretches.ok_or_else(|| self.host.full(geometry.slab_bytes()))?;
                for (tape, from) in stretches {
                    parts.push((self.arena.range(seat, at..at + from.len())?, tape, from.clone()));
                    at += from.len();
                }
            }
            if parts.is_empty() {
                continue;
            }
            for event in &entry.arrivals[layer] {
                self.back.wait(event)?;
            }
            let begin = self.log.mark(&self.back)?;
            let sent = device::play(&self.back, parts)?;
            pending.add(begin, sent.event(), sent.bytes());
            self.counters.onboarded_bytes += sent.bytes() as u64;
            let event = Arc::clone(sent.event());
            self.in_flight.push_back(sent);
            self.entry(id)?.arrivals[layer] = vec![event];
        }
        self.log.enter(pending);
        Ok(())
    }

    /// Host memory for `id`. With `make_room`, first copies in flight are waited for, then sessions give
    /// way as the scheduler says.
    pub(crate) fn host_extent(&mut self, bytes: usize, id: u64, make_room: bool) -> Result<HostExtent> {
        loop {
            if let Some(extent) = self.host.try_alloc(bytes)? {
                return Ok(extent);
            }
            if !make_room {
                return Err(self.host.full(bytes).into());
            }
            if let Some(oldest) = self.in_flight.pop_front() {
                oldest.event().synchronize()?;
                continue;
            }
            self.meet()?;
            match self.scheduler.give_way(id) {
                Some(decision) => self.carry_out(decision)?,
                None => return Err(self.host.full(bytes).into()),
            }
        }
    }
}
