//! The planner as the edge to PyTorch drives it: a state machine over pack, need, and free.
//!
//! The first step of a shape *explores*: what has a proved recipe is rebuilt, all else is offloaded
//! (keeping could already be too much), and everything is recorded. The second *calibrates*: it
//! follows a plan made of that record and is recorded again, with the sizes of a settled step and
//! the times of a device that is warm. The next two follow plans and are timed
//! once more: while memory is still being reserved, compute waits for the host, and the shortest time
//! between two events is the one that the device needs. Until the last of them, plans count on half of the link: what
//! a busy link does to a step would be taken for compute, under which the next plan hides as many transfers again.
//! From then on the plan is *followed*. A step that deviates from its plan falls back to offloading, which is always
//! within the budget, and the next one explores.

mod learning;
mod step;
#[cfg(test)]
mod tests;

use self::{
    learning::{Pending, Phase},
    step::{Live, Step},
};
use crate::{Action, Limits, Plan, Recipe, StepRecord, Unit};

/// Names a unit for as long as it lives; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnitId(pub u64);

/// What the edge measures at an event.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Host time in microseconds, from any fixed point.
    pub now_us: f64,
    /// All bytes allocated on the device.
    pub allocated_bytes: u64,
    /// Most bytes allocated since the sample before; at least those allocated now.
    pub peak_bytes: u64,
}

/// A budget that cannot be kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Something larger than the whole budget leaves room for.
    #[error(
        "vram budget of {budget_bytes} bytes is too small: {requested_bytes} bytes are needed for {what}, \
         {available_bytes} bytes are available; raise --vram-budget or make the batch smaller"
    )]
    Budget {
        /// What the bytes are needed for.
        what: &'static str,
        /// How many.
        requested_bytes: u64,
        /// How many there are.
        available_bytes: u64,
        /// The budget as stated.
        budget_bytes: u64,
    },
}

/// Transfers to start at an event of a step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Due {
    /// Units whose source compute waits for and gives up, in order.
    pub releases: Vec<UnitId>,
    /// Units to bring back, the soonest needed first.
    pub fetches: Vec<UnitId>,
}

/// See the module.
#[derive(Debug)]
pub struct Planner {
    limits: Limits,
    /// Parameters, buffers and gradients: in use whatever is decided.
    fixed_bytes: u64,
    /// What events do not see, and what steps so far exceeded the budget by; only grows.
    hidden_bytes: u64,
    /// Most bytes allocated at any time, as far as anybody has said.
    peak_bytes: u64,
    phase: Phase,
    /// A step that is over and not yet planned from.
    pending: Option<Pending>,
    /// The record the plan was made from, and the plan.
    plan: Option<(StepRecord, Plan)>,
    /// Bytes allocated when the recorded step began.
    recorded_base: u64,
    step: Step,
    first_id: u64,
}

impl Planner {
    /// A planner for a budget; an error if what is there anyhow exceeds it.
    pub fn new(limits: Limits, fixed_bytes: u64) -> Result<Self, Error> {
        if fixed_bytes > limits.budget_bytes {
            return Err(Error::Budget {
                what: "the parameters, buffers and gradients of the model",
                requested_bytes: fixed_bytes,
                available_bytes: limits.budget_bytes,
                budget_bytes: limits.budget_bytes,
            });
        }
        Ok(Self {
            limits,
            fixed_bytes,
            hidden_bytes: limits.slack_bytes,
            peak_bytes: 0,
            phase: Phase::Explore,
            pending: None,
            plan: None,
            recorded_base: 0,
            step: Step::default(),
            first_id: 0,
        })
    }

    /// A tensor of `bytes` was saved: which unit it is and what to do with it.
    ///
    /// [`Action::Rebuild`] is an answer only where the unit of the same place had a recipe when it
    /// was recorded; the caller who finds that this one has another calls [`Planner::deviate`].
    pub fn pack(&mut self, bytes: u64, sample: Sample) -> Result<(UnitId, Action), Error> {
        let available_bytes = self.limits.budget_bytes - self.fixed_bytes;
        if bytes > available_bytes {
            return Err(Error::Budget {
                what: "one saved tensor",
                requested_bytes: bytes,
                available_bytes,
                budget_bytes: self.limits.budget_bytes,
            });
        }
        if self.step.live_count == 0 {
            self.begin(sample);
        }
        Ok(self.add(bytes, false, sample))
    }

    /// A narrow copy of the unit packed last is made, to rebuild that from.
    pub fn pack_narrow(&mut self, bytes: u64, sample: Sample) -> (UnitId, Action) {
        self.add(bytes, true, sample)
    }

    fn add(&mut self, bytes: u64, is_narrow: bool, sample: Sample) -> (UnitId, Action) {
        let index = self.step.live.len();
        let mut action = Action::Offload;
        let mut unit = Unit::packed(bytes, 0);
        let mut ahead_bytes = bytes;
        if let Some((record, plan)) = self.plan.as_ref().filter(|_| !self.step.deviates) {
            match record.units.get(index) {
                Some(planned) if (planned.bytes, planned.is_narrow) == (bytes, is_narrow) => {
                    action = plan.actions[index];
                    unit.recipe.clone_from(&planned.recipe);
                    unit.coded = planned.coded;
                    if let (Action::Compress, Some(coded)) = (action, unit.coded) {
                        ahead_bytes = coded.bytes;
                    }
                }
                _ => self.step.deviates = true,
            }
        }
        unit.is_narrow = is_narrow;
        // The storage is allocated already and is counted as a unit from here on, unless it is
        // rebuilt: then it is the model's alone once this event is over.
        self.step.held_bytes += bytes;
        // Whether a narrow copy is made is the plan's affair: events are those of the model.
        unit.packed_at = if is_narrow { self.step.events.saturating_sub(1) } else { self.event(sample) };
        let live = match action {
            Action::Keep => Live::Kept,
            Action::Offload | Action::Compress => Live::Leaving,
            Action::Rebuild | Action::Absent => {
                self.step.held_bytes -= bytes;
                Live::Away
            }
        };
        self.step.push(unit, live, ahead_bytes);
        self.skip_absent();
        (UnitId(self.first_id + index as u64), action)
    }

    /// Enters narrow copies that the plan does not make, so that places stay what they were.
    fn skip_absent(&mut self) {
        let index = self.step.live.len();
        let Some((record, plan)) = self.plan.as_ref().filter(|_| !self.step.deviates) else { return };
        if plan.actions.get(index) == Some(&Action::Absent) {
            let mut unit = record.units[index].clone();
            unit.packed_at = self.step.events - 1;
            (unit.needed_at, unit.freed_at) = (None, None);
            self.step.push(unit, Live::Freed, 0);
        }
    }

    /// The unit packed last can be rebuilt from `inputs`: from now on it is.
    pub fn set_recipe(&mut self, unit: UnitId, inputs: &[UnitId]) {
        let inputs = inputs.iter().filter_map(|&input| self.index(input)).collect();
        let Some(index) = self.index(unit) else { return };
        self.step.record.units[index].recipe = Some(Recipe { inputs, cost_us: 0.0 });
        self.left(unit);
    }

    /// The step is not the one that was planned.
    pub fn deviate(&mut self) {
        self.step.deviates = self.plan.is_some();
    }

    /// The source of an offloaded unit has been given up.
    pub fn left(&mut self, unit: UnitId) {
        self.move_to(unit, Live::Leaving, Live::Away);
    }

    /// Backward asks for `unit`.
    pub fn need(&mut self, unit: UnitId, sample: Sample) {
        let Some(index) = self.index(unit) else { return };
        let at = self.event(sample);
        self.step.record.units[index].needed_at.get_or_insert(at);
    }

    /// What the plan wants done by now. Without a plan, after `unit` was needed: those packed before
    /// it, within the lookahead and the budget.
    pub fn due(&mut self, unit: Option<UnitId>, allocated_bytes: u64) -> Due {
        let Some((_, plan)) = self.plan.as_ref().filter(|_| !self.step.deviates) else {
            let fetches = unit.map_or_else(Vec::new, |unit| self.before(unit, allocated_bytes));
            return Due { releases: Vec::new(), fetches };
        };
        let now = self.step.events;
        let step = &mut self.step;
        let mut due = Due::default();
        let name = |unit: usize| UnitId(self.first_id + unit as u64);
        while let Some(&(at, unit)) = plan.schedule.releases.get(step.releases_done) {
            if at >= now {
                break;
            }
            step.releases_done += 1;
            if step.live.get(unit) == Some(&Live::Leaving) {
                due.releases.push(name(unit));
            }
        }
        // Where spikes go unseen, what is back early stays within the lookahead, whatever room there seems to be.
        if self.limits.slack_bytes > 0 {
            due.fetches = unit.map_or_else(Vec::new, |unit| self.before(unit, allocated_bytes));
            return due;
        }
        while let Some(&(at, unit)) = plan.schedule.fetches.get(step.fetches_done) {
            if at >= now {
                break;
            }
            step.fetches_done += 1;
            // One that is released at the same event is away by the time the fetch starts.
            if matches!(step.live.get(unit), Some(Live::Away | Live::Leaving)) {
                due.fetches.push(name(unit));
            }
        }
        due
    }

    fn before(&self, unit: UnitId, allocated_bytes: u64) -> Vec<UnitId> {
        let Some(index) = self.index(unit) else { return Vec::new() };
        let mut room = self
            .limits
            .lookahead_bytes
            .saturating_sub(self.step.ahead_bytes)
            .min(self.limits.budget_bytes.saturating_sub(allocated_bytes + self.hidden_bytes));
        let mut chosen = Vec::new();
        for earlier in (0..index).rev() {
            let unit = &self.step.record.units[earlier];
            if self.step.live[earlier] != Live::Away || unit.recipe.is_some() {
                continue;
            }
            if unit.bytes > room {
                break;
            }
            room -= unit.bytes;
            chosen.push(UnitId(self.first_id + earlier as u64));
        }
        chosen
    }

    /// A buffer for `unit` was allocated ahead of need.
    pub fn prefetched(&mut self, unit: UnitId) {
        self.move_to(unit, Live::Away, Live::Ahead);
    }

    /// `unit` is back and in use; compute waited `stalled_us` for it.
    pub fn arrived(&mut self, unit: UnitId, stalled_us: f64) {
        self.step.stalled_us += stalled_us;
        self.move_to(unit, Live::Away, Live::Back);
        self.move_to(unit, Live::Ahead, Live::Back);
    }

    /// The buffer of a unit that was brought back or rebuilt is given up; the unit lives on elsewhere.
    pub fn evicted(&mut self, unit: UnitId) {
        self.move_to(unit, Live::Back, Live::Away);
        self.move_to(unit, Live::Ahead, Live::Away);
    }

    /// The last saved tensor of `unit` is gone. `peak_bytes` is the most that was allocated since
    /// the step began, where the device can say; it is asked for when the step ends.
    ///
    /// True if that was an event, for which [`Planner::settle`] wants a time.
    pub fn free(&mut self, unit: UnitId, sample: Sample, peak_bytes: impl FnOnce() -> Option<u64>) -> bool {
        let Some(index) = self.index(unit) else { return false };
        if self.step.live[index] == Live::Freed {
            return false;
        }
        let is_event = !self.step.record.units[index].is_narrow;
        let at = if is_event { self.event(sample) } else { self.step.events.saturating_sub(1) };
        self.step.record.units[index].freed_at = Some(at);
        let state = self.step.live[index];
        self.move_to(unit, state, Live::Freed);
        self.step.live_count -= 1;
        if self.step.live_count == 0 {
            self.end(peak_bytes());
        }
        is_event
    }

    /// Whether device times of events are wanted.
    #[must_use]
    pub fn is_timing(&self) -> bool {
        self.phase != Phase::Follow
    }

    /// Whether samples are recorded, because the step explores, calibrates or deviates from its plan.
    /// A step that follows its plan needs none, and asking a GPU's allocator is not free.
    #[must_use]
    pub fn is_recording(&self) -> bool {
        let between = self.step.live_count == 0;
        self.step.deviates && !between || matches!(self.phase, Phase::Explore | Phase::Calibrate)
    }

    /// Whether the step looks for recipes.
    #[must_use]
    pub fn is_exploring(&self) -> bool {
        self.phase == Phase::Explore
    }

    /// Whether the step under way follows a plan.
    #[must_use]
    pub fn has_plan(&self) -> bool {
        self.plan.is_some() && !self.step.deviates
    }

    /// Bytes of units held on the device now.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.step.held_bytes
    }

    /// Most bytes allocated on the device at any time since the planner was made.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.peak_bytes
    }

    /// The plan in force, and the step it was made from.
    #[must_use]
    pub fn plan(&self) -> Option<&(StepRecord, Plan)> {
        self.plan.as_ref()
    }

    /// The limits it plans for.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    fn index(&self, unit: UnitId) -> Option<usize> {
        let index = usize::try_from(unit.0.checked_sub(self.first_id)?).ok()?;
        (index < self.step.live.len()).then_some(index)
    }

    fn event(&mut self, sample: Sample) -> usize {
        let at = self.step.event(sample, self.is_recording());
        self.peak_bytes = self.peak_bytes.max(self.step.peak_bytes);
        at
    }

    fn move_to(&mut self, unit: UnitId, from: Live, to: Live) {
        if let Some(index) = self.index(unit) {
            self.step.move_to(index, from, to);
        }
    }
}
