//! The planner as the edge to PyTorch drives it: a state machine over pack, need, and free.
//!
//! The first step of a shape offloads everything (keeping could already be too much) and is
//! recorded; its end makes the plan for the steps that pack the same units in the same order. A
//! step that deviates from the plan falls back to offloading, which is always within the budget,
//! and is recorded anew.

use crate::{Action, Event, Limits, Plan, StepRecord, Unit, make_plan};

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

/// See the module.
#[derive(Debug)]
pub struct Planner {
    limits: Limits,
    /// Parameters, buffers and gradients: in use whatever is decided.
    fixed_bytes: u64,
    /// Hidden working sets measured by steps so far; only grows.
    hidden_bytes: u64,
    /// Most bytes allocated at any time, as far as anybody has said.
    peak_bytes: u64,
    /// Sizes of the units it is for, the step it was made from, and the plan.
    plan: Option<(Vec<u64>, StepRecord, Plan)>,
    step: Step,
    first_id: u64,
}

/// The step under way.
#[derive(Debug, Default)]
struct Step {
    record: StepRecord,
    live: Vec<Live>,
    live_count: usize,
    began_us: f64,
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

impl Live {
    fn is_held(self) -> bool {
        matches!(self, Self::Kept | Self::Leaving | Self::Ahead | Self::Back)
    }
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
            hidden_bytes: 0,
            peak_bytes: 0,
            plan: None,
            step: Step::default(),
            first_id: 0,
        })
    }

    /// A tensor of `bytes` was saved: which unit it is and what to do with it.
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
        let index = self.step.live.len();
        let planned = self.plan.as_ref().filter(|_| !self.step.deviates);
        let action = match planned {
            Some((sizes, _, plan)) if sizes.get(index) == Some(&bytes) => plan.actions[index],
            Some(_) => {
                self.step.deviates = true;
                Action::Offload
            }
            None => Action::Offload,
        };
        // The storage is allocated already and is counted as a unit from here on.
        self.step.held_bytes += bytes;
        let packed_at = self.event(sample);
        self.step.record.units.push(Unit { bytes, packed_at, needed_at: None, freed_at: None });
        self.step.live.push(if action == Action::Keep { Live::Kept } else { Live::Leaving });
        self.step.live_count += 1;
        Ok((UnitId(self.first_id + index as u64), action))
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

    /// Units to bring back now, the soonest needed first, all within the lookahead and the budget.
    #[must_use]
    pub fn ahead_of(&self, unit: UnitId, allocated_bytes: u64) -> Vec<UnitId> {
        let Some(index) = self.index(unit) else { return Vec::new() };
        let mut room = self
            .limits
            .lookahead_bytes
            .saturating_sub(self.step.ahead_bytes)
            .min(self.limits.budget_bytes.saturating_sub(allocated_bytes + self.hidden_bytes));
        let mut chosen = Vec::new();
        for earlier in (0..index).rev() {
            if self.step.live[earlier] != Live::Away {
                continue;
            }
            let bytes = self.step.record.units[earlier].bytes;
            if bytes > room {
                break;
            }
            room -= bytes;
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

    /// The buffer of a unit that was brought back is given up; the unit lives on elsewhere.
    pub fn evicted(&mut self, unit: UnitId) {
        self.move_to(unit, Live::Back, Live::Away);
        self.move_to(unit, Live::Ahead, Live::Away);
    }

    /// The last saved tensor of `unit` is gone. `peak_bytes` is the most that was allocated since
    /// the step began, where the device can say; it is asked for when the step ends.
    pub fn free(&mut self, unit: UnitId, sample: Sample, peak_bytes: impl FnOnce() -> Option<u64>) {
        let Some(index) = self.index(unit) else { return };
        if self.step.live[index] == Live::Freed {
            return;
        }
        let at = self.event(sample);
        self.step.record.units[index].freed_at = Some(at);
        let state = self.step.live[index];
        self.move_to(unit, state, Live::Freed);
        self.step.live_count -= 1;
        if self.step.live_count == 0 {
            self.end(peak_bytes());
        }
    }

    /// Whether samples are recorded, because there is no plan yet or the step deviates from it. A
    /// step that follows its plan needs none, and asking a GPU's allocator is not free.
    #[must_use]
    pub fn is_recording(&self) -> bool {
        self.plan.is_none() || self.step.deviates
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

    /// The plan in force, if a step has been recorded.
    #[must_use]
    pub fn plan(&self) -> Option<&Plan> {
        self.plan.as_ref().map(|(_, _, plan)| plan)
    }

    /// The limits it plans for.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Speeds measured since; used for the next plan.
    pub fn set_link(&mut self, link: crate::Link) {
        self.limits.link = link;
    }

    fn begin(&mut self, sample: Sample) {
        self.first_id += self.step.live.len() as u64;
        self.step = Step { began_us: sample.now_us, ..Step::default() };
    }

    fn end(&mut self, peak_bytes: Option<u64>) {
        let peak = peak_bytes.unwrap_or(0).max(self.step.peak_bytes);
        self.peak_bytes = self.peak_bytes.max(peak);
        if self.step.deviates {
            // Sampled in part only: the next step of this shape is recorded from its first event.
            self.plan = None;
            return;
        }
        let overrun = peak.saturating_sub(self.limits.budget_bytes);
        if let Some((_, planned, plan)) = &mut self.plan {
            if overrun > 0 {
                self.hidden_bytes += overrun;
                planned.hidden_bytes = self.hidden_bytes;
                *plan = make_plan(planned, &self.limits);
            }
            return;
        }
        self.hidden_bytes = self.hidden_bytes.max(peak - self.step.peak_bytes);
        let mut record = self.step.record.clone();
        record.hidden_bytes = self.hidden_bytes;
        let sizes = record.units.iter().map(|unit| unit.bytes).collect();
        let plan = make_plan(&record, &self.limits);
        self.plan = Some((sizes, record, plan));
    }

    fn event(&mut self, sample: Sample) -> usize {
        let step = &mut self.step;
        step.peak_bytes = step.peak_bytes.max(sample.allocated_bytes);
        self.peak_bytes = self.peak_bytes.max(step.peak_bytes);
        step.record.events.push(Event {
            time_us: sample.now_us - step.began_us - step.stalled_us,
            other_bytes: sample.allocated_bytes.saturating_sub(step.held_bytes),
        });
        step.record.events.len() - 1
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
        let bytes = self.step.record.units[index].bytes;
        let step = &mut self.step;
        match (from.is_held(), to.is_held()) {
            (false, true) => step.held_bytes += bytes,
            (true, false) => step.held_bytes -= bytes,
            _ => {}
        }
        if from == Live::Ahead {
            step.ahead_bytes -= bytes;
        }
        if to == Live::Ahead {
            step.ahead_bytes += bytes;
        }
        step.live[index] = to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Link;

    fn planner(budget_bytes: u64) -> Planner {
        let link = Link { offload_gbps: 1.0, onboard_gbps: 1.0 };
        Planner::new(Limits { budget_bytes, lookahead_bytes: 100, link }, 100).expect("fits")
    }

    fn sample(allocated_bytes: u64) -> Sample {
        Sample { now_us: 0.0, allocated_bytes }
    }

    /// A forward over `sizes` and a backward in reverse, with `peak` reported at the end.
    fn step(planner: &mut Planner, sizes: &[u64], peak: u64) -> Vec<Action> {
        let mut units = Vec::new();
        let mut actions = Vec::new();
        for &bytes in sizes {
            let (unit, action) =
                planner.pack(bytes, sample(100 + planner.held_bytes() + bytes)).expect("fits");
            if action == Action::Offload {
                planner.left(unit);
            }
            units.push(unit);
            actions.push(action);
        }
        for &unit in units.iter().rev() {
            planner.need(unit, sample(100 + planner.held_bytes()));
            planner.arrived(unit, 0.0);
            planner.free(unit, sample(100 + planner.held_bytes()), || Some(peak));
        }
        assert_eq!(planner.held_bytes(), 0);
        actions
    }

    #[test]
    fn the_first_step_offloads_and_the_second_keeps_what_fits() {
        let mut planner = planner(400);
        assert_eq!(step(&mut planner, &[90; 4], 0), [Action::Offload; 4]);
        let second = step(&mut planner, &[90; 4], 0);
        assert_eq!(second, [Action::Offload, Action::Offload, Action::Keep, Action::Keep]);
        assert!(!planner.is_recording());
    }

    #[test]
    fn another_shape_falls_back_to_offloading_and_is_recorded() {
        let mut planner = planner(1000);
        step(&mut planner, &[90; 4], 0);
        assert_eq!(step(&mut planner, &[90, 80, 90], 0)[1..], [Action::Offload; 2]);
        assert!(planner.is_recording());
        step(&mut planner, &[90, 80, 90], 0);
        assert_eq!(step(&mut planner, &[90, 80, 90], 0), [Action::Keep; 3]);
    }

    #[test]
    fn an_overrun_that_no_event_saw_makes_the_next_step_keep_less() {
        let mut planner = planner(400);
        step(&mut planner, &[90; 4], 0);
        let kept = |actions: Vec<Action>| actions.iter().filter(|a| **a == Action::Keep).count();
        assert_eq!(kept(step(&mut planner, &[90; 4], 450)), 2);
        assert_eq!(kept(step(&mut planner, &[90; 4], 0)), 1);
        assert_eq!(planner.peak_bytes(), 450);
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
