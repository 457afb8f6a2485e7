//! The machine of a simulation: an executor that carries out every decision in simulated time.
//!
//! Three things take time, each one job after another: compute, the link (each way), the disk (each
//! way). Compute does a prefill, or one step of all sessions that run. A session's host copy follows
//! while host memory has room; what is dirty when it leaves is copied out, and its slab is free when
//! that has ended.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    time::Instant,
};

use super::{Arrival, Machine, Outcome};
use crate::scheduler::{Decision, Event, Scheduler, SchedulerConfig, Size};

/// What happens at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    Ready(usize),
    Arrived(usize),
    Written(usize),
    Read(usize),
    Computed,
    Wake,
}

/// What compute does.
#[derive(Debug)]
enum Work {
    Prefill(usize),
    Rebuild(usize),
    Step,
}

#[derive(Debug, Default, Clone)]
struct State {
    turn: usize,
    tokens: u64,
    /// Of these, in the host copy.
    clean_tokens: u64,
    is_on_disk: bool,
    /// Still to be run before the first new token.
    prompt_left: u64,
    new_left: u64,
    ready_us: u64,
    has_begun: bool,
    is_seated: bool,
    is_over: bool,
}

/// See the module.
pub(super) struct World<'a> {
    machine: &'a Machine,
    trace: &'a [Arrival],
    scheduler: Scheduler,
    states: Vec<State>,
    happenings: BinaryHeap<Reverse<(u64, u64, Happening)>>,
    order: u64,
    now_us: u64,
    wake_us: u64,
    running: Vec<usize>,
    rebuilds: VecDeque<usize>,
    work: Option<Work>,
    was_step: bool,
    /// When each free slab may be written.
    slabs: Vec<u64>,
    in_free_us: u64,
    out_free_us: u64,
    write_free_us: u64,
    read_free_us: u64,
    host_bytes: u64,
    /// Of these, on their way to disk.
    writing_bytes: u64,
    tells_truth: bool,
    deadline_us: u64,
    missed: u64,
    outcome: Outcome,
}

impl<'a> World<'a> {
    pub fn new(
        machine: &'a Machine,
        trace: &'a [Arrival],
        config: SchedulerConfig,
        tells_truth: bool,
    ) -> Self {
        let slabs = vec![0; config.slabs];
        let mut world = Self {
            machine,
            trace,
            scheduler: Scheduler::new(config),
            states: vec![State::default(); trace.len()],
            happenings: BinaryHeap::new(),
            order: 0,
            now_us: 0,
            wake_us: u64::MAX,
            running: Vec::new(),
            rebuilds: VecDeque::new(),
            work: None,
            was_step: false,
            slabs,
            in_free_us: 0,
            out_free_us: 0,
            write_free_us: 0,
            read_free_us: 0,
            host_bytes: 0,
            writing_bytes: 0,
            tells_truth,
            deadline_us: u64::MAX,
            missed: 0,
            outcome: Outcome::default(),
        };
        for (id, arrival) in trace.iter().enumerate() {
            world.at(arrival.at_us, Happening::Ready(id));
        }
        world
    }

    /// Runs to the end of the trace, until nothing more can happen, or until more than `most_missed` turns had
    /// their first token later than `deadline_us` after they were ready.
    pub fn run(mut self, deadline_us: u64, most_missed: u64) -> crate::Result<Outcome> {
        self.deadline_us = deadline_us;
        while let Some(Reverse((now_us, _, happening))) = self.happenings.pop() {
            if self.missed > most_missed {
                break;
            }
            self.now_us = now_us;
            self.happen(happening)?;
            self.decide()?;
            self.keep_host_room()?;
            self.compute();
            self.wake();
        }
        let is_left = |state: &&State| !state.is_over;
        self.outcome.lost_sessions = self.states.iter().filter(is_left).count() as u64;
        Ok(self.outcome)
    }

    /// Comes back when the passing of time alone may lead to a decision.
    fn wake(&mut self) {
        let Some(wake_us) = self.scheduler.wake_us(self.now_us) else { return };
        if wake_us < self.wake_us || self.wake_us <= self.now_us {
            self.wake_us = wake_us;
            self.at(wake_us, Happening::Wake);
        }
    }

    fn at(&mut self, at_us: u64, happening: Happening) {
        self.order += 1;
        self.happenings.push(Reverse((at_us, self.order, happening)));
    }

    fn note(&mut self, event: Event) -> crate::Result<()> {
        self.timed(|scheduler, now_us| scheduler.note(now_us, event))
    }

    /// Calls the scheduler, and counts how long that takes on the machine that simulates.
    fn timed<T>(&mut self, call: impl FnOnce(&mut Scheduler, u64) -> T) -> T {
        let start = Instant::now();
        let result = call(&mut self.scheduler, self.now_us);
        self.outcome.decision_ns.push(start.elapsed().as_nanos() as u32);
        result
    }

    fn happen(&mut self, happening: Happening) -> crate::Result<()> {
        match happening {
            Happening::Ready(id) => self.ready(id),
            Happening::Arrived(id) => self.note(Event::Done(Decision::Restore(id as u64))),
            Happening::Written(id) => {
                self.writing_bytes -= self.bytes(id);
                self.host_bytes -= self.bytes(id);
                self.states[id].is_on_disk = true;
                self.count(id)?;
                self.note(Event::Done(Decision::Spill(id as u64)))
            }
            Happening::Read(id) => {
                self.states[id].is_on_disk = false;
                self.count(id)?;
                self.note(Event::Done(Decision::Unspill(id as u64)))
            }
            Happening::Computed => self.computed(),
            Happening::Wake => Ok(()),
        }
    }

    fn ready(&mut self, id: usize) -> crate::Result<()> {
        let state = &mut self.states[id];
        if state.turn == 0 {
            self.note(Event::Created { id: id as u64 })?;
        }
        let Some(turn) = self.trace[id].turns.get(self.states[id].turn) else {
            return self.over(id);
        };
        let state = &mut self.states[id];
        (state.prompt_left, state.new_left) = (turn.prompt_tokens, turn.new_tokens);
        (state.ready_us, state.has_begun) = (self.now_us, false);
        self.outcome.turns += 1;
        self.outcome.turns_on_device += u64::from(state.is_seated);
        self.note(Event::Ready { id: id as u64, deadline_us: None })
    }

    fn over(&mut self, id: usize) -> crate::Result<()> {
        let state = std::mem::replace(&mut self.states[id], State { is_over: true, ..State::default() });
        if state.is_seated {
            self.slabs.push(self.now_us);
        }
        if !state.is_on_disk {
            self.host_bytes -= state.clean_tokens * self.machine.token_bytes;
        }
        self.note(Event::Finished { id: id as u64 })
    }

    /// Bytes of a host copy.
    fn bytes(&self, id: usize) -> u64 {
        self.states[id].clean_tokens * self.machine.token_bytes
    }

    /// Tells the scheduler what a session's bytes are now.
    fn count(&mut self, id: usize) -> crate::Result<()> {
        let state = &self.states[id];
        let copy_bytes = self.bytes(id);
        let bytes = state.tokens * self.machine.token_bytes;
        let size = Size {
            tokens: state.tokens,
            bytes,
            dirty_bytes: if state.is_seated { bytes - copy_bytes } else { 0 },
            host_bytes: if state.is_on_disk { 0 } else { copy_bytes },
            disk_bytes: if state.is_on_disk { copy_bytes } else { 0 },
        };
        self.note(Event::Sized { id: id as u64, size })
    }

    fn decide(&mut self) -> crate::Result<()> {
        while let Some(decision) = self.timed(Scheduler::next) {
            if !self.carry_out(decision)? {
                self.note(Event::Failed(decision))?;
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, decision: Decision) -> crate::Result<bool> {
        let us = |bytes: u64, us_per_byte: f64| (bytes as f64 * us_per_byte).ceil() as u64;
        let costs = self.machine.costs;
        match decision {
            Decision::Run(id) => self.running.push(id as usize),
            Decision::Restore(id) | Decision::Recompute(id) => {
                let slab_us = self.take_slab();
                let id = id as usize;
                self.states[id].is_seated = true;
                if matches!(decision, Decision::Recompute(_)) {
                    self.rebuilds.push_back(id);
                    return Ok(true);
                }
                let (bytes, start_us) = (self.bytes(id), self.now_us.max(slab_us));
                if bytes == 0 {
                    self.at(start_us, Happening::Arrived(id));
                    return Ok(true);
                }
                self.in_free_us = start_us.max(self.in_free_us) + us(bytes, costs.in_us_per_byte);
                self.outcome.in_bytes += bytes;
                self.outcome.restores += 1;
                self.at(self.in_free_us, Happening::Arrived(id));
            }
            Decision::Evict(id) => {
                let id = id as usize;
                let dirty = self.states[id].tokens - self.states[id].clean_tokens;
                let dirty_bytes = dirty * self.machine.token_bytes;
                if !self.has_host_room(dirty_bytes, id as u64)? {
                    return Ok(false);
                }
                self.write_through(id);
                self.slabs.push(if dirty > 0 { self.out_free_us } else { self.now_us });
                self.states[id].is_seated = false;
                self.count(id)?;
            }
            Decision::Discard(id) => {
                let id = id as usize;
                self.host_bytes -= self.bytes(id);
                self.states[id].clean_tokens = 0;
                if std::mem::take(&mut self.states[id].is_seated) {
                    self.slabs.push(self.now_us);
                }
                self.count(id)?;
            }
            Decision::Spill(id) => {
                let bytes = self.bytes(id as usize);
                let us_per_byte = costs.write_us_per_byte.unwrap_or_default();
                self.writing_bytes += bytes;
                self.write_free_us = self.now_us.max(self.write_free_us) + us(bytes, us_per_byte);
                self.outcome.written_bytes += bytes;
                self.at(self.write_free_us, Happening::Written(id as usize));
            }
            Decision::Unspill(id) => {
                let bytes = self.bytes(id as usize);
                if !self.has_host_room(bytes, id)? {
                    return Ok(false);
                }
                self.host_bytes += bytes;
                self.read_free_us = self.now_us.max(self.read_free_us) + us(bytes, costs.read_us_per_byte);
                self.outcome.read_bytes += bytes;
                self.at(self.read_free_us, Happening::Read(id as usize));
            }
            Decision::DropHostCopy(id) => {
                self.host_bytes -= self.bytes(id as usize);
                self.states[id as usize].clean_tokens = 0;
                self.count(id as usize)?;
            }
        }
        Ok(true)
    }

    /// The free slab that may be written first; when.
    fn take_slab(&mut self) -> u64 {
        let soonest = (0..self.slabs.len()).min_by_key(|&n| self.slabs[n]);
        soonest.map_or(u64::MAX, |n| self.slabs.swap_remove(n))
    }

    /// Brings the host copy up to date; host memory has room for it.
    fn write_through(&mut self, id: usize) {
        let state = &mut self.states[id];
        let bytes = (state.tokens - state.clean_tokens) * self.machine.token_bytes;
        state.clean_tokens = state.tokens;
        self.host_bytes += bytes;
        self.outcome.out_bytes += bytes;
        let copy_us = (bytes as f64 * self.machine.costs.out_us_per_byte).ceil() as u64;
        self.out_free_us = self.now_us.max(self.out_free_us) + copy_us;
    }

    /// Makes room in host memory, as far as that takes no time.
    fn has_host_room(&mut self, bytes: u64, keep: u64) -> crate::Result<bool> {
        while self.host_bytes + bytes > self.machine.host_bytes {
            if self.host_bytes + bytes - self.writing_bytes <= self.machine.host_bytes {
                return Ok(false);
            }
            let Some(decision) = self.timed(|scheduler, _| scheduler.give_way(keep)) else {
                return Ok(false);
            };
            self.carry_out(decision)?;
        }
        Ok(true)
    }

    /// Starts to make room before it is needed.
    fn keep_host_room(&mut self) -> crate::Result<()> {
        let most_bytes = self.machine.host_bytes - self.machine.host_spare_bytes;
        while self.host_bytes - self.writing_bytes > most_bytes {
            let Some(decision) = self.timed(|scheduler, _| scheduler.give_way(u64::MAX)) else {
                return Ok(());
            };
            self.carry_out(decision)?;
        }
        Ok(())
    }

    /// Starts what compute does next, if it does nothing.
    fn compute(&mut self) {
        if self.work.is_some() {
            return;
        }
        let prefill = self.running.iter().copied().find(|&id| self.states[id].prompt_left > 0);
        let steps = self.running.iter().any(|&id| self.states[id].prompt_left == 0);
        let turn_of_steps = steps && !self.was_step;
        let (work, us) = if let (Some(id), false) = (prefill, turn_of_steps) {
            let tokens = self.states[id].prompt_left;
            (Work::Prefill(id), self.machine.prefill_us(tokens))
        } else if let Some(id) = self.rebuilds.pop_front_if(|_| !turn_of_steps) {
            (Work::Rebuild(id), self.machine.prefill_us(self.states[id].tokens))
        } else if steps {
            let stepping = self.running.iter().filter(|&&id| self.states[id].prompt_left == 0);
            (Work::Step, self.machine.step_us(stepping.map(|&id| self.states[id].tokens).sum()))
        } else {
            return;
        };
        self.was_step = matches!(work, Work::Step);
        self.work = Some(work);
        self.outcome.busy_us += us;
        self.at(self.now_us + us, Happening::Computed);
    }

    fn computed(&mut self) -> crate::Result<()> {
        match self.work.take() {
            Some(Work::Prefill(id)) => {
                let state = &mut self.states[id];
                state.tokens += std::mem::take(&mut state.prompt_left);
                self.token(id);
            }
            Some(Work::Rebuild(id)) => {
                self.outcome.rebuilt_tokens += self.states[id].tokens;
                self.note(Event::Done(Decision::Recompute(id as u64)))?;
            }
            Some(Work::Step) => {
                for id in self.running.clone() {
                    if self.states[id].prompt_left == 0 && self.states[id].has_begun {
                        self.token(id);
                    }
                }
            }
            None => {}
        }
        let (done, running) =
            std::mem::take(&mut self.running).into_iter().partition(|&id| self.states[id].new_left == 0);
        self.running = running;
        let done: Vec<usize> = done;
        done.into_iter().try_for_each(|id| self.pause(id))
    }

    /// A session has a token more; the first one of a turn is what its deadline is about.
    fn token(&mut self, id: usize) {
        let state = &mut self.states[id];
        state.tokens += 1;
        state.new_left = state.new_left.saturating_sub(1);
        self.outcome.tokens += 1;
        self.outcome.end_us = self.now_us;
        if !state.has_begun {
            state.has_begun = true;
            let first_us = self.now_us - state.ready_us;
            self.missed += u64::from(first_us > self.deadline_us);
            self.outcome.first_us.push(first_us);
        }
    }

    fn pause(&mut self, id: usize) -> crate::Result<()> {
        let turn = &self.trace[id].turns[self.states[id].turn];
        self.states[id].turn += 1;
        if self.states[id].turn == self.trace[id].turns.len() {
            return self.over(id);
        }
        let dirty_bytes = (self.states[id].tokens - self.states[id].clean_tokens) * self.machine.token_bytes;
        let (wait_us, told_us) = (turn.wait_us, turn.eta_us);
        if self.host_bytes + dirty_bytes + self.machine.host_spare_bytes <= self.machine.host_bytes {
            self.write_through(id);
        }
        self.count(id)?;
        let eta_us = if self.tells_truth { Some(wait_us) } else { told_us };
        self.note(Event::Paused { id: id as u64, eta_us })?;
        self.at(self.now_us + wait_us, Happening::Ready(id));
        Ok(())
    }
}
