//! What a planner learns from one step for the next: which steps are recorded and timed, and what is planned from.

use super::{Planner, Sample, UnitId, step::Step};
use crate::{Coded, Link, StepRecord, make_plan};

#[derive(Debug)]
pub(super) struct Pending {
    pub record: StepRecord,
    /// Whether its times are the device's already; the shorter ones count then.
    pub is_timed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
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

impl Planner {
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

    pub(super) fn begin(&mut self, sample: Sample) {
        if let Some(Pending { record, .. }) = self.pending.take() {
            self.make(record, sample.allocated_bytes);
        }
        self.first_id += self.step.live.len() as u64;
        self.step = Step::begun(sample);
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

    pub(super) fn end(&mut self, peak_bytes: Option<u64>) {
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
}
