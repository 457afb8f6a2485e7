//! A plan: one action per unit, made from a record and limits by a pure function.

use serde::{Deserialize, Serialize};

use crate::{
    Link, Prediction, Schedule, StepRecord,
    profile::Profile,
    simulate,
    simulate::{needs, signed},
};

/// What to do with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Leave it on the device.
    Keep,
    /// Send it away when it is packed, bring it back before it is needed.
    Offload,
    /// Let it go when it is packed, compute it again when it is needed.
    Rebuild,
    /// A narrow copy that nobody needs: it is not made.
    Absent,
}

/// What a plan has to respect.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Most bytes in use on the device, all included.
    pub budget_bytes: u64,
    /// Bytes set aside for units that are brought back early in a step without a plan.
    pub lookahead_bytes: u64,
    /// Bytes of the budget that plans leave alone, where the device does not count exactly.
    pub slack_bytes: u64,
    /// The link that offloaded units travel on.
    pub link: Link,
}

/// Actions for the units of a step, with what they should cost.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// One per unit, in the order of packing.
    pub actions: Vec<Action>,
    /// When the offloaded ones go and come.
    pub schedule: Schedule,
    /// What the simulator says of it.
    pub predicted: Prediction,
}

/// Shares of the rebuildable units that the first round of the search tries.
const SHARES: usize = 8;
/// Room left for units on their way, in sizes of the largest unit.
const RESERVES: [u64; 4] = [1, 2, 4, 8];

/// Chooses what to rebuild, what to keep and what to offload so that the simulated step is the
/// shortest within the budget.
///
/// Rebuilds are taken in the order of bytes saved a microsecond. For a number of them, what fits is
/// kept, last packed first (needed first in backward, so it occupies memory for the shortest time
/// and saves the transfer with the closest deadline), and the rest goes. The number of rebuilds and
/// the room left for what is on its way are searched, and the simulator decides.
#[must_use]
pub fn make_plan(record: &StepRecord, limits: &Limits) -> Plan {
    let order = rebuild_order(record);
    // A budget that nothing can keep must not drown the price: the best that can be done counts.
    let all_out = choose(record, &Limits { budget_bytes: 0, ..*limits }, &[], 0);
    let floor = simulate(record, &all_out, &Limits { budget_bytes: 0, ..*limits }).1.peak_bytes;
    let largest = record.units.iter().map(|unit| unit.bytes).max().unwrap_or(0);
    let budget = if floor > limits.budget_bytes { floor + 2 * largest } else { limits.budget_bytes };
    let mut search = Search { record, limits, budget, order: &order, best: None };
    let steps = SHARES.min(order.len());
    for step in 0..=steps {
        search.attempt(order.len() * step / steps.max(1), RESERVES[1]);
    }
    for reserve in [RESERVES[0], RESERVES[2], RESERVES[3], 0] {
        search.attempt(search.rebuilds(), reserve);
    }
    let mut stride = order.len() / steps.max(1) / 2;
    // A hundredth of the rebuilds is fine enough for long steps, where each is little of the whole.
    while stride > order.len() / 100 {
        let (middle, reserve) = (search.rebuilds(), search.reserve());
        search.attempt(middle.saturating_sub(stride), reserve);
        search.attempt((middle + stride).min(order.len()), reserve);
        stride /= 2;
    }
    search.best.map(|found| settle(record, limits, found.plan)).unwrap_or_default()
}

/// Keeps what the plan would bring back as soon as it has left, where that still fits and costs nothing.
fn settle(record: &StepRecord, limits: &Limits, plan: Plan) -> Plan {
    let mut actions = plan.actions.clone();
    let mut released = vec![None; actions.len()];
    for &(at, unit) in &plan.schedule.releases {
        released[unit] = Some(at);
    }
    for &(at, unit) in &plan.schedule.fetches {
        if released[unit].is_some_and(|released| at <= released + 1) {
            actions[unit] = Action::Keep;
        }
    }
    let (schedule, predicted) = simulate(record, &actions, limits);
    let fits = predicted.peak_bytes <= limits.budget_bytes;
    if fits && predicted.step_us <= plan.predicted.step_us {
        Plan { actions, schedule, predicted }
    } else {
        plan
    }
}

/// Units with a recipe, the most bytes a microsecond first; among equals the last packed, which the
/// link has the least time for.
fn rebuild_order(record: &StepRecord) -> Vec<usize> {
    let gain = |index: usize| {
        let unit = &record.units[index];
        let recipe = unit.recipe.as_ref()?;
        let narrow: u64 = recipe.inputs.iter().filter_map(|&input| narrow_bytes(record, input)).sum();
        Some(unit.bytes.saturating_sub(narrow) as f64 / recipe.cost_us.max(1e-3))
    };
    let mut order: Vec<_> =
        (0..record.units.len()).filter_map(|index| gain(index).map(|gain| (gain, index))).collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    order.into_iter().map(|(_, index)| index).collect()
}

fn narrow_bytes(record: &StepRecord, index: usize) -> Option<u64> {
    record.units.get(index).filter(|unit| unit.is_narrow).map(|unit| unit.bytes)
}

struct Search<'a> {
    record: &'a StepRecord,
    limits: &'a Limits,
    budget: u64,
    order: &'a [usize],
    best: Option<Found>,
}

struct Found {
    rebuilds: usize,
    reserve: u64,
    plan: Plan,
}

impl Search<'_> {
    fn rebuilds(&self) -> usize {
        self.best.as_ref().map_or(0, |found| found.rebuilds)
    }

    fn reserve(&self) -> u64 {
        self.best.as_ref().map_or(0, |found| found.reserve)
    }

    fn attempt(&mut self, rebuilds: usize, reserve: u64) {
        let tried = |found: &Found| found.rebuilds == rebuilds && found.reserve == reserve;
        if self.best.as_ref().is_some_and(tried) {
            return;
        }
        let actions = choose(self.record, self.limits, &self.order[..rebuilds], reserve);
        let (schedule, predicted) = simulate(self.record, &actions, self.limits);
        let price = |of: &Prediction| (of.peak_bytes.saturating_sub(self.budget), of.step_us);
        let better = self.best.as_ref().is_none_or(|found| price(&predicted) < price(&found.plan.predicted));
        if better {
            self.best = Some(Found { rebuilds, reserve, plan: Plan { actions, schedule, predicted } });
        }
    }
}

/// Actions with the given units rebuilt: of the others what fits is kept, last packed first.
fn choose(record: &StepRecord, limits: &Limits, rebuilt: &[usize], reserve: u64) -> Vec<Action> {
    let mut actions = vec![Action::Offload; record.units.len()];
    for &unit in rebuilt {
        actions[unit] = Action::Rebuild;
    }
    for (index, unit) in record.units.iter().enumerate() {
        if unit.is_narrow && actions[index - 1] != Action::Rebuild {
            actions[index] = Action::Absent;
        }
    }
    let largest = record.units.iter().map(|unit| unit.bytes).max().unwrap_or(0);
    let reserved = record.hidden_bytes + reserve * largest;
    let limit = signed(limits.budget_bytes.saturating_sub(reserved));
    let full = signed(limits.budget_bytes.saturating_sub(record.hidden_bytes));
    let needs = needs(record, &actions);
    let mut profile = returned_load(record, &actions, &needs);
    // Where the reserve is not used because everything fits, it is not needed either.
    let all_fit = everything_fits(record, &actions, &needs, full);
    let limit = if all_fit { full } else { limit };
    for (index, unit) in record.units.iter().enumerate().rev() {
        if actions[index] != Action::Offload {
            continue;
        }
        // From its return on it is in the profile in any case.
        let away = unit.packed_at..needs[index].map_or(record.end_of(unit), |need| need + 1);
        if profile.max(away.clone()) + signed(unit.bytes) <= limit {
            profile.add(away, signed(unit.bytes));
            actions[index] = Action::Keep;
        }
    }
    actions
}

/// Bytes at each event with every offloaded and rebuilt unit away until it is needed.
fn returned_load(record: &StepRecord, actions: &[Action], needs: &[Option<usize>]) -> Profile {
    let values: Vec<_> = record.events.iter().map(|event| signed(event.other_bytes)).collect();
    let mut profile = Profile::new(&values);
    for (index, unit) in record.units.iter().enumerate() {
        if let (Some(need), true) = (needs[index], actions[index] != Action::Absent) {
            profile.add(need + 1..record.end_of(unit), signed(unit.bytes));
        }
    }
    profile
}

fn everything_fits(record: &StepRecord, actions: &[Action], needs: &[Option<usize>], limit: i64) -> bool {
    let mut profile = returned_load(record, actions, needs);
    for (index, unit) in record.units.iter().enumerate() {
        if actions[index] == Action::Offload {
            let end = needs[index].map_or(record.end_of(unit), |need| need + 1);
            profile.add(unit.packed_at..end, signed(unit.bytes));
        }
    }
    profile.max(0..record.events.len()) <= limit
}
