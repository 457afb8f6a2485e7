//! A plan: one action per unit; what a choice of rebuilds comes to within a budget.

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
    /// Most bytes of what has left, as they crossed the link.
    pub host_bytes: u64,
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

/// Keeps what the plan would bring back as soon as it has left, where that still fits and costs nothing.
pub(crate) fn settle(record: &StepRecord, limits: &Limits, plan: Plan) -> Plan {
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

/// Actions with units of `rebuilt` rebuilt: of the others what fits is kept, last packed first, and of the rest
/// those of `coded` are compressed.
pub(crate) fn choose(
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

/// Keeps units that would leave, last packed first, as long as `reserve` bytes stay free.
fn keep_what_fits(record: &StepRecord, limits: &Limits, actions: &mut [Action], reserve: u64) {
    let full = signed(limits.budget_bytes.saturating_sub(record.hidden_bytes));
    let reserved = signed(limits.budget_bytes.saturating_sub(record.hidden_bytes + reserve));
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
