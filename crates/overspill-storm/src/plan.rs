//! A plan: one action per unit, made from a record and limits by a pure function.

use serde::{Deserialize, Serialize};

use crate::{
    Link, Prediction, Schedule, StepRecord, Unit,
    profile::Profile,
    simulate,
    simulate::{Load, needs, signed},
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
    /// As offload, but by the link codec: fewer bytes on the link, some time of compute.
    Compress,
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

/// Shares of the units that could be rebuilt, or compressed, that the first rounds of the search try.
const SHARES: usize = 8;
/// Room left for units on their way, in sizes of the largest unit.
const RESERVES: [u64; 4] = [1, 2, 4, 8];

/// Chooses what to rebuild, what to keep, what to offload and what of that to compress, so that the simulated
/// step is the shortest within the budget.
///
/// Rebuilds are taken in the order of bytes saved a microsecond. For a number of them, what fits is
/// kept, last packed first (needed first in backward, so it occupies memory for the shortest time
/// and saves the transfer with the closest deadline), and the rest goes, compressed where that is among a
/// number of those that the codec saves most a microsecond. The two numbers and the room left for what is on
/// its way are searched, and the simulator decides.
#[must_use]
pub fn make_plan(record: &StepRecord, limits: &Limits) -> Plan {
    let largest = record.units.iter().map(|unit| unit.bytes).max().unwrap_or(0);
    let mut search = Search {
        record,
        limits,
        budget: limits.budget_bytes,
        rebuilds: rebuild_order(record),
        coded: coded_order(record),
        best: None,
    };
    let start = Choice { rebuilds: 0, coded: 0, reserve: RESERVES[1] };
    search.attempt(start);
    if search.is_free() {
        return search.settled();
    }
    // A budget that nothing can keep must not drown the price: the best that can be done counts.
    let nothing = Limits { budget_bytes: 0, ..*limits };
    let floor = simulate(record, &choose(record, &nothing, &[], &[], 0), &nothing).1.peak_bytes;
    if floor > limits.budget_bytes {
        search.budget = floor + 2 * largest;
    }
    search.try_rebuilds();
    for reserve in [RESERVES[0], RESERVES[2], RESERVES[3], 0] {
        search.attempt(Choice { reserve, ..search.best() });
    }
    if !search.coded.is_empty() && !search.is_free() {
        search.try_coded();
    }
    search.refine();
    search.settled()
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
    by_gain(record, gain)
}

fn narrow_bytes(record: &StepRecord, index: usize) -> Option<u64> {
    record.units.get(index).filter(|unit| unit.is_narrow).map(|unit| unit.bytes)
}

/// Units that the link codec makes smaller, the most bytes saved a microsecond first, among equals the last packed.
fn coded_order(record: &StepRecord) -> Vec<usize> {
    let gain = |index: usize| {
        let unit = &record.units[index];
        let coded = unit.coded.filter(|coded| coded.bytes < unit.bytes)?;
        Some((unit.bytes - coded.bytes) as f64 / (coded.encode_us + coded.decode_us).max(1e-3))
    };
    by_gain(record, gain)
}

fn by_gain(record: &StepRecord, gain: impl Fn(usize) -> Option<f64>) -> Vec<usize> {
    let mut order: Vec<_> =
        (0..record.units.len()).filter_map(|index| gain(index).map(|gain| (gain, index))).collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    order.into_iter().map(|(_, index)| index).collect()
}

/// What the search varies: how many units of each order, and sizes of the largest left free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Choice {
    rebuilds: usize,
    coded: usize,
    reserve: u64,
}

struct Search<'a> {
    record: &'a StepRecord,
    limits: &'a Limits,
    /// What counts as within the budget.
    budget: u64,
    rebuilds: Vec<usize>,
    coded: Vec<usize>,
    best: Option<(Choice, Plan)>,
}

impl Search<'_> {
    fn best(&self) -> Choice {
        self.best.as_ref().map_or(Choice { rebuilds: 0, coded: 0, reserve: 0 }, |(choice, _)| *choice)
    }

    /// Whether the best plan costs nothing and keeps the budget: no other can be better.
    fn is_free(&self) -> bool {
        self.best.as_ref().is_some_and(|(_, Plan { predicted, .. })| {
            predicted.stall_us + predicted.rebuild_us + predicted.codec_us <= 0.0
                && predicted.peak_bytes <= self.budget
        })
    }

    fn settled(self) -> Plan {
        self.best.map(|(_, plan)| settle(self.record, self.limits, plan)).unwrap_or_default()
    }

    /// Shares of the rebuilds, with the rest of the best choice.
    fn try_rebuilds(&mut self) {
        let best = self.best();
        let steps = SHARES.min(self.rebuilds.len());
        for step in 0..=steps {
            let rebuilds = self.rebuilds.len() * step / steps.max(1);
            self.attempt(Choice { rebuilds, ..best });
        }
    }

    /// The whole codec with every share of rebuilds, since it makes the dearest of them needless; then shares of it.
    fn try_coded(&mut self) {
        let (best, all) = (self.best(), self.coded.len());
        let steps = SHARES.min(self.rebuilds.len());
        for step in 0..=steps {
            self.attempt(Choice { rebuilds: self.rebuilds.len() * step / steps.max(1), coded: all, ..best });
        }
        for step in 1..4 {
            self.attempt(Choice { coded: all * step / 4, ..self.best() });
        }
    }

    /// Both numbers, in halving strides around the best.
    fn refine(&mut self) {
        let (rebuilds, coded) = (self.rebuilds.len(), self.coded.len());
        let mut strides = (rebuilds / SHARES / 2, coded / SHARES);
        // A hundredth of either is fine enough for long steps, where each is little of the whole.
        while strides.0 > rebuilds / 100 || self.best().coded > 0 && strides.1 > coded / 100 {
            let middle = self.best();
            self.attempt(Choice { rebuilds: middle.rebuilds.saturating_sub(strides.0), ..middle });
            self.attempt(Choice { rebuilds: (middle.rebuilds + strides.0).min(rebuilds), ..middle });
            if self.best().coded > 0 {
                let middle = self.best();
                self.attempt(Choice { coded: middle.coded.saturating_sub(strides.1), ..middle });
                self.attempt(Choice { coded: (middle.coded + strides.1).min(coded), ..middle });
            }
            strides = (strides.0 / 2, strides.1 / 2);
        }
    }

    fn attempt(&mut self, choice: Choice) {
        if self.best.as_ref().is_some_and(|(best, _)| *best == choice) {
            return;
        }
        let (rebuilt, coded) = (&self.rebuilds[..choice.rebuilds], &self.coded[..choice.coded]);
        let actions = choose(self.record, self.limits, rebuilt, coded, choice.reserve);
        let (schedule, predicted) = simulate(self.record, &actions, self.limits);
        let price = |of: &Prediction| (of.peak_bytes.saturating_sub(self.budget), of.step_us);
        let better = self.best.as_ref().is_none_or(|(_, plan)| price(&predicted) < price(&plan.predicted));
        if better {
            self.best = Some((choice, Plan { actions, schedule, predicted }));
        }
    }
}

/// Actions with units of `rebuilt` rebuilt: of the others what fits is kept, last packed first, and of the rest
/// those of `coded` are compressed.
fn choose(
    record: &StepRecord,
    limits: &Limits,
    rebuilt: &[usize],
    coded: &[usize],
    reserve: u64,
) -> Vec<Action> {
    let mut actions = vec![Action::Offload; record.units.len()];
    for &unit in rebuilt {
        actions[unit] = Action::Rebuild;
    }
    for (index, unit) in record.units.iter().enumerate() {
        if unit.is_narrow && actions[index - 1] != Action::Rebuild {
            actions[index] = Action::Absent;
        }
    }
    keep_what_fits(record, limits, &mut actions, reserve);
    for &unit in coded {
        if actions[unit] == Action::Offload {
            actions[unit] = Action::Compress;
        }
    }
    actions
}

/// Keeps units that would leave, last packed first, as long as `reserve` of the largest stay free.
fn keep_what_fits(record: &StepRecord, limits: &Limits, actions: &mut [Action], reserve: u64) {
    let largest = record.units.iter().map(|unit| unit.bytes).max().unwrap_or(0);
    let full = signed(limits.budget_bytes.saturating_sub(record.hidden_bytes));
    let reserved = signed(limits.budget_bytes.saturating_sub(record.hidden_bytes + reserve * largest));
    let needs = needs(record, actions);
    // From its return on a unit is in the load in any case.
    let away = |index: usize| {
        let unit: &Unit = &record.units[index];
        unit.packed_at..needs[index].map_or(record.end_of(unit), |need| need + 1)
    };
    let leaves = |actions: &[Action], index: usize| actions[index] == Action::Offload;
    let mut load = Load::of(record);
    for (index, unit) in record.units.iter().enumerate() {
        if let (Some(need), true) = (needs[index], actions[index] != Action::Absent) {
            load.add(need + 1..record.end_of(unit), unit.bytes);
        }
    }
    let returned = load.values(record);
    for (index, unit) in record.units.iter().enumerate().filter(|(index, _)| leaves(actions, *index)) {
        load.add(away(index), unit.bytes);
    }
    // Where everything fits, no reserve is needed.
    let all_fit = load.values(record).iter().all(|&bytes| bytes <= full);
    if all_fit {
        actions
            .iter_mut()
            .filter(|action| **action == Action::Offload)
            .for_each(|action| *action = Action::Keep);
        return;
    }
    let mut profile = Profile::new(&returned);
    for (index, unit) in record.units.iter().enumerate().rev() {
        if leaves(actions, index) && profile.max(away(index)) + signed(unit.bytes) <= reserved {
            profile.add(away(index), signed(unit.bytes));
            actions[index] = Action::Keep;
        }
    }
}
