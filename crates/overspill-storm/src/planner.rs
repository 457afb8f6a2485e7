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

use crate::{Action, Coded, Event, Limits, Link, Plan, Recipe, StepRecord, Unit, make_plan};

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

#[derive(Debug)]
struct Pending {
    record: StepRecord,
    /// Whether its times are the device's already; the shorter ones count then.
    is_timed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Explore,
    Calibrate,
    /// With the steps left to time, this one included.
    Time(u8),
    Follow,
}

const TIMED_STEPS: u8 = 2;
/// Of the link's measured speed, what a plan counts on.
const LINK_SHARE: f64 = 0.97;
/// The same as long as times are still being measured.
const SHY_LINK_SHARE: f64 = LINK_SHARE / 2.0;

/// The step under way.
#[derive(Debug, Default)]
struct Step {
    record: StepRecord,
    live: Vec<Live>,
    /// Bytes that each unit takes while it is brought back early: fewer than its own if it is compressed.
    ahead: Vec<u64>,
    live_count: usize,
    /// Events so far, recorded or not.
    events: usize,
    /// How much of the plan's schedule has been given out.
    releases_done: usize,
    fetches_done: usize,
    began_us: f64,
    base_bytes: u64,
    stalled_us: f64,
    /// Bytes of units that overspill holds on the device now: kept, on their way out, brought back.
    held_bytes: u64,
    /// Of those, brought back and not yet asked for.
    ahead_bytes: u64,
    peak_bytes: u64,
    deviates: bool,
}

/// Where a unit of this step is, as far as device memory goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Live {
    Kept,
    Leaving,
    Away,
    Ahead,
    Back,
    Freed,
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
        self.push(unit, live, ahead_bytes);
        self.skip_absent();
        (UnitId(self.first_id + index as u64), action)
    }

    fn push(&mut self, unit: Unit, live: Live, ahead_bytes: u64) {
        if live != Live::Freed {
            self.step.live_count += 1;
        }
        self.step.record.units.push(unit);
        self.step.live.push(live);
        self.step.ahead.push(ahead_bytes);
    }

    /// Enters narrow copies that the plan does not make, so that places stay what they were.
    fn skip_absent(&mut self) {
        let index = self.step.live.len();
        let Some((record, plan)) = self.plan.as_ref().filter(|_| !self.step.deviates) else { return };
        if plan.actions.get(index) == Some(&Action::Absent) {
            let mut unit = record.units[index].clone();
            unit.packed_at = self.step.events - 1;
            (unit.needed_at, unit.freed_at) = (None, None);
            self.push(unit, Live::Freed, 0);
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

    /// Times of the events of the step that has just ended, measured on the device, of the rebuilds in it, and
    /// what the link codec made of units. Without it host times stand in, rebuilds are free, and nothing is compressed.
    pub fn settle(
        &mut self,
        times_us: &[f64],
        costs_us: &[(UnitId, f64)],
        coded: &[(UnitId, Coded)],
        link: Link,
    ) {
        // Copies that share memory with kernels vary by a few percent, and a late one stalls compute.
        let share = match self.phase {
            Phase::Calibrate | Phase::Time(TIMED_STEPS) => SHY_LINK_SHARE,
            _ => LINK_SHARE,
        };
        self.limits.link =
            Link { offload_gbps: link.offload_gbps * share, onboard_gbps: link.onboard_gbps * share };
        let first_id = self.first_id;
        let Some(pending) = &mut self.pending else { return };
        let record = &mut pending.record;
        if times_us.len() == record.events.len() && !times_us.is_empty() {
            let before: Vec<f64> = record.events.iter().map(|event| event.time_us).collect();
            let total = |times: &[f64]| times.last().copied().unwrap_or(0.0) - times[0];
            let mut now_us = 0.0;
            for (index, event) in record.events.iter_mut().enumerate().skip(1) {
                let step = |times: &[f64]| (times[index] - times[index - 1]).max(0.0);
                let known = if pending.is_timed { step(&before) } else { f64::INFINITY };
                now_us += known.min(step(times_us));
                event.time_us = now_us;
            }
            // Each interval's shortest time is its shape; no step is as fast as all of them together.
            let known = if pending.is_timed { total(&before) } else { f64::INFINITY };
            let scale = known.min(total(times_us)) / now_us.max(1e-3);
            record.events.iter_mut().for_each(|event| event.time_us *= scale);
            if let Some(first) = record.events.first_mut() {
                first.time_us = 0.0;
            }
        }
        let index = |unit: UnitId| usize::try_from(unit.0.checked_sub(first_id)?).ok();
        for &(unit, cost_us) in costs_us {
            let unit = index(unit).and_then(|index| record.units.get_mut(index));
            if let Some(recipe) = unit.and_then(|unit| unit.recipe.as_mut()) {
                recipe.cost_us = cost_us;
            }
        }
        for &(unit, coded) in coded {
            if let Some(unit) = index(unit).and_then(|index| record.units.get_mut(index)) {
                unit.coded = Some(coded);
            }
        }
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

    fn begin(&mut self, sample: Sample) {
        if let Some(Pending { record, .. }) = self.pending.take() {
            self.make(record, sample.allocated_bytes);
        }
        self.first_id += self.step.live.len() as u64;
        let base_bytes = sample.allocated_bytes;
        self.step = Step { began_us: sample.now_us, base_bytes, ..Step::default() };
    }

    /// A plan from `record`, for a step that begins with `base_bytes` allocated: what came since the
    /// recorded one began (gradients, the optimizer's state) stays.
    fn make(&mut self, record: StepRecord, base_bytes: u64) {
        let mut limits = self.limits;
        limits.budget_bytes -=
            base_bytes.saturating_sub(self.recorded_base).min(limits.budget_bytes - self.fixed_bytes);
        let plan = make_plan(&record, &limits);
        self.plan = Some((record, plan));
    }

    fn end(&mut self, peak_bytes: Option<u64>) {
        let peak = peak_bytes.unwrap_or(0).max(self.step.peak_bytes);
        self.peak_bytes = self.peak_bytes.max(peak);
        if self.step.deviates {
            // Sampled in part only: the next step of this shape is recorded from its first event.
            self.plan = None;
            self.phase = Phase::Explore;
            return;
        }
        if matches!(self.phase, Phase::Time(_) | Phase::Follow) {
            self.followed(peak);
            return;
        }
        let unseen = peak.saturating_sub(self.step.peak_bytes);
        self.hidden_bytes = self.hidden_bytes.max(unseen);
        let mut record = std::mem::take(&mut self.step.record);
        record.hidden_bytes = self.hidden_bytes;
        for index in 1..record.units.len() {
            // A narrow copy that was not made would have lived as long as what it stands for.
            if record.units[index].is_narrow && record.units[index].freed_at.is_none() {
                record.units[index].freed_at = record.units[index - 1].freed_at;
            }
        }
        self.recorded_base = self.step.base_bytes;
        self.pending = Some(Pending { record, is_timed: false });
        // A device that does not count exactly shows a spike between two events once, when it exceeds all
        // before it: the step that saw it is the one to plan from, and its times are good enough there.
        self.phase = match self.phase {
            Phase::Explore if self.limits.slack_bytes > 0 => Phase::Follow,
            Phase::Explore => Phase::Calibrate,
            _ => Phase::Time(TIMED_STEPS),
        };
    }

    /// A step that followed its plan is over: `peak` bytes were allocated at most.
    fn followed(&mut self, peak: u64) {
        let overrun = peak.saturating_sub(self.limits.budget_bytes);
        let timed = match self.phase {
            Phase::Time(left) => {
                self.phase = if left > 1 { Phase::Time(left - 1) } else { Phase::Follow };
                true
            }
            _ => false,
        };
        let Some((record, plan)) = &self.plan else { return };
        // A plan that keeps nothing has nothing more to give.
        let too_much = overrun > 0 && plan.predicted.kept_bytes > 0;
        if !timed && !too_much {
            return;
        }
        if too_much {
            self.hidden_bytes += overrun;
        }
        let record = StepRecord { hidden_bytes: self.hidden_bytes, ..record.clone() };
        self.pending = Some(Pending { record, is_timed: true });
    }

    fn event(&mut self, sample: Sample) -> usize {
        let recording = self.is_recording();
        let step = &mut self.step;
        let peak_bytes = sample.peak_bytes.max(sample.allocated_bytes);
        step.peak_bytes = step.peak_bytes.max(peak_bytes);
        self.peak_bytes = self.peak_bytes.max(step.peak_bytes);
        step.events += 1;
        if recording {
            step.record.events.push(Event {
                time_us: sample.now_us - step.began_us - step.stalled_us,
                other_bytes: peak_bytes.saturating_sub(step.held_bytes),
            });
        }
        step.events - 1
    }

    fn index(&self, unit: UnitId) -> Option<usize> {
        let index = usize::try_from(unit.0.checked_sub(self.first_id)?).ok()?;
        (index < self.step.live.len()).then_some(index)
    }

    fn move_to(&mut self, unit: UnitId, from: Live, to: Live) {
        let Some(index) = self.index(unit) else { return };
        if self.step.live[index] != from {
            return;
        }
        let step = &mut self.step;
        let held = |state: Live| match state {
            Live::Ahead => step.ahead[index],
            Live::Kept | Live::Leaving | Live::Back => step.record.units[index].bytes,
            Live::Away | Live::Freed => 0,
        };
        let (before, after) = (held(from), held(to));
        step.held_bytes = step.held_bytes + after - before;
        if from == Live::Ahead {
            step.ahead_bytes -= before;
        }
        if to == Live::Ahead {
            step.ahead_bytes += after;
        }
        step.live[index] = to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Link = Link { offload_gbps: 1.0, onboard_gbps: 1.0 };

    fn planner(budget_bytes: u64) -> Planner {
        Planner::new(Limits { budget_bytes, lookahead_bytes: 100, slack_bytes: 0, link: LINK }, 100)
            .expect("fits")
    }

    fn sample(allocated_bytes: u64) -> Sample {
        Sample { now_us: 0.0, allocated_bytes, peak_bytes: allocated_bytes }
    }

    /// A forward over `sizes` and a backward in reverse, with `peak` reported at the end. Those at
    /// `rebuilt` have a recipe that reads the unit before them.
    fn step(planner: &mut Planner, sizes: &[u64], rebuilt: &[usize], peak: u64) -> Vec<Action> {
        let mut units: Vec<UnitId> = Vec::new();
        let mut actions = Vec::new();
        for (index, &bytes) in sizes.iter().enumerate() {
            let (unit, action) =
                planner.pack(bytes, sample(100 + planner.held_bytes() + bytes)).expect("fits");
            if rebuilt.contains(&index) && planner.is_exploring() {
                planner.set_recipe(unit, &[units[index - 1]]);
            } else if action == Action::Offload {
                planner.left(unit);
            }
            units.push(unit);
            actions.push(action);
        }
        for &unit in units.iter().rev() {
            planner.need(unit, sample(100 + planner.held_bytes()));
            for ahead in planner.due(Some(unit), 100 + planner.held_bytes()).fetches {
                planner.prefetched(ahead);
            }
            planner.arrived(unit, 0.0);
            planner.free(unit, sample(100 + planner.held_bytes()), || Some(peak));
        }
        assert_eq!(planner.held_bytes(), 0);
        actions
    }

    fn kept(actions: &[Action]) -> usize {
        actions.iter().filter(|action| **action == Action::Keep).count()
    }

    #[test]
    fn the_first_step_offloads_and_the_second_keeps_what_fits() {
        let mut planner = planner(400);
        assert_eq!(step(&mut planner, &[90; 4], &[], 0), [Action::Offload; 4]);
        let second = step(&mut planner, &[90; 4], &[], 0);
        assert!(second[0] == Action::Offload && second[3] == Action::Keep, "{second:?}");
        assert_eq!(step(&mut planner, &[90; 4], &[], 0), second);
        assert!(!planner.is_recording());
    }

    #[test]
    fn what_has_a_recipe_is_rebuilt_where_it_does_not_fit() {
        let mut planner = planner(400);
        step(&mut planner, &[90; 4], &[1, 3], 0);
        let second = step(&mut planner, &[90; 4], &[1, 3], 0);
        assert!(second.contains(&Action::Rebuild), "{second:?}");
        planner.settle(&[0.0; 12], &[], &[], LINK);
        assert_eq!(step(&mut planner, &[90; 4], &[1, 3], 0), second);
    }

    #[test]
    fn plans_count_on_half_of_the_link_while_it_is_timed() {
        let mut planner = planner(400);
        let mut shares = Vec::new();
        for _ in 0..5 {
            step(&mut planner, &[90; 4], &[], 0);
            planner.settle(&[0.0; 12], &[], &[], LINK);
            shares.push(planner.limits().link.offload_gbps);
        }
        assert_eq!(shares, [0.485, 0.485, 0.97, 0.97, 0.97]);
    }

    #[test]
    fn another_shape_falls_back_to_offloading_and_is_recorded() {
        let mut planner = planner(1000);
        step(&mut planner, &[90; 4], &[], 0);
        step(&mut planner, &[90; 4], &[], 0);
        assert_eq!(step(&mut planner, &[90, 80, 90], &[], 0)[1..], [Action::Offload; 2]);
        assert!(planner.is_exploring());
        step(&mut planner, &[90, 80, 90], &[], 0);
        assert_eq!(step(&mut planner, &[90, 80, 90], &[], 0), [Action::Keep; 3]);
    }

    #[test]
    fn an_overrun_that_no_event_saw_makes_the_next_step_keep_less() {
        let mut planner = planner(600);
        for _ in 0..2 {
            step(&mut planner, &[90; 6], &[], 0);
        }
        let before = kept(&step(&mut planner, &[90; 6], &[], 800));
        assert!(kept(&step(&mut planner, &[90; 6], &[], 0)) < before);
        assert_eq!(planner.peak_bytes(), 800);
    }

    #[test]
    fn what_is_allocated_between_steps_is_taken_off_the_budget() {
        let mut planner = planner(600);
        step(&mut planner, &[90; 4], &[], 0);
        let (unit, _) = planner.pack(90, sample(100 + 300)).expect("fits");
        assert!(planner.plan().is_some_and(|(_, plan)| kept(&plan.actions) < 4));
        planner.free(unit, sample(100), || None);
    }

    #[test]
    fn budgets_that_cannot_be_kept_are_errors_with_their_facts() {
        let limits = *planner(400).limits();
        let Error::Budget { requested_bytes, budget_bytes, .. } =
            Planner::new(limits, 401).expect_err("parameters do not fit");
        assert_eq!((requested_bytes, budget_bytes), (401, 400));
        assert!(planner(400).pack(301, sample(0)).is_err(), "one tensor larger than what is left");
    }
}
